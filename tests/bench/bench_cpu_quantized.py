"""Quantized weights on the CPU and in llama.cpp, in one run: python tests/bench/bench_cpu_quantized.py [FOLDER]

One request: decode rate after a prompt of 32 tokens, and prefill of 512 tokens, greedy. Each engine has a process of
its own; they alternate, and the best of each counts. llama.cpp runs the files that llmrs wrote, with as many threads;
it is left out where NODE_LLAMA_MODULES does not lead to it (tests/helpers/llama_cpp.py).
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

for folder in ("tools", "helpers"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
sys.path.insert(0, str(Path(__file__).parent))
import llama_cpp
import random_checkpoint
import torch
from bench_cpu import NEW, PREFILL, Ours, start

ROUNDS = 6
TYPES = ("q4_k_m", "q8_0", "q6_k", "q4_0", "bf16")


class LlamaCpp:
    """By its library, with its default KV cache."""

    def __init__(self, path: Path) -> None:
        self.llama = llama_cpp.Llama(llama_cpp.LIBRARIES)
        self.llama.load(str(path))
        self.llama.start(1024, torch.get_num_threads(), exact=False)
        memory = self.llama.lib.llama_get_memory
        memory.argtypes, memory.restype = [llama_cpp._p], llama_cpp._p
        self.llama.lib.llama_memory_clear.argtypes = [llama_cpp._p, llama_cpp._b]
        self.memory = memory(self.llama.context)

    def wait(self, row: int) -> None:
        self.llama.lib.llama_get_logits_ith(self.llama.context, row)

    def prefill(self, tokens: list[int]) -> float:
        self.llama.lib.llama_memory_clear(self.memory, True)
        begin = time.perf_counter()
        self.llama.step(tokens, 0, last=True)
        self.wait(len(tokens) - 1)
        return time.perf_counter() - begin

    def decode(self, tokens: list[int], count: int) -> float:
        """Seconds for `count` tokens after the first; which ones does not matter."""
        self.prefill(tokens)
        begin = time.perf_counter()
        for n in range(count):
            self.llama.step([7 + n], len(tokens) + n)
            self.wait(0)
        return time.perf_counter() - begin


def quantized(folder: Path, name: str, target: Path) -> Path:
    from llmrs import EngineConfig
    from llmrs.conversion import quantize_model
    from llmrs.model import read_model
    from llmrs.quant.schemes import find_scheme

    path = target / f"{name}.gguf"
    quantize_model(read_model(EngineConfig(str(folder))), find_scheme(name), path)
    return path


def compare(name: str, path: Path, kinds: dict[str, Any]) -> None:
    engines = {kind: start(make, path) for kind, make in kinds.items()}
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for seed in range(ROUNDS):
        for kind, connection in engines.items():
            connection.send(seed)
            times[kind].append(connection.recv())
    for connection in engines.values():
        connection.close()
    for n, (what, count) in enumerate((("decode", NEW), ("prefill", PREFILL))):
        best = {kind: count / min(t[n] for t in times[kind]) for kind in kinds}
        shown = ", ".join(f"{kind} {rate:.1f}" for kind, rate in best.items())
        print(f"{name:8} {path.stat().st_size / 1e9:.2f} GB  {what}: {shown} tokens/s", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary)
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else random_checkpoint.write("qwen3-0.6b", target / "model")
        kinds = {"llmrs": Ours, **({"llama.cpp": LlamaCpp} if llama_cpp.LIBRARIES.is_dir() else {})}
        print(f"torch {torch.__version__}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}")
        for name in TYPES:
            compare(name, quantized(folder, name, target), kinds)


if __name__ == "__main__":
    main()
