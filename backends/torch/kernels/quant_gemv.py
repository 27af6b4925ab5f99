# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005 - Triton adds tuples, and can't unpack them
"""GEMV on quantized weights for a few rows: out = [residual +] act(x @ w^T + bias), by dp2a on 16-bit activations.

    codes, scales of x: `quantize_activations`   w: planes of `triton_rows.py`, (N, K), or with ACT (2 N, K)
    bias (len(w),)   residual (M, N), any row stride   -> out (M, N), any row stride

Sums of code times code are exact within a unit of 32 columns, and float32 across units. A warp computes ROWS_PER_WARP
outputs for all M, BLOCK_U units at a time; a thread reads the 16 bytes of a 4-bit unit at once. As in `gemv.py` the
first tiles of w are loaded before `gdc_wait`, and the epilogue is the same. Bytes moved: w once.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.epilogue import epilogue
from llmrs.backends.torch.kernels.launch import check, next_power_of_2
from llmrs.backends.torch.kernels.quant_codes import dot_halves, load_quads, load_scales

NAME = "quant_gemv"
MAX_M = 4
ACTS = {"": 0, "silu_and_mul": 1, "gelu_and_mul": 2}


@dataclass(frozen=True)
class QuantGemvConfig:
    """Outputs per warp, units per tile, warps of a CTA, tiles that are loaded before x exists."""

    rows_per_warp: int
    block_u: int
    num_warps: int = 4
    prefetch: int = 1


@triton.jit
def _load_tile(
    low, high, scales, offsets, supers, row_scales, row, unit, K: tl.constexpr, LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr, TABLE: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr,
    SUPER: tl.constexpr, ROW_SCALE: tl.constexpr,
):  # fmt: skip
    """Quads of both halves, and their scales and offsets."""
    mask = unit < K // 32
    quads = load_quads(low, high, row, unit, mask, K, LOW_BITS, HIGH_BITS, TABLE)
    first = load_scales(
        scales, offsets, supers, row_scales, row, unit, 0, mask, K, GROUP, SCALE, OFFSET, SUPER, ROW_SCALE
    )
    second = first
    if GROUP == 16:
        second = load_scales(
            scales, offsets, supers, row_scales, row, unit, 1, mask, K, GROUP, SCALE, OFFSET, SUPER, ROW_SCALE
        )
    return quads[0], quads[1], first[0], first[1], second[0], second[1]


@triton.jit
def _product(
    tile, x_ptrs, scale_ptrs, mask, K: tl.constexpr, SIGNED: tl.constexpr, FACTOR: tl.constexpr, ZERO: tl.constexpr,
    GROUP: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Products of a tile of w with a row of x, summed over each unit: float32 (ROWS_PER_WARP, WARPS, BLOCK_U)."""
    UNITS: tl.constexpr = K // 32
    a, b = dot_halves(tile[0], tile[1], x_ptrs, mask, SIGNED)
    x_scale = tl.load(scale_ptrs, mask=mask, other=0.0) * FACTOR
    x_first = tl.load(scale_ptrs + UNITS, mask=mask, other=0.0)
    x_second = tl.load(scale_ptrs + 2 * UNITS, mask=mask, other=0.0)
    if GROUP == 16:
        first = _scaled(tl.sum(a, 3, keep_dims=True), x_scale, x_first, tile[2], tile[3], ZERO, OFFSET)
        second = _scaled(tl.sum(b, 3, keep_dims=True), x_scale, x_second, tile[4], tile[5], ZERO, OFFSET)
        return first + second
    return _scaled(tl.sum(a + b, 3, keep_dims=True), x_scale, x_first + x_second, tile[2], tile[3], ZERO, OFFSET)


@triton.jit
def _scaled(total, x_scale, x_sum, scale, offset, ZERO: tl.constexpr, OFFSET: tl.constexpr):
    product = total.to(tl.float32) * x_scale
    if ZERO:
        product -= ZERO * x_sum
    if OFFSET == "zero":
        product -= offset * x_sum
    product *= scale
    if OFFSET == "bias":
        product += offset * x_sum
    if OFFSET == "min":
        product -= offset * x_sum
    return product


