"""Kernels with an fp8 KV cache against the reference: bit-exact writes, attention within rounding."""

import numpy as np
import pytest
import torch

from llmrs.backends.reference import kv_fp8, ops
from llmrs.backends.torch.kv_fp8 import E4M3, QuantizedKV
from llmrs.core.errors import BackendError

pytest.importorskip("triton")
import triton
import triton.language as tl
from attention_cases import DEVICE, TYPES, run, step
from kv_fp8_cases import awkward, heads, zeros_in_torch

from llmrs.backends.torch.kernels.kv_fp8 import round_to_e4m3
from llmrs.backends.torch.kernels.paged_attention import AttnConfig, default_config, paged_attention
from llmrs.backends.torch.kernels.qk_norm_rope_cache import qk_norm_rope_write_kv

LEFT = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}  # what may differ
SERIAL = AttnConfig(4, 16, 4, 1)


@triton.jit
def _round(x, codes, COUNT: tl.constexpr):
    n = tl.arange(0, COUNT)
    tl.store(codes + n, round_to_e4m3(tl.load(x + n)).to(codes.dtype.element_ty))


@triton.jit
def _widen(codes, y):
    n = tl.arange(0, 256)
    tl.store(y + n, tl.load(codes + n).to(y.dtype.element_ty))


def pools(blocks: int, block_size: int, kv_heads: int, size: int) -> tuple[list[QuantizedKV], list[kv_fp8.QuantizedKV]]:
    """Empty K and V caches: in the backend's layout, and the reference's."""
    both = zeros_in_torch(blocks, 2, kv_heads, block_size, size, device=DEVICE)
    both.scales.fill_(torch.nan)  # unwritten tokens must not be read
    return (
        [side.transpose(1, 2) for side in both.unbind(1)],
        [kv_fp8.QuantizedKV.zeros((blocks, block_size, kv_heads, size)) for _ in range(2)],
    )


def test_rounding_to_e4m3():
    x = awkward()[:-1][: 2**17]
    codes = torch.empty(len(x), dtype=E4M3, device=DEVICE)
    _round[(1,)](torch.from_numpy(x).to(DEVICE), codes, COUNT=2**17)
    np.testing.assert_array_equal(codes.float().cpu().numpy(), kv_fp8.E4M3_VALUES[kv_fp8.encode(x)])


@pytest.mark.parametrize("dtype", TYPES)
def test_widening_e4m3(dtype: torch.dtype):
    """All codes but NaN, which the interpreter reads as 480; scales hold NaN."""
    codes, y = torch.arange(256, dtype=torch.uint8).view(E4M3), torch.empty(256, dtype=dtype, device=DEVICE)
    _widen[(1,)](codes.to(DEVICE), y)
    numbers = ~np.isnan(kv_fp8.E4M3_VALUES)
    np.testing.assert_array_equal(y.float().cpu().numpy()[numbers], kv_fp8.E4M3_VALUES[numbers])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("query_heads", "kv_heads", "size"), [(4, 2, 32), (3, 1, 24), (5, 5, 80), (2, 1, 256)])
