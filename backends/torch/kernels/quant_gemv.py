# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005 - Triton adds tuples, and can't unpack them
"""GEMV on quantized weights for a few rows: out = [residual +] act(x @ w^T + bias), by dp2a on 16-bit activations.

    codes, scales of x: `quantize_activations`   w: planes of `triton_rows.py`, (N, K), or with ACT (2 N, K)
    bias (len(w),)   residual (M, N), any row stride   -> out (M, N), any row stride

Sums of code times code are exact within a unit of 32 columns, and float32 across units. A CTA computes ROWS outputs one
after the other, while the weights of the next PREFETCH rows are on their way; x stays in registers. Its warps share a
row, a thread takes a unit at a time. The first rows of w are loaded before `gdc_wait`. Bytes moved: w once.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.epilogue import epilogue
from llmrs.backends.torch.kernels.launch import check, next_power_of_2
from llmrs.backends.torch.kernels.quant_codes import dot_unit, load_unit, load_x
from llmrs.backends.torch.kernels.quant_scales import load_scale_bits, scale_of

NAME = "quant_gemv"
MAX_M = 4
ACTS = {"": 0, "silu_and_mul": 1, "gelu_and_mul": 2}


@dataclass(frozen=True)
class QuantGemvConfig:
    """Outputs per CTA, warps, rows that are loaded ahead."""

    rows: int
    num_warps: int
    prefetch: int


@triton.jit
def _load_row(
    low, high, scales, offsets, supers, row_scales, row, K: tl.constexpr, BLOCK_U: tl.constexpr,
    LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, SUPER: tl.constexpr,
    ROW_SCALE: tl.constexpr,
):  # fmt: skip
    """For each tile of a row: words, and scales of the first and of the second half of each unit."""
    tiles = ()
    for t in tl.static_range((K // 32 + BLOCK_U - 1) // BLOCK_U):
        unit = t * BLOCK_U + tl.arange(0, BLOCK_U)
        mask = unit < K // 32
        words = load_unit(low, high, row, unit, mask, K, LOW_BITS, HIGH_BITS)
        first = load_scale_bits(scales, offsets, supers, row_scales, row, unit, 0, mask, K, GROUP, OFFSET, SUPER,
                                ROW_SCALE)  # fmt: skip
        second = first
        if GROUP == 16:
            second = load_scale_bits(scales, offsets, supers, row_scales, row, unit, 1, mask, K, GROUP, OFFSET, SUPER,
                                     ROW_SCALE)  # fmt: skip
        tiles = tiles + ((words, first, second),)
    return tiles


@triton.jit
def _dot_row(
    tiles, x, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, TABLE: tl.constexpr, SIGNED: tl.constexpr,
    FACTOR: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr,
    SUPER: tl.constexpr, ROW_SCALE: tl.constexpr,
):  # fmt: skip
    """A row of w times a row of x, summed over each thread's units: float32 (BLOCK_U,)."""
    total = x[0][16] * 0
    for t in tl.static_range(len(tiles)):
        words, x_tile = tiles[t][0], x[t]
        a, b = dot_unit(words, x_tile, LOW_BITS, HIGH_BITS, TABLE, SIGNED)
        scale, offset = scale_of(tiles[t][1], SCALE, OFFSET, SUPER, ROW_SCALE)
        if GROUP == 16:
            total = _add_scaled(total, a, x_tile[16], x_tile[17], scale, offset, FACTOR, ZERO, OFFSET)
            scale, offset = scale_of(tiles[t][2], SCALE, OFFSET, SUPER, ROW_SCALE)
            total = _add_scaled(total, b, x_tile[16], x_tile[18], scale, offset, FACTOR, ZERO, OFFSET)
        else:
            x_sum = x_tile[17] + x_tile[18]
            total = _add_scaled(total, a + b, x_tile[16], x_sum, scale, offset, FACTOR, ZERO, OFFSET)
    return total


@triton.jit
def _add_scaled(
    total, dot, x_scale, x_sum, scale, offset, FACTOR: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr
):
    product = dot.to(tl.float32) * (x_scale * FACTOR)
    if ZERO:
        product -= ZERO * x_sum
    if OFFSET == "zero":
        product -= offset * x_sum
    total += product * scale
    if OFFSET == "bias":
        total += offset * x_sum
    if OFFSET == "min":
        total -= offset * x_sum
    return total


@triton.jit
def _sums(rows):
    """Sums of 1, 2, 4 or 8 tensors (BLOCK_U,): (len(rows),)."""
    if len(rows) == 1:
        stacked = rows[0][:, None]
    elif len(rows) == 2:
        stacked = tl.join(rows[0], rows[1])
    elif len(rows) == 4:
        stacked = tl.join(tl.join(rows[0], rows[2]), tl.join(rows[1], rows[3]))
    else:
        even = tl.join(tl.join(rows[0], rows[4]), tl.join(rows[2], rows[6]))
        stacked = tl.join(even, tl.join(tl.join(rows[1], rows[5]), tl.join(rows[3], rows[7])))
    return tl.sum(tl.reshape(stacked, [stacked.shape[0], len(rows)]), 0)