@triton.jit(do_not_specialize=["M"])
def quant_gemv_kernel(
    x, x_scales, low, high, scales, offsets, supers, row_scales, bias, residual, out, M, N, stride_rm, stride_om,
    K: tl.constexpr, BLOCK_U: tl.constexpr, NUM_TILES: tl.constexpr, PREFETCH: tl.constexpr,
    ROWS_PER_WARP: tl.constexpr, WARPS: tl.constexpr, BLOCK_M: tl.constexpr, ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr,
    TABLE: tl.constexpr, SIGNED: tl.constexpr, FACTOR: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr,
    SCALE: tl.constexpr, OFFSET: tl.constexpr, SUPER: tl.constexpr, ROW_SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    UNITS: tl.constexpr = K // 32
    offs_n = (tl.program_id(0) * ROWS_PER_WARP + tl.arange(0, ROWS_PER_WARP)[:, None]) * WARPS
    offs_n += tl.arange(0, WARPS)[None, :]
    row = tl.minimum(offs_n, N - 1).to(tl.int64)[:, :, None, None]
    units = tl.arange(0, BLOCK_U)[None, None, :, None] + tl.zeros([1, WARPS, 1, 1], tl.int32)
    tiles, up_tiles = (), ()
    for t in tl.static_range(PREFETCH):
        at = t * BLOCK_U + units
        tiles = tiles + (_load_tile(low, high, scales, offsets, supers, row_scales, row, at, K, LOW_BITS, HIGH_BITS,
                                    TABLE, GROUP, SCALE, OFFSET, SUPER, ROW_SCALE),)  # fmt: skip
        if ACT:
            up_tiles = up_tiles + (_load_tile(low, high, scales, offsets, supers, row_scales, row + N, at, K, LOW_BITS,
                                              HIGH_BITS, TABLE, GROUP, SCALE, OFFSET, SUPER, ROW_SCALE),)  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    residuals, acc, acc_up = (), (), ()
    for m in tl.static_range(BLOCK_M):
        if HAS_RESIDUAL:
            res_ptrs = residual + tl.minimum(m, M - 1).to(tl.int64) * stride_rm + offs_n
            residuals = residuals + (tl.load(res_ptrs, mask=offs_n < N, other=0.0),)
        acc = acc + (tl.zeros([ROWS_PER_WARP, WARPS, BLOCK_U, 1], tl.float32),)
        acc_up = acc_up + (tl.zeros([ROWS_PER_WARP, WARPS, BLOCK_U, 1], tl.float32),)
    for t in tl.static_range(NUM_TILES):
        unit = t * BLOCK_U + units
        tile = tiles[t] if t < PREFETCH else _load_tile(
            low, high, scales, offsets, supers, row_scales, row, unit, K, LOW_BITS, HIGH_BITS, TABLE, GROUP, SCALE,
            OFFSET, SUPER, ROW_SCALE)  # fmt: skip
        if ACT:
            up = up_tiles[t] if t < PREFETCH else _load_tile(
                low, high, scales, offsets, supers, row_scales, row + N, unit, K, LOW_BITS, HIGH_BITS, TABLE, GROUP,
                SCALE, OFFSET, SUPER, ROW_SCALE)  # fmt: skip
        new_acc, new_up = (), ()
        for m in tl.static_range(BLOCK_M):
            at = tl.minimum(m, M - 1).to(tl.int64)
            x_ptrs = x + at * (K // 2) + unit * 16 + tl.arange(0, 4)
            scale_ptrs = x_scales + at * (3 * UNITS) + unit
            new_acc = new_acc + (
                acc[m] + _product(tile, x_ptrs, scale_ptrs, unit < UNITS, K, SIGNED, FACTOR, ZERO, GROUP, OFFSET),
            )
            if ACT:
                new_up = new_up + (
                    acc_up[m] + _product(up, x_ptrs, scale_ptrs, unit < UNITS, K, SIGNED, FACTOR, ZERO, GROUP, OFFSET),
                )
            else:
                new_up = new_up + (acc_up[m],)
        acc, acc_up = new_acc, new_up
    for m in tl.static_range(BLOCK_M):
        out_ptrs = out + tl.minimum(m, M - 1).to(tl.int64) * stride_om + offs_n
        total = tl.sum(tl.reshape(acc[m], [ROWS_PER_WARP, WARPS, BLOCK_U]), 2)
        total_up = tl.sum(tl.reshape(acc_up[m], [ROWS_PER_WARP, WARPS, BLOCK_U]), 2)
        epilogue(total, total_up, offs_n, bias, residuals[m] if HAS_RESIDUAL else 0.0, out_ptrs,
                 (offs_n < N) & (m < M), N, ACT, HAS_BIAS, HAS_RESIDUAL)  # fmt: skip


def quant_gemv_config(m: int, n: int, k: int, act: bool) -> QuantGemvConfig:
    units = k // 32
    block_u = min(next_power_of_2(units), 32)
    return QuantGemvConfig(1 if act or m > 1 else 2, block_u)


def quant_gemv(
    codes: torch.Tensor, x_scales: torch.Tensor, planes: list[torch.Tensor | None], constants: dict[str, Any],
    out: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None, act: str = "",
    *, config: QuantGemvConfig | None = None, pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Into `out` (M, N). Raises BackendError for an M that is too large."""
    (m, n), k = out.shape, 2 * codes.shape[1]
    check(NAME, m <= MAX_M, f"M = {m}")
    config = config or quant_gemv_config(m, n, k, bool(act))
    tiles = triton.cdiv(k // 32, config.block_u)
    residual_or_out = out if residual is None else residual
    quant_gemv_kernel[(triton.cdiv(n, config.rows_per_warp * config.num_warps),)](
        codes, x_scales, *planes, out if bias is None else bias, residual_or_out, out, m, n,
        residual_or_out.stride(0), out.stride(0), K=k, BLOCK_U=config.block_u, NUM_TILES=tiles,
        PREFETCH=min(config.prefetch, tiles), ROWS_PER_WARP=config.rows_per_warp, WARPS=config.num_warps,
        BLOCK_M=next_power_of_2(m), ACT=ACTS[act], HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        **constants, PDL=pdl, num_warps=config.num_warps, launch_pdl=pdl,
    )  # fmt: skip
    return out
