"""q/k RMSNorm (if the model has one), RoPE and the KV cache write, in one kernel.

Defined by `qk_norm_rope_write_kv` and `rope_write_kv` in backends/fusion.py.

    q (T, Hq, d), k, v (T, Hk, d)               any strides but the last
    k_cache, v_cache (blocks, block_size, Hk, d)  any strides but the last
    fp8: k_scales, v_scales float32 (blocks, block_size, Hk), strides those of the cache over d
    cos_sin_cache float32 (2, positions, d / 2)
    slot_mapping int32 (T,): block * block_size + offset
    -> rotated q (T, Hq, d), contiguous

A CTA handles HEADS_PER_CTA heads of one token, of q or of k and v. cos and sin come from a table: the GPU's fast ones
lose too much precision at positions in the thousands. Bytes moved: q, k and v read and written once.
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.kv_fp8 import check_cache, quantize_and_store
from llmrs.backends.torch.kernels.launch import check, check_tensors, next_power_of_2, pdl_wait
from llmrs.backends.torch.kv_fp8 import QuantizedKV

NAME = "qk_norm_rope_write_kv"
MANY_TOKENS = 1024  # from here on 16 heads per CTA instead of 4: starting CTAs takes time too


@triton.jit
def apply_norm_rope(
    x, offs, head_mask, norm_weight, cos, sin, offs_d, eps, weight_offset,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Rotated heads at x + offs (HEADS, 1) as two halves (HEADS, d / 2), float32."""
    ptrs, mask = x + offs + offs_d[None, :], head_mask & (offs_d < HALF)[None, :]
    a = tl.load(ptrs, mask=mask, other=0.0)
    b = tl.load(ptrs + HALF, mask=mask, other=0.0)
    dtype = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    if HAS_NORM:
        inverse_rms = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / HEAD_DIM + eps)[:, None]
        wa = tl.load(norm_weight + offs_d, mask=offs_d < HALF, other=0.0).to(tl.float32) + weight_offset
        wb = tl.load(norm_weight + HALF + offs_d, mask=offs_d < HALF, other=0.0).to(tl.float32) + weight_offset
        a = (a * inverse_rms * wa[None, :]).to(dtype).to(tl.float32)  # rounded as the unfused norm rounds
        b = (b * inverse_rms * wb[None, :]).to(dtype).to(tl.float32)
    return a * cos[None, :] - b * sin[None, :], b * cos[None, :] + a * sin[None, :]