@triton.jit(do_not_specialize=["M"])
def quant_gemv_kernel(
    x, x_scales, low, high, scales, offsets, supers, row_scales, bias, residual, out, M, N, stride_rm, stride_om,
    K: tl.constexpr, BLOCK_U: tl.constexpr, ROWS: tl.constexpr, PREFETCH: tl.constexpr, BLOCK_M: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr, TABLE: tl.constexpr, SIGNED: tl.constexpr, FACTOR: tl.constexpr, ZERO: tl.constexpr,
    GROUP: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr, SUPER: tl.constexpr, ROW_SCALE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) * ROWS
    SIDES: tl.constexpr = 2 if ACT else 1  # gate and up
    loaded = ()
    for r in tl.static_range(PREFETCH):
        row = tl.minimum(first_row + r // SIDES, N - 1).to(tl.int64) + r % SIDES * N
        loaded = loaded + (_load_row(low, high, scales, offsets, supers, row_scales, row, K, BLOCK_U, LOW_BITS,
                                     HIGH_BITS, GROUP, OFFSET, SUPER, ROW_SCALE),)  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    xs, sums, up_sums = (), (), ()
    for m in tl.static_range(BLOCK_M):
        xs = xs + (load_x(x, x_scales, tl.minimum(m, M - 1).to(tl.int64), K, BLOCK_U),)
        sums, up_sums = sums + ((),), up_sums + ((),)
    for r in tl.static_range(ROWS * SIDES):
        if r + PREFETCH < ROWS * SIDES:
            row = tl.minimum(first_row + (r + PREFETCH) // SIDES, N - 1).to(tl.int64) + (r + PREFETCH) % SIDES * N
            loaded = loaded + (_load_row(low, high, scales, offsets, supers, row_scales, row, K, BLOCK_U, LOW_BITS,
                                         HIGH_BITS, GROUP, OFFSET, SUPER, ROW_SCALE),)  # fmt: skip
        new_sums, new_up = (), ()
        for m in tl.static_range(BLOCK_M):
            dot = _dot_row(loaded[r], xs[m], LOW_BITS, HIGH_BITS, TABLE, SIGNED, FACTOR, ZERO, GROUP, SCALE, OFFSET,
                           SUPER, ROW_SCALE)  # fmt: skip
            if r % SIDES == 0:
                new_sums, new_up = new_sums + (sums[m] + (dot,),), new_up + (up_sums[m],)
            else:
                new_sums, new_up = new_sums + (sums[m],), new_up + (up_sums[m] + (dot,),)
        sums, up_sums = new_sums, new_up
    offs_n = first_row + tl.arange(0, ROWS)
    for m in tl.static_range(BLOCK_M):
        at = tl.minimum(m, M - 1).to(tl.int64)
        total = _sums(sums[m])
        total_up = _sums(up_sums[m]) if ACT else total
        added = 0.0
        if HAS_RESIDUAL:
            added = tl.load(residual + at * stride_rm + offs_n, mask=offs_n < N, other=0.0)
        epilogue(total, total_up, offs_n, bias, added, out + at * stride_om + offs_n, (offs_n < N) & (m < M), N, ACT,
                 HAS_BIAS, HAS_RESIDUAL)  # fmt: skip


def quant_gemv_config(m: int, n: int, k: int, act: bool) -> QuantGemvConfig:
    """At most three units of a row per thread, whose x fits into registers; as measured on an H200."""
    warps = min(next_power_of_2(triton.cdiv(k, 32 * 96)), 8)
    if m == 1 and n >= 4096:
        return QuantGemvConfig(4, warps, 8) if act else QuantGemvConfig(8, warps, 6 if warps <= 2 else 4)
    return QuantGemvConfig(4, warps, 4)


def quant_gemv(
    codes: torch.Tensor, x_scales: torch.Tensor, planes: list[torch.Tensor | None], constants: dict[str, Any],
    out: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None, act: str = "",
    *, config: QuantGemvConfig | None = None, pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Into `out` (M, N). Raises BackendError for an M that is too large."""
    (m, n), k = out.shape, 2 * codes.shape[1]
    check(NAME, m <= MAX_M, f"M = {m}")
    config = config or quant_gemv_config(m, n, k, bool(act))
    rows = config.rows * (2 if act else 1)
    added = out if residual is None else residual
    quant_gemv_kernel[(triton.cdiv(n, config.rows),)](
        codes, x_scales, *planes, out if bias is None else bias, added, out, m, n, added.stride(0), out.stride(0),
        K=k, BLOCK_U=min(32 * config.num_warps, next_power_of_2(k // 32)), ROWS=config.rows,
        PREFETCH=min(config.prefetch, rows), BLOCK_M=next_power_of_2(m), ACT=ACTS[act], HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, **constants, PDL=pdl, num_warps=config.num_warps, launch_pdl=pdl,
    )  # fmt: skip
    return out
