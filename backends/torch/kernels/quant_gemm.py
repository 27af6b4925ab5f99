"""GEMM on quantized weights for small M: unpacked in registers, multiplied by tensor cores.

    x (M, K), any row stride   w: planes of `triton_rows.py`, (N, K)   bias (N,)
    -> out (M, N), any row stride; or float32 (SPLIT_K, M, N): partial sums

As in `gemm_tma.py` the weights are the left operand: a CTA multiplies (BLOCK_N, BLOCK_K) of w with (BLOCK_K, BLOCK_M)
of x^T, over `k_per_split` columns. Codes of two tiles are on their way in registers while one is unpacked; the
unpacked tile goes through shared memory, since MMAs with operands in registers wait for each other (docs/log.md).
Bytes moved: w once for each tile of x, x from L2 for each CTA.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.epilogue import epilogue
from llmrs.backends.torch.kernels.launch import check, check_tensors, dot_precision, next_power_of_2
from llmrs.backends.torch.kernels.quant_codes import load_words, unpack_part
from llmrs.backends.torch.kernels.quant_scales import line_of, load_scale_bits

NAME = "quant_gemm"
NUM_SMS = 132  # of an H100


@dataclass(frozen=True)
class QuantGemmConfig:
    """Tile sizes, split-K and Triton's launch options."""

    block_n: int
    block_m: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3

    def splits(self, k: int) -> int:
        """Ranges of columns; none is empty."""
        return triton.cdiv(k, self.k_per_split(k))

    def k_per_split(self, k: int) -> int:
        return triton.cdiv(triton.cdiv(k, self.block_k), self.split_k) * self.block_k


@triton.jit
def _load(low, high, scales, offsets, supers, row_scales, row, block, K: tl.constexpr, BLOCK_K: tl.constexpr,
          LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
          SUPER: tl.constexpr, ROW_SCALE: tl.constexpr):  # fmt: skip
    """Words of a tile, and scales of the first and of the second half of each unit, as they are in memory."""
    UNITS: tl.constexpr = BLOCK_K // 32
    start = block * UNITS  # of known divisibility, so that loads are wide
    unit = start + tl.arange(0, UNITS)[None, :]
    mask = unit < K // 32
    words = load_words(low, high, row, start, K, UNITS, LOW_BITS, HIGH_BITS)
    first = load_scale_bits(scales, offsets, supers, row_scales, row, unit, 0, mask, K, GROUP, OFFSET, SUPER, ROW_SCALE)
    second = first
    if GROUP == 16:
        second = load_scale_bits(scales, offsets, supers, row_scales, row, unit, 1, mask, K, GROUP, OFFSET, SUPER,
                                 ROW_SCALE)  # fmt: skip
    return words, first, second


