"""A part of bench_cuda.py: the search for cuts that an unknown GPU gets at load, beside what is stored."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmrs.backends.torch import kernel_configs
from llmrs.backends.torch import tuning as search
from llmrs.backends.torch.trials import Trials


def tuning(backend: Any, report: dict[str, Any]) -> None:
    """What is tried on the model's KV cache, what is found, and how long that takes."""
    kernels = backend.kernels
    device = kernels.cuts.device
    print(device, f"{device.shared // 1024} KB, {'stored' if device.stored else 'unknown'}")
    keys = search.keys_of(backend.graph, backend.type, kernel_configs.pool_type(kernels.kv[0].keys))
    trials = Trials(kernels.kv, len(kernels.slots.last_token), kernels.longest, kernels.device)
    for budget in (search.BUDGET, 1000.0):  # as at load, then all of it
        cuts, begin = kernel_configs.Cuts(device), time.perf_counter()
        with TemporaryDirectory() as folder:
            tried = search.tune(cuts, keys, trials, Path(folder) / "cuts.json", budget)
            kept = search.usable(search.load(Path(folder) / "cuts.json", device), device, keys)
        print(f"{len(tried)} trials, {len(kept)} of {len(keys)} keys in {time.perf_counter() - begin:.1f} s")
    best = {}
    for t in tried:
        best[t.key] = min(best.get(t.key, 1.0), t.seconds or 1.0)
        print(f"{t.key!s:34}{t.cut!s:20}{f'{t.seconds * 1e6:9.2f} us' if t.seconds else t.error}")
    stored = kernel_configs.Cuts(device)
    for key in best:
        now = next((t.seconds for t in tried if (t.key, t.cut) == (key, stored.of(key)) and t.seconds), float("nan"))
        report[f"tuned {key}"] = [list(stored.of(key)), now, list(cuts.of(key)), best[key]]
        print(f"{key!s:34}stored {stored.of(key)} {now * 1e6:.2f} us, "
              f"chosen {cuts.of(key)} {best[key] * 1e6:.2f} us", flush=True)  # fmt: skip