def test_what_is_written(query_heads: int, kv_heads: int, size: int, dtype: torch.dtype):
    """Without RoPE and norm: the reference's codes and scales of the inputs, and nothing else."""
    rng = np.random.default_rng(size)
    tokens, slot_mapping = 5, np.array([9, 2, 23, 0, 14], np.int32)
    q, k, v = (
        torch.from_numpy(rng.normal(size=(tokens, n, size))).to(dtype) for n in (query_heads, kv_heads, kv_heads)
    )
    strange = torch.from_numpy(heads()[[0, 2, 6, 7], 4 : 4 + min(size, 20)])  # zeros, tiny, infinite, ordinary
    if dtype == torch.float32:
        k[:4, 0, : strange.shape[1]], v[1:, 0, : strange.shape[1]] = strange, strange
    cos_sin = torch.stack([torch.ones(8, size // 2), torch.zeros(8, size // 2)])
    (keys, values), expected = pools(6, 4, kv_heads, size)
    positions = np.zeros(tokens, np.int32)
    ints = [torch.from_numpy(a).to(DEVICE) for a in (positions, slot_mapping)]
    qk_norm_rope_write_kv(*(x.to(DEVICE) for x in (q, k, v)), None, *ints, cos_sin.to(DEVICE), keys, values)
    for ours, wanted, x in ((keys, expected[0], k), (values, expected[1], v)):
        wanted[slot_mapping // 4, slot_mapping % 4] = x.float().numpy()
        there = [
            a[slot_mapping // 4, slot_mapping % 4] for a in (ours.data.float().cpu().numpy(), ours.scales.cpu().numpy())
        ]
        np.testing.assert_array_equal(there[1], wanted.scales[slot_mapping // 4, slot_mapping % 4])
        finite = np.isfinite(there[1])
        codes = kv_fp8.E4M3_VALUES[wanted.data[slot_mapping // 4, slot_mapping % 4]]
        np.testing.assert_array_equal(there[0][finite], codes[finite])
        rest = np.setdiff1d(np.arange(24), slot_mapping)
        assert np.isnan(ours.scales.cpu().numpy()[rest // 4, rest % 4]).all()
        assert (ours.data.float().cpu().numpy()[rest // 4, rest % 4] == 0).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("query_heads", "kv_heads", "size"), [(4, 2, 16), (3, 1, 24), (4, 1, 96), (2, 1, 128)])
def test_attention(query_heads: int, kv_heads: int, size: int, dtype: torch.dtype):
    """Ragged steps with values of very different magnitude, KV splits and windows."""
    rng = np.random.default_rng(size)
    for block_size, window, split in ((4, 0, 1), (5, 7, 2), (16, 0, 4), (64, 3, 8)):
        batch = step(rng, [0, 37, 3, 8], [1, 1, 13, 5], block_size)
        ours, theirs = filled(rng, batch, block_size, kv_heads, size)
        q = torch.from_numpy(rng.normal(size=(len(batch.input_ids), query_heads, size))).to(dtype)
        y = run(q, ours, batch, size**-0.5, window, SERIAL, split)
        context = ops.Context(batch, block_size)
        wanted = ops.attend(context, q.float().numpy(), ops.KV(*theirs), scale=size**-0.5, window=window)
        assert np.abs(y.float().numpy() - wanted).max() < LEFT[dtype], (block_size, window, split)


def filled(rng: np.random.Generator, batch, block_size: int, kv_heads: int, size: int):
    """Caches with keys of magnitude 1 and values down to a thousandth, at the step's tokens."""
    ours, theirs = pools(int(batch.block_tables.max()) + 2, block_size, kv_heads, size)
    for s, length in enumerate(batch.seq_lens):
        p = np.arange(length)
        at = batch.block_tables[s, p // block_size], p % block_size
        for n, (pool, to) in enumerate(zip(ours, theirs, strict=True)):
            sizes = 10.0 ** -rng.uniform(0, 3 * n, (length, kv_heads, 1))
            to[at] = (rng.normal(size=(length, kv_heads, size)) * sizes).astype(np.float32)
            pool.data.view(torch.uint8)[at] = torch.from_numpy(to.data[at]).to(DEVICE)
            pool.scales[at] = torch.from_numpy(to.scales[at]).to(DEVICE)
    return ours, theirs


def test_the_cut_that_the_gpu_gets():
    rng = np.random.default_rng(0)
    batch = step(rng, [150, 70], [90, 1], 64)
    ours, theirs = filled(rng, batch, 64, 1, 128)
    q = torch.from_numpy(rng.normal(size=(91, 2, 128))).to(torch.float16)
    y = run(q, ours, batch, 0.1, 0, default_config(2, 128, torch.float16, prefill=True), 4)
    wanted = ops.attend(ops.Context(batch, 64), q.float().numpy(), ops.KV(*theirs), scale=0.1)
    assert np.abs(y.float().numpy() - wanted).max() < 6e-3


def test_small_values_keep_their_precision_in_float16():
    """Scales of 1e-7, below what float16 can hold."""
    rng = np.random.default_rng(0)
    batch = step(rng, [60], [1], 64)
    (keys, values), theirs = filled(rng, batch, 64, 1, 32)
    q = torch.from_numpy(rng.normal(size=(1, 2, 32))).to(torch.float16)
    for scales in (values.scales, theirs[1].scales):
        scales *= 2.0**-8
    y = run(q, [keys, values], batch, 0.1, 0, SERIAL, 1)
    wanted = ops.attend(ops.Context(batch, 64), q.float().numpy(), ops.KV(*theirs), scale=0.1)
    assert np.abs(y.float().numpy() - wanted).max() < 0.01 * np.abs(wanted).max()


def test_scales_that_lie_elsewhere_are_refused():
    keys, values = pools(2, 4, 2, 16)[0]
    q, y = torch.zeros(1, 2, 16), torch.zeros(1, 32)
    wrong = QuantizedKV(keys.data, torch.zeros(keys.scales.shape))
    ints = torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(BackendError, match="scales at"):
        paged_attention(q, wrong, values, ints, ints, y, scale=1.0, window=0, config=AttnConfig(1, 16, 4, 1))