@triton.jit
def _unpack(tile, dtype: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, TABLE: tl.constexpr,
            SIGNED: tl.constexpr, FACTOR: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr,
            OFFSET: tl.constexpr, SUPER: tl.constexpr, ROW_SCALE: tl.constexpr):  # fmt: skip
    """A tile of weights, (BLOCK_N, BLOCK_K)."""
    scale, offset = line_of(tile[1], SCALE, OFFSET, SUPER, ROW_SCALE, ZERO)
    a = unpack_part(tile[0], scale, offset, 0, dtype, LOW_BITS, HIGH_BITS, TABLE, SIGNED, FACTOR)
    b = unpack_part(tile[0], scale, offset, 1, dtype, LOW_BITS, HIGH_BITS, TABLE, SIGNED, FACTOR)
    if GROUP == 16:
        scale, offset = line_of(tile[2], SCALE, OFFSET, SUPER, ROW_SCALE, ZERO)
    c = unpack_part(tile[0], scale, offset, 2, dtype, LOW_BITS, HIGH_BITS, TABLE, SIGNED, FACTOR)
    d = unpack_part(tile[0], scale, offset, 3, dtype, LOW_BITS, HIGH_BITS, TABLE, SIGNED, FACTOR)
    parts = tl.join(tl.join(a, c), tl.join(b, d))  # (BLOCK_N, 8 U, half, eight)
    parts = tl.reshape(parts, [a.shape[0], a.shape[1] // 8, 8, 2, 2])
    return tl.reshape(tl.permute(parts, (0, 1, 3, 4, 2)), [a.shape[0], a.shape[1] * 4])


@triton.jit(do_not_specialize=["M"])
def quant_gemm_kernel(
    x, low, high, scales, offsets, supers, row_scales, bias, out, M, N, stride_xm, stride_om, stride_os, k_per_split,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, TABLE: tl.constexpr,
    SIGNED: tl.constexpr, FACTOR: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr,
    OFFSET: tl.constexpr, SUPER: tl.constexpr, ROW_SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_m, start_n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    start_k = tl.program_id(2) * k_per_split
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M)[None, :], start_n + tl.arange(0, BLOCK_N)[:, None]
    row = tl.minimum(offs_n, N - 1).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)[:, None]
    x_ptrs = x + tl.minimum(offs_m, M - 1).to(tl.int64) * stride_xm + offs_k
    begin, end = start_k // BLOCK_K, tl.cdiv(tl.minimum(start_k + k_per_split, K), BLOCK_K)
    dtype: tl.constexpr = x.dtype.element_ty
    tile = _load(low, high, scales, offsets, supers, row_scales, row, begin, K, BLOCK_K, LOW_BITS, HIGH_BITS, GROUP,
                 OFFSET, SUPER, ROW_SCALE)  # fmt: skip
    next_tile = _load(low, high, scales, offsets, supers, row_scales, row, begin + 1, K, BLOCK_K, LOW_BITS, HIGH_BITS,
                      GROUP, OFFSET, SUPER, ROW_SCALE)  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    w = _unpack(tile, dtype, LOW_BITS, HIGH_BITS, TABLE, SIGNED, FACTOR, ZERO, GROUP, SCALE, OFFSET, SUPER, ROW_SCALE)
    for block in range(begin, end):
        k = block * BLOCK_K
        x_t = tl.load(x_ptrs + k) if K % BLOCK_K == 0 else tl.load(x_ptrs + k, mask=k + offs_k < K, other=0.0)
        # the loop carries w, so that tensor cores read it from shared memory, and the next is unpacked meanwhile
        acc = tl.dot(w, x_t, acc, input_precision=PRECISION)
        tile = next_tile
        next_tile = _load(low, high, scales, offsets, supers, row_scales, row, block + 2, K, BLOCK_K, LOW_BITS,
                          HIGH_BITS, GROUP, OFFSET, SUPER, ROW_SCALE)  # fmt: skip
        w = _unpack(tile, dtype, LOW_BITS, HIGH_BITS, TABLE, SIGNED, FACTOR, ZERO, GROUP, SCALE, OFFSET, SUPER,
                    ROW_SCALE)  # fmt: skip
    out_ptrs = out + tl.program_id(2).to(tl.int64) * stride_os + offs_m.to(tl.int64) * stride_om + offs_n
    epilogue(acc, acc, offs_n, bias, 0.0, out_ptrs, (offs_n < N) & (offs_m < M), N, 0, HAS_BIAS, False)


@triton.jit
def reduce_splits_kernel(
    partial, bias, out, N, stride_ps, stride_om, SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row, offs_n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([BLOCK_N], tl.float32)
    for s in tl.static_range(SPLIT_K):
        total += tl.load(partial + s * stride_ps + row * N + offs_n, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + offs_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * stride_om + offs_n, total.to(out.dtype.element_ty), mask=mask)


def reduce_splits(
    partial: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None = None, *, pdl: bool = False
) -> torch.Tensor:
    """The sum of partial sums float32 (SPLIT_K, M, N), contiguous: (M, N)."""
    splits, m, n = partial.shape
    out = torch.empty(m, n, dtype=dtype, device=partial.device)
    reduce_splits_kernel[m, triton.cdiv(n, 1024)](
        partial, out if bias is None else bias, out, n, partial.stride(0), n, SPLIT_K=splits, BLOCK_N=1024,
        HAS_BIAS=bias is not None, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return out


def quant_gemm_config(m: int, n: int, k: int, *, async_mma: bool = True) -> QuantGemmConfig:
    """As measured on an H200; split-K up to four CTAs for each SM. Without `async_mma` tiles of x are smaller."""
    block_m = min(next_power_of_2(m, 16), 256 if async_mma else 128)
    block_k = min(128 if block_m < 256 else 64, next_power_of_2(k))
    wide = block_m == 64 and n <= 4096  # few rows: larger tiles read x less often
    block_n, warps = (128, 8) if wide else (64, 4)
    ctas = triton.cdiv(n, block_n) * triton.cdiv(m, block_m)
    split = max(min(4 * NUM_SMS // ctas, 4, k // 512), 1)
    stages = 4 if block_m <= 32 else 2 if block_m == 64 and not wide else 3
    return QuantGemmConfig(block_n, block_m, block_k, 1 << split.bit_length() - 1, warps, stages)


def quant_gemm(
    x: torch.Tensor, planes: list[torch.Tensor | None], constants: dict[str, Any], out: torch.Tensor,
    bias: torch.Tensor | None = None, *, config: QuantGemmConfig, pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Into `out` (M, N), or float32 (SPLIT_K, M, N). Raises BackendError for shapes that do not fit."""
    check_tensors(NAME, x)
    (m, k), n = x.shape, out.shape[-1]
    splits = config.splits(k)
    check(NAME, splits == (len(out) if out.ndim == 3 else 1), f"{splits} splits, out {tuple(out.shape)}")
    check(NAME, splits == 1 or bias is None, "split-K with a bias")
    grid = triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n), splits
    quant_gemm_kernel[grid](
        x, *planes, x if bias is None else bias, out, m, n, x.stride(0), out.stride(-2),
        out.stride(0) if out.ndim == 3 else 0, config.k_per_split(k), K=k, BLOCK_K=config.block_k,
        BLOCK_N=config.block_n, BLOCK_M=config.block_m, HAS_BIAS=bias is not None,
        PRECISION=dot_precision(x.dtype), **constants, PDL=pdl, num_warps=config.num_warps,
        num_stages=config.num_stages, launch_pdl=pdl,
    )  # fmt: skip
    return out
