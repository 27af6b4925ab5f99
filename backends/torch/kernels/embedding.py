"""Rows of the embedding table; a token that only the device knows is looked up by its slot on the way.

Defined by `embed` in backends/reference/ops.py and by Batch.tokens: -1 - slot is the last token of a slot.
tokens int32 (T,), last int64 (slots,), table (V, D) -> (T, D). Moved: T rows read and written.
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import chained, check_rows, power, require

PART = 1024


@triton.jit
def _embed(tokens, last, table, y, D: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr):
    row, d = tl.program_id(0), tl.program_id(1) * PART + tl.arange(0, PART)
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = tl.load(tokens + row).to(tl.int64)
    if token < 0:
        token = tl.load(last + (-1 - token))
    x = tl.load(table + token * D + d, mask=d < D, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(y + row.to(tl.int64) * D + d, x, mask=d < D)


def embed(tokens: torch.Tensor, last: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(T, D) of the table's type. Raises BackendError for types that it can't do."""
    check_rows("embed", table)
    require("embed", table.is_contiguous() and table.ndim == 2, f"table {table.shape}, {table.stride()}")
    require("embed", tokens.dtype == torch.int32 and last.dtype == torch.int64, f"{tokens.dtype}, {last.dtype}")
    count, width = len(tokens), table.shape[1]
    y = torch.empty(count, width, dtype=table.dtype, device=table.device)
    part, pdl = min(PART, power(width)), chained(table.device)
    _embed[(count, triton.cdiv(width, part))](
        tokens, last, table, y, D=width, PART=part, PDL=pdl, num_warps=2, launch_pdl=pdl
    )
    return y
