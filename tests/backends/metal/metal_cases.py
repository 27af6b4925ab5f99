"""Random inputs for the kernels, their references in NumPy, and how close results must be."""

import re

import mlx.core as mx
import numpy as np
import pytest
from metal_mlx import Shim
from metal_source import MetalError

from llmrs.backends.mlx.kernels.launch import Kernels, source
from llmrs.core.batch import Batch
from llmrs.core.sampling import SamplingArrays

DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
ERROR = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}  # of the largest value: half a step, and some float32


def kernels(mutate=None) -> Kernels:
    """Kernels on the GPU where there is Metal, else on the shim. Mutated ones run on the shim only."""
    return Kernels() if mx.metal.is_available() and not mutate else Kernels(Shim(mutate))


class Mutation:
    """A bug to be found: `old`, which must occur once in a kernel's text, replaced by `new`."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new, self.places = old, new, 0

    def __call__(self, text: str) -> str:
        self.places = max(self.places, text.count(self.old))
        return text.replace(self.old, self.new)


def assert_found(old: str, new: str, work) -> None:
    """That `work(mutate)` fails, by a wrong result or by what the shim reports, on kernels with this bug."""
    mutation = Mutation(old, new)
    with pytest.raises((AssertionError, MetalError)):
        work(mutation)
    assert mutation.places == 1, f"{old[:200]!r} occurs {mutation.places} times"


def without_barriers(name: str) -> list:
    """Mutations (old, new) of a .metal file, each of which lacks one of its barriers."""
    text = source(name)
    found = re.finditer(r"(thread|simd)group_barrier[^;]*;", text)
    return [
        pytest.param(text, text[: m.start()] + text[m.end() :], id=f"{name}: barrier {n} missing")
        for n, m in enumerate(found, 1)
    ]


def rounded(a: np.ndarray, dtype) -> tuple[mx.array, np.ndarray]:
    """An array of the type, and the float32 values that it holds."""
    x = mx.array(a.astype(np.float32)).astype(dtype)
    return x, np.array(x.astype(mx.float32))


def assert_close(got: mx.array, expected: np.ndarray, dtype=None) -> None:
    assert tuple(got.shape) == expected.shape
    got32 = np.array(got.astype(mx.float32)).astype(np.float64)
    assert np.isfinite(got32).all()
    error = np.abs(got32 - expected).max() / np.abs(expected).max()
    assert error < ERROR[dtype or got.dtype], error


def ragged(counts, lengths, block: int, rng) -> tuple[Batch, int]:
    """A step of the last counts[s] tokens of sequences of lengths[s], in blocks at random; and how many blocks."""
    counts, lengths = np.array(counts, np.int32), np.array(lengths, np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    needed = -(-lengths // block)
    total = int(needed.sum()) + 2
    order = rng.permutation(total).astype(np.int32)
    tables = np.zeros((len(counts), needed.max()), np.int32)
    for s, n in enumerate(needed):
        tables[s, :n], order = order[:n], order[n:]
    positions = np.concatenate([np.arange(n - c, n) for c, n in zip(counts, lengths, strict=True)]).astype(np.int32)
    none = np.zeros(len(counts), np.int32)
    sampling = SamplingArrays.zeros(len(counts))
    batch = Batch(
        positions,
        positions,
        starts,
        lengths,
        tables,
        none,
        none > 0,
        sampling,
        logits_indices=starts[1:] - 1,
        prompt_logprob_ids=none[:0],
    )
    return batch, total


def token_to_seq(batch: Batch) -> np.ndarray:
    return np.repeat(np.arange(len(batch.seq_lens), dtype=np.int32), np.diff(batch.query_start_loc))
