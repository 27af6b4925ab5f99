"""Norm (where the model has one) and rotation of q and k, and k and v into the paged KV cache, in one kernel.

Defined by `qk_norm_rope_write_kv` and `rope_write_kv` in backends/fusion.py. T tokens, Hq and Hk heads of d elements:

    q (T, Hq, d), k, v (T, Hk, d), any strides but the last   keys, values (blocks, block_size, Hk, d), the same
    in fp8, key_scales, value_scales float32 (blocks, block_size, Hk): a scale lies where its codes do, over d
    turns float32 (2, positions, d / 2): cos and sin, made once     cells int32 (T,): block * block_size + offset
    -> rotated q (T, Hq, d), contiguous

A program does HEADS heads of one token: those of q, or the same ones of k and v. Cos and sin come from a table, since
the GPU's fast ones are off by too much for positions in the thousands. Moved: q, k and v read and written once.
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.kv_fp8 import check_scales, store_scaled
from llmrs.backends.torch.kernels.launch import POOLS, chained, check_rows, power, require
from llmrs.backends.torch.kv_fp8 import Scaled, parts

NAME = "qk_norm_rope_write_kv"
MANY = 1024  # tokens, from which programs do more heads: then there are enough, and starting them takes time too


@triton.jit
def _turned(x, at, there, w, cos, sin, half, eps, offset, D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr):
    """The two halves (HEADS, d / 2) of rotated heads, float32, from x + at (HEADS, 1)."""
    low, h = at + half[None, :], there & (half < HALF)[None, :]
    a = tl.load(x + low, mask=h, other=0.0)
    b = tl.load(x + low + HALF, mask=h, other=0.0)
    dtype = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        wa = tl.load(w + half, mask=half < HALF, other=0.0).to(tl.float32) + offset
        wb = tl.load(w + HALF + half, mask=half < HALF, other=0.0).to(tl.float32) + offset
        a = (a * scale * wa[None, :]).to(dtype).to(tl.float32)  # rounded, as the equations by themselves would
        b = (b * scale * wb[None, :]).to(dtype).to(tl.float32)
    return a * cos[None, :] - b * sin[None, :], b * cos[None, :] + a * sin[None, :]


@triton.jit
def _qk_norm_rope_write_kv(
    q, k, v, qw, kw, positions, cells, turns, out, keys, values, key_scales, value_scales, eps, offset, sines,
    q_row, q_head, k_row, k_head, v_row, v_head, key_block, key_token, key_head,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half, position = tl.arange(0, HALF_P), tl.load(positions + token).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    angle = turns + position * HALF + half
    cos = tl.load(angle, mask=half < HALF, other=0.0)
    sin = tl.load(angle + sines, mask=half < HALF, other=0.0)
    groups = (HQ + HEADS - 1) // HEADS
    if part < groups:
        head = (part * HEADS + tl.arange(0, HEADS))[:, None]
        there = head < HQ
        a, b = _turned(q, token * q_row + head * q_head, there, qw, cos, sin, half, eps, offset, D, HALF, NORM)
        rotated = out + (token * HQ + head) * D + half[None, :]
        there = there & (half < HALF)[None, :]
        tl.store(rotated, a.to(out.dtype.element_ty), mask=there)
        tl.store(rotated + HALF, b.to(out.dtype.element_ty), mask=there)
    else:
        head = ((part - groups) * HEADS + tl.arange(0, HEADS))[:, None]
        there = head < HK
        a, b = _turned(k, token * k_row + head * k_head, there, kw, cos, sin, half, eps, offset, D, HALF, NORM)
        cell = tl.load(cells + token)
        base = (cell // BLOCK).to(tl.int64) * key_block + (cell % BLOCK) * key_token + head * key_head
        there = there & (half < HALF)[None, :]
        to = base + half[None, :]
        kind = k.dtype.element_ty  # of the computation: rounded to it before the cache's own type
        if key_scales is not None:
            store_scaled(keys + to, key_scales + base // D, a.to(kind), b.to(kind), there, head < HK, HALF)
        else:
            tl.store(keys + to, a.to(kind).to(keys.dtype.element_ty), mask=there)
            tl.store(keys + to + HALF, b.to(kind).to(keys.dtype.element_ty), mask=there)
        at = token * v_row + head * v_head + half[None, :]
        if value_scales is not None:
            va, vb = tl.load(v + at, mask=there, other=0.0), tl.load(v + at + HALF, mask=there, other=0.0)
            store_scaled(values + to, value_scales + base // D, va, vb, there, head < HK, HALF)
        else:
            for side in tl.static_range(2):
                x = tl.load(v + at + side * HALF, mask=there, other=0.0)
                tl.store(values + to + side * HALF, x.to(values.dtype.element_ty), mask=there)


def qk_norm_rope_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    positions: torch.Tensor,
    cells: torch.Tensor,
    turns: torch.Tensor,
    keys: torch.Tensor | Scaled,
    values: torch.Tensor | Scaled,
    *,
    eps: float = 0.0,
    offset: float = 0.0,
) -> torch.Tensor:
    """Rotated q (T, Hq, d); k and v go to `cells`. `norms`: weights (d,) for q and k. Raises BackendError."""
    tokens, heads, size = q.shape
    kv_heads, half = k.shape[1], size // 2
    (keys, key_scales), (values, value_scales) = parts(keys), parts(values)
    for codes, scales in ((keys, key_scales), (values, value_scales)):
        check_scales(NAME, codes, scales)
    _check(q, k, v, positions, cells, turns, keys, values)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    together, pdl = min(16 if tokens >= MANY else 4, power(kv_heads)), chained(q.device)
    qw, kw = norms or (q, q)
    require(NAME, norms is None or qw.shape == kw.shape == (size,), f"norms {qw.shape}, {kw.shape}")
    _qk_norm_rope_write_kv[(tokens, triton.cdiv(heads, together) + triton.cdiv(kv_heads, together))](
        q, k, v, qw, kw, positions, cells, turns, out, keys, values, key_scales, value_scales,
        float(eps), float(offset), turns.stride(0),
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *keys.stride()[:3],
        HQ=heads, HK=kv_heads, D=size, HALF=half, HALF_P=power(half), HEADS=together, BLOCK=keys.shape[1],
        NORM=norms is not None, PDL=pdl, num_warps=max(together // 4, 1), launch_pdl=pdl,
    )  # fmt: skip
    return out


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, cells: torch.Tensor,
    turns: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
) -> None:  # fmt: skip
    size = q.shape[2]
    check_rows(NAME, q)
    check_rows(NAME, k, v)
    check_rows(NAME, keys, values, types=POOLS)
    require(NAME, keys.stride() == values.stride(), "keys and values differ in strides")
    require(NAME, q.dtype == k.dtype and size % 2 == 0, f"q is {q.dtype} of {size}, k is {k.dtype}")
    require(NAME, keys.shape[2:] == k.shape[1:] and k.shape[::2] == q.shape[::2], f"k {k.shape}, keys {keys.shape}")
    for ints in (positions, cells):
        require(NAME, ints.dtype == torch.int32 and ints.shape == (len(q),), "positions and cells are int32 (T,)")
    require(NAME, turns.shape[::2] == (2, size // 2) and turns.is_contiguous(), f"turns are {turns.shape}")
