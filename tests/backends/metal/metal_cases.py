"""Random inputs of the kernels, and comparison with NumPy references."""

import re

import mlx.core as mx
import numpy as np
import pytest
from metal_mlx import Shim
from metal_source import MetalError

from llmrs.backends.mlx.kernels.launch import Kernels, source
from llmrs.backends.reference.ops import KV, Context
from llmrs.core.batch import Batch
from llmrs.core.sampling import SamplingArrays

DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
ERROR = {
    mx.float32: 2e-6,
    mx.float16: 1e-3,
    mx.bfloat16: 8e-3,
}  # relative to the largest value: half an ulp, plus float32 rounding


def kernels(mutate=None) -> Kernels:
    """Kernels on the GPU with Metal, else on the shim. Mutated kernels always run on the shim."""
    return Kernels() if mx.metal.is_available() and not mutate else Kernels(Shim(mutate))


class Mutation:
    """A seeded bug: replaces `old`, which must occur once in a kernel, by `new`."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new, self.count = old, new, 0

    def __call__(self, text: str) -> str:
        self.count = max(self.count, text.count(self.old))
        return text.replace(self.old, self.new)


def assert_found(old: str, new: str, work) -> None:
    """Asserts that `work(mutate)` fails with this bug, by a wrong result or a report of the shim."""
    mutation = Mutation(old, new)
    with pytest.raises((AssertionError, MetalError)):
        work(mutation)
    assert mutation.count == 1, f"{old[:200]!r} occurs {mutation.count} times"


def without_barriers(name: str) -> list:
    """Mutations (old, new) of a .metal file, each without one of its barriers."""
    text = source(name)
    barriers = re.finditer(r"(thread|simd)group_barrier[^;]*;", text)
    return [
        pytest.param(text, text[: m.start()] + text[m.end() :], id=f"{name}: barrier {n} missing")
        for n, m in enumerate(barriers, 1)
    ]


def rounded(a: np.ndarray, dtype) -> tuple[mx.array, np.ndarray]:
    """The array in this dtype, and its values in float32."""
    x = mx.array(a.astype(np.float32)).astype(dtype)
    return x, np.array(x.astype(mx.float32))


def assert_close(got: mx.array, expected: np.ndarray, dtype=None) -> None:
    assert tuple(got.shape) == expected.shape
    got32 = np.array(got.astype(mx.float32)).astype(np.float64)
    assert np.isfinite(got32).all()
    error = np.abs(got32 - expected).max() / np.abs(expected).max()
    assert error < ERROR[dtype or got.dtype], error


def ragged(counts, lengths, block: int, rng) -> tuple[Batch, int]:
    """A step of the last counts[s] tokens of sequences of lengths[s], in random blocks; and the number of blocks."""
    counts, lengths = np.array(counts, np.int32), np.array(lengths, np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    needed = -(-lengths // block)
    total = int(needed.sum()) + 2
    order = rng.permutation(total).astype(np.int32)
    tables = np.zeros((len(counts), needed.max()), np.int32)
    for s, n in enumerate(needed):
        tables[s, :n], order = order[:n], order[n:]
    positions = np.concatenate([np.arange(n - c, n) for c, n in zip(counts, lengths, strict=True)]).astype(np.int32)
    zeros, sampling = np.zeros(len(counts), np.int32), SamplingArrays.zeros(len(counts))
    rest = (zeros, zeros > 0, sampling, starts[1:] - 1, zeros[:0])
    return Batch(positions, positions, starts, lengths, tables, *rest), total


def attention_case(dtype=mx.float32, *, counts, lengths, block=16, heads=4, kv_heads=2, size=64):
    """q, keys and values for a kernel, and context, q and KV cache for the reference's `attend`."""
    rng = np.random.default_rng(0)
    batch, blocks = ragged(counts, lengths, block, rng)
    q, q32 = rounded(rng.normal(size=(batch.query_start_loc[-1], heads, size)), dtype)
    (k, k32), (v, v32) = (rounded(rng.normal(size=(blocks, block, kv_heads, size)), dtype) for _ in range(2))
    return (q, k, v), (Context(batch, block), q32, KV(k32, v32))
