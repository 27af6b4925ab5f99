"""How fast and how well the quantizer is, beside llama.cpp's where its libraries are (tests/helpers/llama_cpp.py).

    python tests/bench/bench_quantize.py [--kinds q4_k q6_k] [--million 32] [--device cuda]

Normal weights, the best of five runs each; llama.cpp on one thread. `cpu` is weights per second of processor time.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent.parent / "helpers"))

from llama_cpp import LIBRARIES, quantize_matrix

from llmrs.quant.ggml import TYPES, tensor
from llmrs.quant.quantize import RECIPES, quantize

COLUMNS, RUNS = 2048, 5


def measure(name: str, kind: str, x: np.ndarray, function: Callable[[], np.ndarray]) -> None:
    wall, cpu = [], []
    for _ in range(RUNS):
        start, used = time.perf_counter(), time.process_time()
        blocks = function()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    y = tensor(TYPES[kind], x.shape, blocks.reshape(-1)).float32()
    error = np.sqrt(np.square(y - x).mean() / np.square(x).mean())
    rates = f"{x.size / min(wall) / 1e6:8.1f} M weights/s{x.size / min(cpu) / 1e6:8.1f} M/s cpu"
    print(f"{kind:8}{name:12}{rates}   relative error {error:.5f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--million", type=int, default=32, help="weights")
    parser.add_argument("--device", help="of Torch; without it NumPy")
    args = parser.parse_args()
    shape = args.million * 10**6 // COLUMNS, COLUMNS
    x = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(0.02)
    for kind in args.kinds:
        measure("llmrs", kind, x, lambda kind=kind: quantize(x, kind, device=args.device))
        if LIBRARIES.is_dir():
            part = x[: len(x) // 8]
            measure("llama.cpp", kind, part, lambda kind=kind, part=part: quantize_matrix(part, TYPES[kind].number))


if __name__ == "__main__":
    main()
