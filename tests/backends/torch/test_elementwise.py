"""Elementwise and norm kernels against the reference's ops, on awkward sizes."""

import numpy as np
import pytest
import torch

from llmrs.backends.reference import ops
from llmrs.core.ir import RopeFrequencies

pytest.importorskip("triton")
from llmrs.backends.torch.kernels import qk_norm_rope_cache
from llmrs.backends.torch.kernels.act_and_mul import act_and_mul
from llmrs.backends.torch.kernels.embedding import embed
from llmrs.backends.torch.kernels.qk_norm_rope_cache import qk_norm_rope_write_kv
from llmrs.backends.torch.kernels.rms_norm import fused_add_rms_norm, rms_norm
from llmrs.core.errors import BackendError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
LEFT = {torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}


def random(rng: np.random.Generator, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=shape)).to(dtype).to(DEVICE)


def numpy(x: torch.Tensor) -> np.ndarray:
    return x.float().cpu().numpy()


def near(found: torch.Tensor, expected: np.ndarray) -> bool:
    """Up to rounding, relative to the expected value."""
    return bool((np.abs(numpy(found) - expected) < LEFT[found.dtype] * np.maximum(np.abs(expected), 1)).all())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 64), (2, 80), (5, 1024), (2, 2600)])
def test_norms(rows: int, width: int, dtype: torch.dtype):
    rng = np.random.default_rng(width)
    wide = random(rng, rows, width + 16, dtype=dtype)
    x, y, w = wide[:, 8 : width + 8], random(rng, rows, width, dtype=dtype), random(rng, width, dtype=dtype)
    for offset in (0.0, 1.0):
        assert near(
            rms_norm(x, w, eps=1e-5, offset=offset), ops.rms_norm(None, *map(numpy, (x, w)), eps=1e-5, offset=offset)
        )
        total, n = fused_add_rms_norm(x, y, w, eps=1e-5, offset=offset)
        assert torch.equal(total, x + y)
        assert near(n, ops.rms_norm(None, numpy(x + y), numpy(w), eps=1e-5, offset=offset))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 24), (3, 96), (2, 3072), (4, 1100)])
def test_act_and_mul(rows: int, width: int, dtype: torch.dtype):
    both = random(np.random.default_rng(width), rows, 2 * width, dtype=dtype) * 2
    gate, up = both.split(width, dim=1)
    for gelu, op in ((False, ops.silu_and_mul), (True, ops.gelu_and_mul)):
        assert near(act_and_mul(gate, up, gelu=gelu), op(None, numpy(gate), numpy(up)))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 32), (3, 1, 24), (8, 8, 64), (5, 5, 80), (2, 1, 256)])
@pytest.mark.parametrize("many", [1, 1024])  # tokens from which a CTA does more heads
def test_qk_norm_rope_write_kv(heads: int, kv_heads: int, size: int, many: int, dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(qk_norm_rope_cache, "MANY_TOKENS", many)
    check_qk_norm_rope_write_kv(heads, kv_heads, size, dtype)


def check_qk_norm_rope_write_kv(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(size)
    tokens, block_size = 5, 4
    rows = random(rng, tokens, (heads + 2 * kv_heads) * size, dtype=dtype)
    q, k, v = (p.unflatten(1, (-1, size)) for p in rows.split([heads * size, kv_heads * size, kv_heads * size], dim=1))
    frequencies = RopeFrequencies("test", tuple(100.0 ** (-2 * i / size) for i in range(size // 2)), 1.25)
    angles = np.arange(50, dtype=np.float32)[:, None] * np.array(frequencies.values, np.float32)
    cos_sin_cache = torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)]) * np.float32(1.25)).to(DEVICE)
    positions, slot_mapping = np.array([0, 1, 7, 49, 3], np.int32), np.array([9, 2, 23, 0, 14], np.int32)
    for norm in (False, True):
        kv = torch.full((2, 6, kv_heads, block_size, size), 77.0, dtype=dtype, device=DEVICE).transpose(2, 3)
        norms = (random(rng, size, dtype=dtype), random(rng, size, dtype=dtype)) if norm else None
        ints = [torch.from_numpy(a).to(DEVICE) for a in (positions, slot_mapping)]
        out = qk_norm_rope_write_kv(q, k, v, norms, *ints, cos_sin_cache, kv[0], kv[1], eps=1e-6, offset=0.5)
        wanted = [numpy(q), numpy(k)]
        if norms:
            wanted = [ops.rms_norm(None, x, numpy(w), eps=1e-6, offset=0.5) for x, w in zip(wanted, norms, strict=True)]
        wanted = [ops.rope(None, x, positions, frequencies=frequencies) for x in wanted]
        assert near(out, wanted[0])
        stored = kv.reshape(2, -1, kv_heads, size)
        assert near(stored[0, slot_mapping], wanted[1])
        assert torch.equal(stored[1, slot_mapping], v)
        rest = np.setdiff1d(np.arange(24), slot_mapping)
        assert (stored[:, rest] == 77).all()


def test_embed():
    table = random(np.random.default_rng(0), 7, 1100, dtype=torch.float16)
    tokens, last = torch.tensor([6, -3, 0, -1], dtype=torch.int32), torch.tensor([5, 1, 2])
    assert torch.equal(embed(tokens.to(DEVICE), last.to(DEVICE), table), table[[6, 2, 0, 5]])


def test_what_does_not_fit_is_refused():
    x = torch.zeros(3, 8)
    for wrong in (
        lambda: rms_norm(x.T, x[0], eps=1e-5),
        lambda: fused_add_rms_norm(x, x.half(), x[0], eps=1e-5),
        lambda: fused_add_rms_norm(x, torch.zeros(2, 3, 8).half(), x[0], eps=1e-5),
        lambda: fused_add_rms_norm(x, torch.zeros(2, 3, 9), x[0], eps=1e-5),
    ):
        with pytest.raises(BackendError, match="kernel rms_norm"):
            wrong()
    with pytest.raises(BackendError, match="shapes"):
        act_and_mul(x, x[:2], gelu=False)
