"""The CPU's kernels for norms, rotary embedding, gates and decode attention, of each instruction set that this CPU has:
against the torch ops in float64, on memory that was full of NaN."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrs.backends.torch import ops
from llmrs.backends.torch.cpu.library import libraries
from llmrs.backends.torch.cpu.ops import CPUOps
from llmrs.backends.torch.ops import KV, Norm
from llmrs.backends.torch.sdpa_attention import AttnMetadata, attn_metadata
from llmrs.core.ir import RopeFrequencies

LIBRARIES = libraries()
pytestmark = pytest.mark.skipif(not LIBRARIES, reason="no C++ compiler built the CPU kernels")
EPSILON = {torch.float32: 1e-5, torch.float16: 1.2e-3, torch.bfloat16: 9e-3}  # of a rounded result, relative
BLOCK_SIZE = 4

ALL_OPS = st.sampled_from([CPUOps(k) for k in LIBRARIES])
DTYPES = st.sampled_from(list(EPSILON))
SIZES = st.one_of(st.integers(1, 100), st.sampled_from([128, 1024, 3072]))
SEEDS = st.integers(0, 2**31)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Results lie in memory full of NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(seed: int, dtype: torch.dtype, *shape: int, stride: int = 0) -> torch.Tensor:
    """Rows that lie `stride` elements further apart than they are long."""
    x = torch.randn(*shape[:-1], shape[-1] + stride, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype)[..., : shape[-1]]


def assert_close(y: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert y.dtype == dtype
    assert y.shape == expected.shape
    smallest = torch.finfo(dtype).tiny  # below it numbers of this type have fewer digits
    scale = expected.abs().clamp(min=max(float(expected.abs().mean()), smallest))
    assert ((y.double() - expected).abs() / scale).max() < EPSILON[dtype]


@settings(deadline=None, max_examples=60)
@given(ALL_OPS, DTYPES, st.integers(1, 9), SIZES, st.sampled_from([0.0, 1.0]), SEEDS)
def test_rms_norm(op: CPUOps, dtype: torch.dtype, rows: int, n: int, offset: float, seed: int) -> None:
    x, y, w = random(seed, dtype, rows, n, stride=3), random(seed + 1, dtype, rows, n), random(seed + 2, dtype, n)
    expected = ops.rms_norm(None, x.double(), Norm(w.double() + offset, None), eps=1e-6)
    assert_close(op.rms_norm(None, x, Norm(w, None), eps=1e-6, offset=offset), expected, dtype)
    total, normal = op.fused_add_rms_norm(None, x, y, Norm(w, None), eps=1e-6, offset=offset)
    assert torch.equal(total, x + y)
    expected = ops.rms_norm(None, total.double(), Norm(w.double() + offset, None), eps=1e-6)
    assert_close(normal, expected, dtype)


@settings(deadline=None, max_examples=60)
@given(ALL_OPS, DTYPES, st.integers(1, 9), SIZES, st.sampled_from(["silu_and_mul", "gelu_and_mul"]), SEEDS)
def test_gates(op: CPUOps, dtype: torch.dtype, rows: int, n: int, name: str, seed: int) -> None:
    gate, up = (random(seed, dtype, rows, 2 * n) * 3).split(n, -1)
    expected = ops.OPS[name](None, gate.double(), up.double())
    assert_close(op.table()[name](None, gate, up), expected, dtype)


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_and_mul"])
@pytest.mark.parametrize("library", range(len(LIBRARIES)))
def test_gates_far_from_zero(library: int, name: str) -> None:
    x = torch.tensor([[-1e4, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e4, torch.nan]])
    y = CPUOps(LIBRARIES[library]).table()[name](None, x, torch.ones_like(x))
    expected = ops.OPS[name](None, x, torch.ones_like(x))
    assert torch.allclose(y, expected, atol=1e-30, equal_nan=True)


def batch_of(rng: np.random.Generator, query_lens: list[int], seq_lens: list[int]) -> SimpleNamespace:
    """What attention reads of a batch. Sequences whose blocks lie anywhere."""
    counts = [-(-n // BLOCK_SIZE) for n in seq_lens]
    numbers, tables = rng.permutation(sum(counts) + 3), np.zeros((len(seq_lens), max(counts) + 1), np.int32)
    for row, count in enumerate(counts):
        tables[row, :count], numbers = numbers[:count], numbers[count:]
    starts = np.cumsum([0, *query_lens]).astype(np.int32)
    positions = np.concatenate([np.arange(n - m, n) for m, n in zip(query_lens, seq_lens, strict=True)])
    return SimpleNamespace(
        positions=positions.astype(np.int32), query_start_loc=starts, seq_lens=np.array(seq_lens, np.int32),
        block_tables=tables, logits_indices=starts[1:] - 1,
    )  # fmt: skip


def made_kv(seed: int, dtype: torch.dtype, batch: SimpleNamespace, heads: int, size: int) -> KV:
    blocks = int(batch.block_tables.max()) + 2
    return KV(*(random(seed + n, dtype, blocks, BLOCK_SIZE, heads, size) for n in (5, 6)))


def metadata(batch: SimpleNamespace) -> AttnMetadata:
    return attn_metadata(batch, BLOCK_SIZE, torch.device("cpu"))


def double(kv: KV) -> KV:
    return KV(kv.keys.double(), kv.values.double())


@settings(deadline=None, max_examples=60)
@given(
    ALL_OPS, DTYPES, DTYPES, st.integers(1, 3), st.integers(1, 7), st.sampled_from([2, 16, 64, 80, 128]),
    st.lists(st.integers(1, 600), min_size=1, max_size=3), st.sampled_from([0, 1, 5, 300]), SEEDS,
)  # fmt: skip
def test_decode_attention(
    op: CPUOps, dtype: torch.dtype, kv_dtype: torch.dtype, kv_heads: int, group: int, size: int, lengths: list[int],
    window: int, seed: int,
) -> None:  # fmt: skip
    """Groups of heads, windows, several splits and tiles, blocks in disorder."""
    batch = batch_of(np.random.default_rng(seed), [1] * len(lengths), lengths)
    kv, c = made_kv(seed, kv_dtype, batch, kv_heads, size), metadata(batch)
    q = random(seed, dtype, len(lengths), kv_heads * group, size)
    expected = ops.attend(c, q.double(), double(kv), scale=size**-0.5, window=window)
    assert_close(op.attend(c, q, kv, scale=size**-0.5, window=window), expected, dtype)


@pytest.mark.parametrize("library", range(len(LIBRARIES)))
def test_prefill_chunks_beside_decodes(library: int) -> None:
    batch = batch_of(np.random.default_rng(0), [1, 5, 1], [40, 9, 300])
    kv, c, q = made_kv(0, torch.float32, batch, 2, 32), metadata(batch), random(0, torch.float32, 7, 6, 32)
    expected = ops.attend(c, q.double(), double(kv), scale=0.2)
    assert_close(CPUOps(LIBRARIES[library]).attend(c, q, kv, scale=0.2), expected, torch.float32)


@pytest.mark.parametrize("library", range(len(LIBRARIES)))
def test_a_sequence_s_result_depends_on_nothing_else(library: int) -> None:
    """On other sequences, and on the number of threads."""
    op, batch = CPUOps(LIBRARIES[library]), batch_of(np.random.default_rng(0), [1, 1], [700, 30])
    kv, q = made_kv(0, torch.float32, batch, 2, 32), random(0, torch.float32, 2, 4, 32)
    both, threads = op.attend(metadata(batch), q, kv, scale=0.2), torch.get_num_threads()
    alone = batch_of(np.random.default_rng(0), [1], [30])
    alone.block_tables[:] = batch.block_tables[1:, : alone.block_tables.shape[1]]
    try:
        torch.set_num_threads(3)
        assert torch.equal(op.attend(metadata(alone), q[1:], kv, scale=0.2), both[1:])
        assert torch.equal(op.attend(metadata(batch), q, kv, scale=0.2), both)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("library", range(len(LIBRARIES)))
def test_a_nan_in_the_cache_shows(library: int) -> None:
    batch = batch_of(np.random.default_rng(0), [1], [70])
    kv, q = made_kv(0, torch.float32, batch, 1, 16), random(0, torch.float32, 1, 2, 16)
    kv.keys[batch.block_tables[0, 0], 1] = torch.nan
    assert CPUOps(LIBRARIES[library]).attend(metadata(batch), q, kv, scale=1.0).isnan().all()


@settings(deadline=None, max_examples=60)
@given(
    ALL_OPS, DTYPES, DTYPES, st.integers(1, 5), st.integers(1, 3), st.sampled_from([2, 16, 32, 72, 128]),
    st.sampled_from(["merged", "apart"]), st.sampled_from([0.0, 1.0]), SEEDS,
)  # fmt: skip
def test_rope_and_cache(
    op: CPUOps, dtype: torch.dtype, kv_dtype: torch.dtype, group: int, kv_heads: int, size: int, layout: str,
    offset: float, seed: int,
) -> None:  # fmt: skip
    """q, k and v as parts of one matrix, and apart; with norms of each head and without."""
    batch, heads = batch_of(np.random.default_rng(seed), [3, 1], [7, 9]), kv_heads * group
    c, tokens = metadata(batch), len(batch.positions)
    whole = random(seed, dtype, tokens, (heads + 2 * kv_heads) * size)
    q, k, v = (x.view(tokens, -1, size) for x in whole.split([heads * size, kv_heads * size, kv_heads * size], -1))
    if layout == "apart":
        q, k, v = (x.contiguous() for x in (q, k, v))
    frequencies = RopeFrequencies("test", tuple(np.geomspace(1, 1e-3, size // 2)), 1.25)
    positions = torch.from_numpy(batch.positions)
    norms = random(seed + 1, dtype, heads + kv_heads, size)
    norms = norms.float() + offset if offset else norms
    for name, given_norms in (("rope_write_kv", ()), ("qk_norm_rope_write_kv", (norms,))):
        kv, params = made_kv(seed, kv_dtype, batch, kv_heads, size), {"frequencies": frequencies}
        wide, expected_kv = KV(kv.keys.float(), kv.values.float()), None
        if given_norms:
            params |= {"eps": 1e-6, "offset": offset}
        expected, expected_kv = ops.OPS[name](
            c, q.double(), positions, k.double(), v.double(), wide, *(n.double() for n in given_norms), **params
        )
        y, found = op.table()[name](c, q, positions, k, v, kv, *given_norms, **params)
        assert_close(y, expected.double(), dtype)
        assert_close(found.keys, expected_kv.keys.double(), kv_dtype)
        assert torch.equal(found.values, expected_kv.values.to(kv_dtype))


@pytest.mark.parametrize("library", range(len(LIBRARIES)))
def test_loops_of_several_callers(library: int) -> None:
    """More threads than cores, and two callers at once, of which one finds the threads busy."""
    op, x, threads = CPUOps(LIBRARIES[library]), torch.randn(32, 4096), torch.get_num_threads()
    expected = op.silu_and_mul(None, x, x).numpy().tobytes()

    def many(_: int) -> bool:
        return all(op.silu_and_mul(None, x, x).numpy().tobytes() == expected for _ in range(200))

    try:
        torch.set_num_threads(5)
        with ThreadPoolExecutor(2) as callers:
            assert all(callers.map(many, range(2)))
    finally:
        torch.set_num_threads(threads)


def test_threads_after_a_fork() -> None:
    """A child has none of the parent's threads, and starts its own."""
    script = """
import os, torch
from llmrs.backends.torch.cpu.library import libraries
from llmrs.backends.torch.cpu.ops import CPUOps
torch.set_num_threads(3)
op, x = CPUOps(libraries()[0]), torch.randn(64, 4096)
y = op.silu_and_mul(None, x, x).numpy().tobytes()
child = os.fork()  # torch's own threads would hang here
assert op.silu_and_mul(None, x, x).numpy().tobytes() == y
if child:
    assert os.waitpid(child, 0)[1] == 0
    print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.stdout == "done\n", done.stderr
