"""The engine against transformers on the CPU, in one run, one checkpoint: python tests/bench/bench_cpu.py [FOLDER]

One request: decode rate after a prompt of 32 tokens, and prefill of 512 tokens; bf16, greedy. Both alternate,
and the best of each counts, so that other load on the machine hits both.
"""

import gc
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import random_checkpoint
import torch

ROUNDS, NEW, PROMPT, PREFILL = 10, 24, 32, 512


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, 150_000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def resident() -> int:
    """Anonymous memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


class Theirs:
    """transformers with default settings."""

    def __init__(self, folder: Path) -> None:
        import transformers

        transformers.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def prefill(self, tokens: list[int]) -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            self.model(torch.tensor([tokens]), logits_to_keep=1)
        return time.perf_counter() - begin

    def decode(self, tokens: list[int], count: int) -> float:
        """Seconds for `count` tokens after the first."""
        with torch.inference_mode():
            out = self.model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
            begin = time.perf_counter()
            for _ in range(count):
                token = out.logits[:, -1:].argmax(-1)
                out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
        return time.perf_counter() - begin


class Ours:
    def __init__(self, folder: Path) -> None:
        from llmrs import Engine, EngineConfig

        config = EngineConfig(str(folder), device="cpu", max_model_len=1024, max_num_seqs=1, prefix_cache=False)
        before = resident()
        self.engine = Engine(config)
        gc.collect()
        plan = self.engine.memory_plan
        planned = plan.weight_bytes + plan.num_blocks * plan.block_size * plan.kv_bytes_per_token
        print(f"anonymous memory after load {(resident() - before) / 1e9:.3f} GB, weights + KV {planned / 1e9:.3f} GB")

    def run(self, tokens: list[int], count: int) -> tuple[float, float]:
        from llmrs import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        (output,) = self.engine.generate_sync(params, [tokens])
        return output.prompt_time, output.decode_time

    def prefill(self, tokens: list[int]) -> float:
        return self.run(tokens, 1)[0]

    def decode(self, tokens: list[int], count: int) -> float:
        return self.run(tokens, count + 1)[1]


def serve(make: Callable[[Path], Any], path: Path, connection: Any) -> None:
    """Serves one engine in its own process: allocator and threads are not shared."""
    engine = make(path)
    connection.send("ready")
    while True:
        try:
            seed = connection.recv()
        except EOFError:  # the parent is done
            return
        connection.send((engine.decode(ids(PROMPT, seed), NEW), engine.prefill(ids(PREFILL, seed))))


def start(make: Callable[[Path], Any], path: Path) -> Any:
    """A connection that answers each seed with the seconds of NEW decode steps and of a prefill of PREFILL tokens."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=serve, args=(make, path, theirs), daemon=True).start()
    assert ours.recv() == "ready"
    return ours


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else random_checkpoint.write("qwen3-0.6b", Path(temporary))
        print(f"torch {torch.__version__}, transformers {version('transformers')}, {os.cpu_count()} cores")
        engines = {kind: start(make, folder) for kind, make in (("llmrs", Ours), ("transformers", Theirs))}
        times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in engines}
        for seed in range(ROUNDS):
            for kind, connection in engines.items():
                connection.send(seed)
                times[kind].append(connection.recv())
    for n, (what, count) in enumerate((("decode", NEW), ("prefill", PREFILL))):
        ours, theirs = (count / min(t[n] for t in times[kind]) for kind in engines)
        print(f"{what}: llmrs {ours:.1f} tokens/s, transformers {theirs:.1f}: {ours / theirs:.2f}x")


if __name__ == "__main__":
    main()
