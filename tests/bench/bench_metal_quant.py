"""Products of quantized weights on a Mac's GPU: python tests/bench/bench_metal_quant.py [--types q4_k q6_k ...]

Per type and number of rows of x: microseconds, GB/s of the planes and their share of the GPU's read bandwidth, and how
much faster than bf16 weights in MLX. Copies of the weights take turns, so that they don't come from a cache. Without a
GPU it times MLX's ops on the CPU, which says nothing about a Mac.
"""

import argparse
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from llmrs.backends.base import bench
from llmrs.backends.mlx.backend import MlxBackend
from llmrs.backends.mlx.quant_matrix import QuantMatrix, quant_matrix
from llmrs.quant.ggml import TYPES, tensor

GPU = mx.metal.is_available()
TURNS = 2**29 if GPU else 2**24  # bytes of all copies
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # rows of x


def copies(backend: MlxBackend, name: str, rows: int, columns: int) -> list[QuantMatrix]:
    kind = TYPES[name]
    data = np.random.default_rng(0).integers(0, 60, kind.nbytes((rows, columns)), np.uint8)  # no NaN among the scales
    count = max(TURNS // len(data), 1)
    return [quant_matrix([tensor(kind, (rows, columns), data)], mx.bfloat16, backend.pack) for _ in range(count)]


def seconds(multiply: Callable[[int], mx.array], count: int) -> float:
    """Of one product, of `count` that are evaluated together."""
    return bench(lambda: mx.eval([multiply(n) for n in range(count)]), lambda: None) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument(
        "--types", nargs="+", default=["q4_k", "q6_k", "q8_0", "q5_k", "q3_k", "q2_k", "iq4_xs", "q4_0"]
    )
    options = parser.parse_args()
    rows, columns = options.rows, options.columns
    backend = MlxBackend("gpu" if GPU else "cpu", "bf16", "bf16")
    mx.set_default_device(mx.gpu if GPU else mx.cpu)
    peak = backend.measure_peak()[0]
    dense = [
        mx.random.normal((rows, columns)).astype(mx.bfloat16) for _ in range(max(TURNS // (2 * rows * columns), 1))
    ]
    mx.eval(dense)
    print(f"{rows} x {columns}, reads {peak / 1e9:.0f} GB/s")
    for name in options.types:
        weights = copies(backend, name, rows, columns)
        nbytes = sum(a.nbytes for a in weights[0].arrays())
        for m in COUNTS:
            x = mx.random.normal((m, columns)).astype(mx.bfloat16)
            ours = seconds(lambda n: weights[n].linear(x), len(weights))  # noqa: B023
            bf16 = seconds(lambda n: x @ dense[n].T, len(dense))  # noqa: B023
            share = f"{nbytes / ours / 1e9:6.0f} GB/s, {100 * nbytes / ours / peak:3.0f} %"
            print(f"{name:7} {m:4} rows {1e6 * ours:8.1f} us, {share}, {bf16 / ours:5.2f} x bf16", flush=True)


if __name__ == "__main__":
    main()
