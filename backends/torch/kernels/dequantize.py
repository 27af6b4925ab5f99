"""Dequantizes rows of quantized weights: all, or some by their numbers, as an embedding table is read.

`triton_rows.py` has the layout; the arithmetic is that of quant/form.py, in the same order, rounded once at the end.

    planes of (N, K)   index (R,) int32 or int64, or all rows   -> out (R, K)

Bytes moved: the rows' planes read, and out written.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import FLOATS, check, next_power_of_2
from llmrs.backends.torch.kernels.quant_codes import byte_of, load_quads, load_scales

NAME = "dequantize"
UNITS_PER_CTA = 256


@triton.jit
def dequantize_kernel(
    low, high, scales, offsets, supers, row_scales, index, last_tokens, out, rows, first_row, stride_om,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_U: tl.constexpr, HAS_INDEX: tl.constexpr, TOKENS: tl.constexpr,
    LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, TABLE: tl.constexpr, SIGNED: tl.constexpr, FACTOR: tl.constexpr,
    ZERO: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr, SUPER: tl.constexpr,
    ROW_SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None, None]
    unit = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)[None, :, None]
    mask = (r < rows) & (unit < K // 32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = r.to(tl.int64)
    if HAS_INDEX:
        row = tl.load(index + row, mask=r < rows, other=0).to(tl.int64)
        if TOKENS:  # -1 - slot stands for the slot's last token
            row = tl.where(row < 0, tl.load(last_tokens - 1 - row, mask=row < 0, other=0), row)
    row += first_row
    first, second = load_quads(low, high, row, unit, mask, K, LOW_BITS, HIGH_BITS, TABLE)
    for half in tl.static_range(2):
        scale, offset = load_scales(
            scales, offsets, supers, row_scales, row, unit, half, mask, K, GROUP, SCALE, OFFSET, SUPER, ROW_SCALE
        )
        quad = first if half == 0 else second
        for i in tl.static_range(2):  # 8 columns each
            even, odd = byte_of(quad, i, SIGNED) * FACTOR, byte_of(quad, 2 + i, SIGNED) * FACTOR
            pair = tl.join(even, odd)  # (R, U, 4, 2)
            if ZERO:
                pair = pair - ZERO
            if OFFSET == "zero":
                pair = pair - offset[:, :, :, None]
            pair = pair * scale[:, :, :, None]
            if OFFSET == "bias":
                pair = pair + offset[:, :, :, None]
            if OFFSET == "min":
                pair = pair - offset[:, :, :, None]
            values = tl.reshape(pair, [BLOCK_R, BLOCK_U, 8]).to(out.dtype.element_ty)
            column = unit * 32 + half * 16 + i * 8 + tl.arange(0, 8)
            tl.store(out + r.to(tl.int64) * stride_om + column, values, mask=mask)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


def dequantize(
    planes: list[torch.Tensor | None], constants: dict[str, Any], columns: int, out: torch.Tensor, *,
    first_row: int = 0, index: torch.Tensor | None = None, last_tokens: torch.Tensor | None = None, pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Into `out` (R, K): rows from `first_row` on, or those of `index`; with `last_tokens` that is of `embed`.

    `planes`, `constants`: of TritonRows. Raises BackendError for a dtype of `out` that kernels lack.
    """
    check(NAME, out.dtype in FLOATS and out.stride(1) == 1, f"out {out.dtype}, {out.stride()}")
    units = columns // 32
    block_u = min(next_power_of_2(units), UNITS_PER_CTA)
    block_r = UNITS_PER_CTA // block_u
    dequantize_kernel[triton.cdiv(len(out), block_r), triton.cdiv(units, block_u)](
        *planes, index, last_tokens, out, len(out), first_row, out.stride(0),
        K=columns, BLOCK_R=block_r, BLOCK_U=block_u, HAS_INDEX=index is not None, TOKENS=last_tokens is not None,
        **constants, PDL=pdl, num_warps=4, launch_pdl=pdl, enable_fp_fusion=False,
    )  # fmt: skip
    return out
