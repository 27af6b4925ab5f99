"""GEMM on quantized weights for M = 2 to 512: unpacked in registers, multiplied by tensor cores.

    x (M, K), any row stride   w: planes of `triton_rows.py`, (N, K), or with ACT (2 N, K)   bias (len(w),)
    -> out (M, N), any row stride; or float32 (SPLIT_K, M, N): partial sums

As in `gemm_tma.py` the weights are the left operand: a CTA multiplies (BLOCK_N, BLOCK_K) of w with (BLOCK_K, BLOCK_M)
of x^T, over `k_per_split` columns. Codes come to shared memory as they are; unpacked weights never leave the
registers. Bytes moved: w once for each tile of x, x from L2 for each CTA.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.epilogue import epilogue
from llmrs.backends.torch.kernels.launch import check, check_tensors, dot_precision, next_power_of_2
from llmrs.backends.torch.kernels.quant_codes import load_line, load_words, unpack_part
from llmrs.backends.torch.kernels.quant_gemv import ACTS

NAME = "quant_gemm"
MAX_M = 512


@dataclass(frozen=True)
class QuantGemmConfig:
    """Tile sizes, split-K and Triton's launch options."""

    block_n: int
    block_m: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3
    split_warps: bool = False  # each warp multiplies block_k columns of its own, and all rows

    def splits(self, k: int) -> int:
        """Ranges of columns; none is empty."""
        return triton.cdiv(k, self.k_per_split(k))

    def k_per_split(self, k: int) -> int:
        step = self.block_k * (self.num_warps if self.split_warps else 1)
        return triton.cdiv(triton.cdiv(k, step), self.split_k) * step


