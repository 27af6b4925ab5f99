"""Activations as 16-bit integers for dp2a, with the RMSNorm before them if there is one.

    x (M, K), any row stride   norm_weight (K,)
    -> codes int32 (M, K / 2): pairs, in the order of `triton_rows.py`; for a unit of 32 columns 16 words [o][h][w]
       scales float32 (M, 3, K / 32): scale, and scale times the sum of the codes of either half of a unit

x = code * scale, |code| <= 32767; relative error 2e-5. Sums are those of the rounded codes, so that a product with
weights (code - zero) * scale - min is exact in them. Bytes moved: x read, as much written.
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import check, check_tensors, next_power_of_2

NAME = "quantize_activations"
UNITS_PER_WARP = 8


@triton.jit
def quantize_activations_kernel(
    x, norm_weight, codes, scales, stride_xm, eps, weight_offset,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_U: tl.constexpr, HAS_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)[:, None, None]
    half, word = tl.arange(0, 2)[None, :, None], tl.arange(0, 8)[None, None, :]  # word: [h][w]
    column = unit * 32 + half * 16 + word // 4 + word % 4 * 2
    UNITS: tl.constexpr = K // 32
    mask = (unit < UNITS) & (half < 2) & (word < 8)
    if HAS_NORM:
        low_weight = tl.load(norm_weight + column, mask=mask, other=0.0).to(tl.float32) + weight_offset
        high_weight = tl.load(norm_weight + column + 8, mask=mask, other=0.0).to(tl.float32) + weight_offset
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x_ptrs = x + row * stride_xm + column
    low = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x_ptrs + 8, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        offs_k = tl.arange(0, BLOCK_K)  # each CTA reads the whole row
        whole = tl.load(x + row * stride_xm + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(whole * whole, 0) / K + eps)
        low = (low * inverse_rms * low_weight).to(x.dtype.element_ty).to(tl.float32)
        high = (high * inverse_rms * high_weight).to(x.dtype.element_ty).to(tl.float32)
    largest = tl.max(tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 2), 1)[:, None, None]
    scale = largest / 32767
    inverse = tl.where(largest > 0, 32767 / largest, 0.0)
    low, high = _round(low * inverse), _round(high * inverse)
    tl.store(codes + row * (K // 2) + unit * 16 + half * 8 + word, (low & 0xFFFF) | (high << 16), mask=mask)
    sums = tl.sum(low + high, 2, keep_dims=True).to(tl.float32) * scale  # (U, 2, 1)
    scale_ptrs = scales + row * (3 * UNITS) + unit
    tl.store(scale_ptrs, scale, mask=unit < UNITS)
    tl.store(scale_ptrs + (1 + half) * UNITS, sums, mask=(unit < UNITS) & (half < 2))


@triton.jit
def _round(x):
    """To the nearest int32, for |x| < 2^22: adding 1.5 * 2^23 leaves it in the lowest bits."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


def quantize_activations(
    x: torch.Tensor, norm_weight: torch.Tensor | None = None, *, eps: float = 0.0, offset: float = 0.0,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Codes and scales. Raises BackendError where 32 does not divide K."""
    check_tensors(NAME, x)
    m, k = x.shape
    check(NAME, k % 32 == 0, f"x {tuple(x.shape)}")
    check(NAME, norm_weight is None or norm_weight.shape == (k,), "norm_weight does not fit x")
    codes = torch.empty(m, k // 2, dtype=torch.int32, device=x.device)
    scales = torch.empty(m, 3, k // 32, dtype=torch.float32, device=x.device)
    warps = 1 if norm_weight is None else 4
    block_u = min(UNITS_PER_WARP * warps, next_power_of_2(k // 32))
    quantize_activations_kernel[m, triton.cdiv(k // 32, block_u)](
        x, x if norm_weight is None else norm_weight, codes, scales, x.stride(0), float(eps), float(offset),
        K=k, BLOCK_K=next_power_of_2(k), BLOCK_U=block_u, HAS_NORM=norm_weight is not None, PDL=pdl, num_warps=warps,
        launch_pdl=pdl,
    )  # fmt: skip
    return codes, scales
