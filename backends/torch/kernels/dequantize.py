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
from llmrs.backends.torch.kernels.quant_codes import load_codes
from llmrs.backends.torch.kernels.quant_scales import load_scales

NAME = "dequantize"
COLUMNS_PER_CTA = 4096


@triton.jit
def dequantize_kernel(
    low, high, scales, offsets, supers, row_scales, index, last_tokens, out, rows, stride_om,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, HAS_INDEX: tl.constexpr, TOKENS: tl.constexpr,
    LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, TABLE: tl.constexpr, SIGNED: tl.constexpr, FACTOR: tl.constexpr,
    ZERO: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr, SUPER: tl.constexpr,
    ROW_SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None, None]
    octet = tl.program_id(1) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)[None, :, None]  # eight columns
    mask = (r < rows) & (octet < K // 8)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = r.to(tl.int64)
    if HAS_INDEX:
        row = tl.load(index + row, mask=r < rows, other=0).to(tl.int64)
        if TOKENS:  # -1 - slot stands for the slot's last token
            row = tl.where(row < 0, tl.load(last_tokens - 1 - row, mask=row < 0, other=0), row)
    values = load_codes(low, high, row, octet, mask, K, LOW_BITS, HIGH_BITS, TABLE, SIGNED) * FACTOR
    scale, offset = load_scales(
        scales, offsets, supers, row_scales, row, octet // 4, octet // 2 % 2, mask, K, GROUP, SCALE, OFFSET, SUPER,
        ROW_SCALE,
    )  # fmt: skip
    if ZERO:
        values = values - ZERO
    if OFFSET == "zero":
        values = values - offset
    values = values * scale
    if OFFSET == "bias":
        values = values + offset
    if OFFSET == "min":
        values = values - offset
    columns = octet * 8 + tl.arange(0, 8)[None, None, :]
    tl.store(out + r.to(tl.int64) * stride_om + columns, values.to(out.dtype.element_ty), mask=mask)


def dequantize(
    planes: list[torch.Tensor | None], constants: dict[str, Any], columns: int, out: torch.Tensor, *,
    index: torch.Tensor | None = None, last_tokens: torch.Tensor | None = None, pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Into `out` (R, K): the first rows, or those of `index`; with `last_tokens` that is of `embed`.

    `planes`, `constants`: of TritonRows. Raises BackendError for a dtype of `out` that kernels lack.
    """
    check(NAME, out.dtype in FLOATS and out.stride(1) == 1, f"out {out.dtype}, {out.stride()}")
    block_k = min(next_power_of_2(columns), COLUMNS_PER_CTA)
    block_r = COLUMNS_PER_CTA // block_k
    dequantize_kernel[triton.cdiv(len(out), block_r), triton.cdiv(columns, block_k)](
        *planes, index, last_tokens, out, len(out), out.stride(0),
        K=columns, BLOCK_R=block_r, BLOCK_K=block_k, HAS_INDEX=index is not None, TOKENS=last_tokens is not None,
        **constants, PDL=pdl, num_warps=4, launch_pdl=pdl, enable_fp_fusion=False,
    )  # fmt: skip
    return out
