"""TTFT of a fresh engine under load, on an NVIDIA GPU: python tests/bench/bench_fresh.py FOLDER [--cold]

The requests of `mixed` arrive in a Poisson process at 50 % and 80 % of the rate of a warm engine, each in a
process of its own, right after the engine is loaded and without a warm-up run. With --cold Triton's cache on disk is
empty too. FOLDER is a checkpoint; if missing, one with Qwen3-0.6B's shapes is written. The last line is JSON.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import random_checkpoint

from llmrs import Engine, EngineConfig
from llmrs.bench.workloads import WORKLOADS, percentiles, poisson_arrivals, run

SHARES = (0.5, 0.8)


def loaded(folder: str) -> Engine:
    return Engine(
        EngineConfig(
            folder,
            device="cuda:0",
            max_num_seqs=256,
            max_model_len=4224,
            max_num_batched_tokens=8192,
            prefix_cache=False,
            kv_cache_memory=40 * 10**9,
        )
    )


def watch() -> dict[str, list[Any]]:
    """Milliseconds of every CUDA graph capture and Triton compilation."""
    from llmrs.backends.torch.cuda_graphs import GraphCapturer

    seen: dict[str, list[Any]] = {"capture": [], "compile": []}
    capture = GraphCapturer.capture

    def timed(self: GraphCapturer, *args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return capture(self, *args, **options)
        finally:
            seen["capture"].append((time.perf_counter() - begin) * 1e3)

    GraphCapturer.capture = timed  # type: ignore[method-assign]
    import triton

    def compiled(src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        seen["compile"].append((src.name, times.total / 1e3, cache_hit))

    triton.knobs.compilation.listener = compiled
    seen["gc"] = []
    gc.callbacks.append(lambda phase, info: seen["gc"].append((phase, info["generation"], time.perf_counter())))
    return seen


def child(folder: str, rate: float) -> None:
    """One fresh engine. Rate 0: all requests at once, twice; prints the rate of the second run."""
    seen, begin = watch(), time.perf_counter()
    with loaded(folder) as engine:
        load = time.perf_counter() - begin
        at_load = {name: len(found) for name, found in seen.items()}
        specs = WORKLOADS["mixed"].make_requests(engine.model.config.vocab_size)
        if not rate:
            run(engine, specs)
            print(json.dumps({"rate": len(specs) / run(engine, specs).seconds}))
            return
        trace = engine.start_trace()
        result = run(engine, specs, poisson_arrivals(len(specs), rate))
        longest = sorted(((e["dur"] / 1e3, e["name"]) for e in trace.events), reverse=True)[:8]
    ttft = [r.ttft * 1e3 for r in result.requests]
    compiled = seen["compile"]
    print(
        json.dumps(
            {
                "load": load,
                "at_load": at_load,
                "ttft": {**percentiles(ttft), "max": max(ttft)},
                "itl": result.latencies()["itl"],
                "captures": len(seen["capture"]),
                "capture_ms": percentiles(seen["capture"] or [0.0]),
                "compiled": sum(not hit for *_, hit in compiled),
                "compile_ms": sum(ms for _, ms, hit in compiled if not hit),
                "variants": Counter(name for name, *_ in compiled),
                "late": compiled[at_load["compile"] :],
                "capture": [round(ms, 1) for ms in seen["capture"]],
                "gc": [
                    (round((b[2] - a[2]) * 1e3, 1), a[1])
                    for a, b in zip(seen["gc"][::2], seen["gc"][1::2], strict=False)
                    if b[2] - a[2] > 0.004
                ],
                "longest": longest,
            }
        )
    )


def measured(folder: str, rate: float, cache: str | None = None) -> dict[str, Any]:
    env = {**os.environ, **({"TRITON_CACHE_DIR": cache} if cache else {})}
    done = subprocess.run([sys.executable, __file__, folder, str(rate)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(folder: str, cold: bool) -> None:
    if not (Path(folder) / "model.safetensors").exists():
        random_checkpoint.write("qwen3-0.6b", Path(folder))
    closed = measured(folder, 0)["rate"]
    found: dict[str, Any] = {"requests_per_second": closed}
    for name in ("warm", "cold")[: 1 + cold]:
        for share in SHARES:
            with tempfile.TemporaryDirectory() as cache:
                one = measured(folder, closed * share, cache if name == "cold" else None)
            found[f"{name} {share}"] = one
            ttft = ", ".join(f"{k} {v:.1f}" for k, v in one["ttft"].items())
            print(
                f"{name} kernel cache, {share:.0%}: TTFT in ms {ttft}; loaded in {one['load']:.1f} s; ",
                end="",
            )
            print(f"{one['captures']} graphs, {one['capture_ms']['p50']:.1f} ms each; ", end="")
            print(f"{one['compiled']} kernels compiled in {one['compile_ms'] / 1e3:.1f} s", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[2] != "--cold":
        child(sys.argv[1], float(sys.argv[2]))
    else:
        main(sys.argv[1], "--cold" in sys.argv)