@triton.jit
def qk_norm_rope_write_kv_kernel(
    q, k, v, q_norm, k_norm, positions, slot_mapping, cos_sin_cache, q_out, k_cache, v_cache, k_scales, v_scales,
    eps, weight_offset, sin_offset,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_cb, stride_ct, stride_ch,
    HQ: tl.constexpr, HK: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    HEADS_PER_CTA: tl.constexpr, BLOCK_SIZE: tl.constexpr, HAS_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token, cta = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_d, position = tl.arange(0, HALF_PAD), tl.load(positions + token).to(tl.int64)
    pdl_wait(PDL)
    cos_ptrs = cos_sin_cache + position * HALF + offs_d
    cos = tl.load(cos_ptrs, mask=offs_d < HALF, other=0.0)
    sin = tl.load(cos_ptrs + sin_offset, mask=offs_d < HALF, other=0.0)
    q_ctas = (HQ + HEADS_PER_CTA - 1) // HEADS_PER_CTA
    if cta < q_ctas:
        head = (cta * HEADS_PER_CTA + tl.arange(0, HEADS_PER_CTA))[:, None]
        head_mask = head < HQ
        a, b = apply_norm_rope(q, token * stride_qt + head * stride_qh, head_mask, q_norm, cos, sin, offs_d, eps,
                               weight_offset, HEAD_DIM, HALF, HAS_NORM)  # fmt: skip
        out_ptrs = q_out + (token * HQ + head) * HEAD_DIM + offs_d[None, :]
        mask = head_mask & (offs_d < HALF)[None, :]
        tl.store(out_ptrs, a.to(q_out.dtype.element_ty), mask=mask)
        tl.store(out_ptrs + HALF, b.to(q_out.dtype.element_ty), mask=mask)
    else:
        head = ((cta - q_ctas) * HEADS_PER_CTA + tl.arange(0, HEADS_PER_CTA))[:, None]
        head_mask = head < HK
        a, b = apply_norm_rope(k, token * stride_kt + head * stride_kh, head_mask, k_norm, cos, sin, offs_d, eps,
                               weight_offset, HEAD_DIM, HALF, HAS_NORM)  # fmt: skip
        slot = tl.load(slot_mapping + token)
        offs = (slot // BLOCK_SIZE).to(tl.int64) * stride_cb + (slot % BLOCK_SIZE) * stride_ct + head * stride_ch
        offs_cache, mask = offs + offs_d[None, :], head_mask & (offs_d < HALF)[None, :]
        dtype = k.dtype.element_ty  # the model's: rounded to it before the cache's
        if k_scales is not None:
            quantize_and_store(k_cache + offs_cache, k_scales + offs // HEAD_DIM, a.to(dtype), b.to(dtype), mask,
                               head_mask, HALF)  # fmt: skip
        else:
            tl.store(k_cache + offs_cache, a.to(dtype).to(k_cache.dtype.element_ty), mask=mask)
            tl.store(k_cache + offs_cache + HALF, b.to(dtype).to(k_cache.dtype.element_ty), mask=mask)
        v_ptrs = v + token * stride_vt + head * stride_vh + offs_d[None, :]
        if v_scales is not None:
            va, vb = tl.load(v_ptrs, mask=mask, other=0.0), tl.load(v_ptrs + HALF, mask=mask, other=0.0)
            quantize_and_store(v_cache + offs_cache, v_scales + offs // HEAD_DIM, va, vb, mask, head_mask, HALF)
        else:
            for half in tl.static_range(2):
                x = tl.load(v_ptrs + half * HALF, mask=mask, other=0.0)
                tl.store(v_cache + offs_cache + half * HALF, x.to(v_cache.dtype.element_ty), mask=mask)


def qk_norm_rope_write_kv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, norms: tuple[torch.Tensor, torch.Tensor] | None,
    positions: torch.Tensor, slot_mapping: torch.Tensor, cos_sin_cache: torch.Tensor,
    k_cache: torch.Tensor | QuantizedKV, v_cache: torch.Tensor | QuantizedKV,
    *, eps: float = 0.0, offset: float = 0.0, pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Rotated q (T, Hq, d); writes k and v to `slot_mapping`. `norms`: weights (d,) of q and k. Raises BackendError."""
    tokens, heads, head_dim = q.shape
    kv_heads, half = k.shape[1], head_dim // 2
    k_cache, v_cache, *scales = check_cache(NAME, k_cache, v_cache)
    _check(q, k, v, positions, slot_mapping, cos_sin_cache, k_cache)
    q_norm, k_norm = norms or (q, q)
    norms_fit = norms is None or q_norm.shape == k_norm.shape == (head_dim,)
    check(NAME, norms_fit, f"norms {q_norm.shape}, {k_norm.shape}")
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    per_cta = min(16 if tokens >= MANY_TOKENS else 4, next_power_of_2(kv_heads))
    qk_norm_rope_write_kv_kernel[(tokens, triton.cdiv(heads, per_cta) + triton.cdiv(kv_heads, per_cta))](
        q, k, v, q_norm, k_norm, positions, slot_mapping, cos_sin_cache, q_out, k_cache, v_cache, *scales,
        float(eps), float(offset), cos_sin_cache.stride(0),
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3],
        HQ=heads, HK=kv_heads, HEAD_DIM=head_dim, HALF=half, HALF_PAD=next_power_of_2(half), HEADS_PER_CTA=per_cta,
        BLOCK_SIZE=k_cache.shape[1], HAS_NORM=norms is not None, PDL=pdl, num_warps=max(per_cta // 4, 1),
        launch_pdl=pdl,
    )  # fmt: skip
    return q_out


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, slot_mapping: torch.Tensor,
    cos_sin_cache: torch.Tensor, k_cache: torch.Tensor,
) -> None:  # fmt: skip
    head_dim = q.shape[2]
    check_tensors(NAME, q)
    check_tensors(NAME, k, v)
    check(NAME, q.dtype == k.dtype and head_dim % 2 == 0, f"q is {q.dtype} of {head_dim}, k is {k.dtype}")
    shapes = k_cache.shape[2:] == k.shape[1:] and k.shape[::2] == q.shape[::2]
    check(NAME, shapes, f"k {k.shape}, k_cache {k_cache.shape}")
    for ints in (positions, slot_mapping):
        check(NAME, ints.dtype == torch.int32 and ints.shape == (len(q),), "positions, slot_mapping: not int32 (T,)")
    table = cos_sin_cache.shape[::2] == (2, head_dim // 2) and cos_sin_cache.is_contiguous()
    check(NAME, table, f"cos_sin_cache {cos_sin_cache.shape}")
