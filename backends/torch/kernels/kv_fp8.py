"""Device functions for a KV cache in fp8: dequantization, a head's scale, rounding to e4m3.

Defined by backends/reference/kv_fp8.py. Values are rounded in float32, so that the cast to e4m3 is exact: Triton's
interpreter casts wrongly.
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import KV_DTYPES, check, check_tensors
from llmrs.backends.torch.kv_fp8 import QuantizedKV, unpack

MAX_E4M3 = tl.constexpr(448.0)
TINY = tl.constexpr(2.0**-100)
MIN_NORMAL = tl.constexpr(2.0**-6)
SUBNORMAL_STEP = tl.constexpr(2.0**-9)
TO_INTEGER = tl.constexpr(1.5 * 2.0**23)  # adding and subtracting it rounds a small float32 to an integer


@triton.jit
def scale_q_to_fp16(q, scale):
    """q (BLOCK_M, d) in float16 unless it is float32, and the factor of its scores (BLOCK_M, 1).

    One instruction converts two e4m3 numbers to float16; bfloat16 takes one more for each. A row divided by its
    largest element fits into float16 without loss.
    """
    dtype: tl.constexpr = tl.float32 if q.dtype == tl.float32 else tl.float16
    wide = q.to(tl.float32)
    peak = tl.maximum(tl.max(tl.abs(wide), 1, keep_dims=True), TINY)
    return (wide / peak).to(dtype), scale * peak


@triton.jit
def fold_v_scales(scales):
    """Scales over their largest, and the largest: float16 holds p * the first, not always p * a scale."""
    peak = tl.max(scales, 0)
    return scales * tl.where(peak > 0, 1 / peak, 0.0), peak


@triton.jit
def round_to_e4m3(x):
    """The nearest e4m3 numbers, ties to even, of |x| <= 448."""
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0x7FF00000  # 3 of 23 mantissa bits stay
    subnormal = (magnitude * (1 / SUBNORMAL_STEP) + TO_INTEGER - TO_INTEGER) * SUBNORMAL_STEP
    magnitude = tl.where(magnitude < MIN_NORMAL, subnormal, bits.to(tl.float32, bitcast=True))
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def quantize_and_store(data, scales, a, b, mask, head_mask, HALF: tl.constexpr):
    """Stores heads, given as halves a and b (n, d / 2): e4m3 at `data` and data + HALF, scales (n, 1) at `scales`."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    peak = tl.max(tl.maximum(tl.abs(a), tl.abs(b)), 1, keep_dims=True)
    peak += tl.sum((a - a) + (b - b), 1, keep_dims=True)  # 0, or NaN for a head that is not finite
    max_e4m3 = tl.full(peak.shape, MAX_E4M3, tl.float32)
    inverse = tl.where(peak < TINY, 0.0, tl.div_rn(max_e4m3, peak))
    scale = tl.where(peak < TINY, 0.0, tl.div_rn(peak, max_e4m3))
    tl.store(scales, scale, mask=head_mask)
    tl.store(data, round_to_e4m3(a * inverse).to(data.dtype.element_ty), mask=mask)
    tl.store(data + HALF, round_to_e4m3(b * inverse).to(data.dtype.element_ty), mask=mask)


def check_cache(
    kernel: str, k_cache: torch.Tensor | QuantizedKV, v_cache: torch.Tensor | QuantizedKV
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """K, V and their scales, if any, whose offsets are those of the data over d. Raises BackendError."""
    (k, k_scales), (v, v_scales) = unpack(k_cache), unpack(v_cache)
    for data, scales in ((k, k_scales), (v, v_scales)):
        if scales is not None:
            strides = tuple(n / data.shape[3] for n in data.stride()[:3])
            check(kernel, scales.dtype == torch.float32 and scales.stride() == strides, f"scales at {scales.stride()}")
    check_tensors(kernel, k, v, dtypes=KV_DTYPES)
    check(kernel, k.stride() == v.stride(), "k_cache and v_cache differ in strides")
    return k, v, k_scales, v_scales
