"""What kernels share whose KV cache is in fp8: how it is widened, a head's scale, and rounding to e4m3.

Defined by backends/reference/kv_fp8.py. The rounding is done here, in float32, so that the cast to e4m3 that follows is
exact: Triton's interpreter would do it wrong.
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import require

LARGEST = tl.constexpr(448.0)
TINY = tl.constexpr(2.0**-100)
LEAST_NORMAL = tl.constexpr(2.0**-6)
SMALL_STEP = tl.constexpr(2.0**-9)
ROUNDS = tl.constexpr(1.5 * 2.0**23)  # added to a small float32 and taken off again, it leaves a whole number


@triton.jit
def in_half(q, scale):
    """Queries (R, d), in float16 unless they are float32, and what their scores are then times (R, 1).

    One instruction widens two e4m3 numbers to float16, and bfloat16 takes one more for each. A row that is divided by
    its largest fits into float16 and loses nothing.
    """
    kind: tl.constexpr = tl.float32 if q.dtype == tl.float32 else tl.float16
    wide = q.to(tl.float32)
    peak = tl.maximum(tl.max(tl.abs(wide), 1, keep_dims=True), TINY)
    return (wide / peak).to(kind), scale * peak


@triton.jit
def shares(scales):
    """Scales over their largest, and that: float16 holds a probability times the one, not always times a scale."""
    peak = tl.max(scales, 0)
    return scales * tl.where(peak > 0, 1 / peak, 0.0), peak


@triton.jit
def rounded(x):
    """The nearest e4m3 numbers, of two the even one, of x up to 448."""
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0x7FF00000  # 3 bits of 23 stay
    small = (size * (1 / SMALL_STEP) + ROUNDS - ROUNDS) * SMALL_STEP
    size = tl.where(size < LEAST_NORMAL, small, bits.to(tl.float32, bitcast=True))
    return tl.where(x < 0, -size, size)


@triton.jit
def store_scaled(codes, scales, a, b, there, heads, HALF: tl.constexpr):
    """Stores heads, given as halves a and b (n, d / 2): in e4m3 where `codes` points to for a, with scales (n, 1).

    `there` masks the elements, and `heads` (n, 1) the heads.
    """
    a, b = a.to(tl.float32), b.to(tl.float32)
    most = tl.max(tl.maximum(tl.abs(a), tl.abs(b)), 1, keep_dims=True)
    most += tl.sum((a - a) + (b - b), 1, keep_dims=True)  # 0, or NaN where anything is not finite
    inverse = tl.where(most < TINY, 0.0, tl.div_rn(tl.full(most.shape, LARGEST, tl.float32), most))
    scale = tl.where(most < TINY, 0.0, tl.div_rn(most, tl.full(most.shape, LARGEST, tl.float32)))
    tl.store(scales, scale, mask=heads)
    tl.store(codes, rounded(a * inverse).to(codes.dtype.element_ty), mask=there)
    tl.store(codes + HALF, rounded(b * inverse).to(codes.dtype.element_ty), mask=there)


def check_scales(kernel: str, codes: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Kernels find a scale where its codes are, over d. Raises BackendError."""
    if scales is not None:
        places = tuple(n / codes.shape[3] for n in codes.stride()[:3])
        require(kernel, scales.dtype == torch.float32 and scales.stride() == places, f"scales at {scales.stride()}")