@triton.jit(do_not_specialize=["M"])
def quant_gemm_kernel(
    x, low, high, scales, offsets, supers, row_scales, bias, out, M, N, stride_xm, stride_om, stride_os, k_per_split,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr,
    TABLE: tl.constexpr, SIGNED: tl.constexpr, FACTOR: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr,
    SCALE: tl.constexpr, OFFSET: tl.constexpr, SUPER: tl.constexpr, ROW_SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_m, start_n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    start_k = tl.program_id(2) * k_per_split
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M)[None, :], start_n + tl.arange(0, BLOCK_N)[:, None]
    row = tl.minimum(offs_n, N - 1).to(tl.int64)
    units = tl.arange(0, BLOCK_K // 32)[None, :]
    offs_k = tl.arange(0, BLOCK_K // 4)[:, None]
    offs_k = offs_k // 8 * 32 + offs_k % 8  # the first eight columns of each unit
    x_ptrs = x + tl.minimum(offs_m, M - 1).to(tl.int64) * stride_xm + offs_k
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(start_k // BLOCK_K, tl.cdiv(tl.minimum(start_k + k_per_split, K), BLOCK_K)):
        k, start = block * BLOCK_K, block * (BLOCK_K // 32)  # of known divisibility, so that loads are wide
        unit = start + units
        mask = unit < K // 32
        words = load_words(low, high, row, start, K, BLOCK_K // 32, LOW_BITS, HIGH_BITS)
        if ACT:
            up_words = load_words(low, high, row + N, start, K, BLOCK_K // 32, LOW_BITS, HIGH_BITS)
        for part in tl.static_range(4):  # eight columns of each unit
            if part % 2 == 0 and (part == 0 or GROUP == 16):
                scale, offset = load_line(scales, offsets, supers, row_scales, row, unit, part // 2, mask, K, GROUP,
                                          SCALE, OFFSET, SUPER, ROW_SCALE, ZERO)  # fmt: skip
                if ACT:
                    up_scale, up_offset = load_line(scales, offsets, supers, row_scales, row + N, unit, part // 2, mask,
                                                    K, GROUP, SCALE, OFFSET, SUPER, ROW_SCALE, ZERO)  # fmt: skip
            if K % BLOCK_K == 0:
                x_t = tl.load(x_ptrs + (k + 8 * part))
            else:
                x_t = tl.load(x_ptrs + (k + 8 * part), mask=k + offs_k < K, other=0.0)
            w = unpack_part(words, scale, offset, part, x.dtype.element_ty, LOW_BITS, HIGH_BITS, TABLE, SIGNED, FACTOR)
            acc = tl.dot(w, x_t, acc, input_precision=PRECISION)
            if ACT:
                up = unpack_part(up_words, up_scale, up_offset, part, x.dtype.element_ty, LOW_BITS, HIGH_BITS, TABLE,
                                 SIGNED, FACTOR)  # fmt: skip
                acc_up = tl.dot(up, x_t, acc_up, input_precision=PRECISION)
    out_ptrs = out + tl.program_id(2).to(tl.int64) * stride_os + offs_m.to(tl.int64) * stride_om + offs_n
    epilogue(acc, acc_up, offs_n, bias, 0.0, out_ptrs, (offs_n < N) & (offs_m < M), N, ACT, HAS_BIAS, False)


@triton.jit(do_not_specialize=["M"])
def quant_gemm_split_kernel(
    x, low, high, scales, offsets, supers, row_scales, bias, out, M, N, stride_xm, stride_om, stride_os, k_per_split,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, WARPS: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr, TABLE: tl.constexpr, SIGNED: tl.constexpr, FACTOR: tl.constexpr, ZERO: tl.constexpr,
    GROUP: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr, SUPER: tl.constexpr, ROW_SCALE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """As `quant_gemm_kernel`; each warp multiplies BLOCK_K columns of its own."""
    start_m, start_n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    start_k = tl.program_id(2) * k_per_split
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M)[None, :], start_n + tl.arange(0, BLOCK_N)[:, None]
    lines = tl.arange(0, WARPS * BLOCK_N)[:, None]  # [warp][n]
    row = tl.minimum(start_n + lines % BLOCK_N, N - 1).to(tl.int64)
    first = lines // BLOCK_N * (BLOCK_K // 32)
    units = first + tl.arange(0, BLOCK_K // 32)[None, :]
    offs_k = (
        tl.arange(0, WARPS)[:, None, None] * BLOCK_K
        + (tl.arange(0, BLOCK_K // 4) // 8 * 32 + tl.arange(0, BLOCK_K // 4) % 8)[None, :, None]
    )
    x_ptrs = x + tl.minimum(offs_m, M - 1).to(tl.int64)[None, :, :] * stride_xm + offs_k
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([WARPS, BLOCK_N, BLOCK_M], tl.float32)
    acc_up = tl.zeros([WARPS, BLOCK_N, BLOCK_M], tl.float32)
    STEP: tl.constexpr = WARPS * BLOCK_K
    for block in range(start_k // STEP, tl.cdiv(tl.minimum(start_k + k_per_split, K), STEP)):
        k, start = block * STEP, block * (STEP // 32) + first
        unit = block * (STEP // 32) + units
        mask = unit < K // 32
        words = load_words(low, high, row, start, K, BLOCK_K // 32, LOW_BITS, HIGH_BITS)
        if ACT:
            up_words = load_words(low, high, row + N, start, K, BLOCK_K // 32, LOW_BITS, HIGH_BITS)
        for part in tl.static_range(4):
            if part % 2 == 0 and (part == 0 or GROUP == 16):
                scale, offset = load_line(scales, offsets, supers, row_scales, row, unit, part // 2, mask, K, GROUP,
                                          SCALE, OFFSET, SUPER, ROW_SCALE, ZERO)  # fmt: skip
                if ACT:
                    up_scale, up_offset = load_line(scales, offsets, supers, row_scales, row + N, unit, part // 2, mask,
                                                    K, GROUP, SCALE, OFFSET, SUPER, ROW_SCALE, ZERO)  # fmt: skip
            if K % (WARPS * BLOCK_K) == 0:
                x_t = tl.load(x_ptrs + (k + 8 * part))
            else:
                x_t = tl.load(x_ptrs + (k + 8 * part), mask=k + offs_k < K, other=0.0)
            w = unpack_part(words, scale, offset, part, x.dtype.element_ty, LOW_BITS, HIGH_BITS, TABLE, SIGNED, FACTOR)
            acc = tl.dot(tl.reshape(w, [WARPS, BLOCK_N, BLOCK_K // 4]), x_t, acc, input_precision=PRECISION)
            if ACT:
                up = unpack_part(up_words, up_scale, up_offset, part, x.dtype.element_ty, LOW_BITS, HIGH_BITS, TABLE,
                                 SIGNED, FACTOR)  # fmt: skip
                acc_up = tl.dot(tl.reshape(up, [WARPS, BLOCK_N, BLOCK_K // 4]), x_t, acc_up, input_precision=PRECISION)
    out_ptrs = out + tl.program_id(2).to(tl.int64) * stride_os + offs_m.to(tl.int64) * stride_om + offs_n
    epilogue(tl.sum(acc, 0), tl.sum(acc_up, 0), offs_n, bias, 0.0, out_ptrs, (offs_n < N) & (offs_m < M), N, ACT,
             HAS_BIAS, False)  # fmt: skip


def quant_gemm_config(m: int, n: int, k: int, act: bool, splittable: bool) -> QuantGemmConfig:
    block_m, block_k = min(next_power_of_2(m, 16), 64), min(128 if act else 256, next_power_of_2(k))
    split = min(132 // max(triton.cdiv(n, 64) * triton.cdiv(m, block_m), 1), 4) if splittable else 1
    return QuantGemmConfig(64, block_m, block_k, max(split, 1))


def quant_gemm(
    x: torch.Tensor, planes: list[torch.Tensor | None], constants: dict[str, Any], out: torch.Tensor,
    bias: torch.Tensor | None = None, act: str = "", *, config: QuantGemmConfig, pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Into `out` (M, N), or float32 (SPLIT_K, M, N). Raises BackendError for shapes that do not fit."""
    check_tensors(NAME, x)
    (m, k), n = x.shape, out.shape[-1]
    splits = config.splits(k)
    check(NAME, splits == (len(out) if out.ndim == 3 else 1), f"{splits} splits, out {tuple(out.shape)}")
    check(NAME, splits == 1 or not (act or bias is not None), "split-K with an activation or a bias")
    grid = triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n), splits
    kernel = quant_gemm_split_kernel if config.split_warps else quant_gemm_kernel
    warps = {"WARPS": config.num_warps} if config.split_warps else {}
    kernel[grid](
        x, *planes, x if bias is None else bias, out, m, n, x.stride(0), out.stride(-2),
        out.stride(0) if out.ndim == 3 else 0, config.k_per_split(k), K=k, BLOCK_K=config.block_k,
        BLOCK_N=config.block_n, BLOCK_M=config.block_m, ACT=ACTS[act], HAS_BIAS=bias is not None,
        PRECISION=dot_precision(x.dtype), **warps, **constants, PDL=pdl, num_warps=config.num_warps,
        num_stages=config.num_stages, launch_pdl=pdl,
    )  # fmt: skip
    return out
