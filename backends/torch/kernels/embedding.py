"""Embedding lookup that resolves placeholder tokens on the device.

Defined by `embed` in backends/reference/ops.py and by Batch.input_ids: -1 - slot stands for the slot's last token.

    input_ids int32 (T,)   last_tokens int64 (slots,)   table (V, D)   -> out (T, D)

Bytes moved: T rows read and written.
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import check, check_tensors, next_power_of_2

BLOCK_D = 1024


@triton.jit
def embed_kernel(input_ids, last_tokens, table, out, D: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr):
    row, offs_d = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = tl.load(input_ids + row).to(tl.int64)
    if token < 0:
        token = tl.load(last_tokens + (-1 - token))
    x = tl.load(table + token * D + offs_d, mask=offs_d < D, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(out + row.to(tl.int64) * D + offs_d, x, mask=offs_d < D)


def embed(
    input_ids: torch.Tensor, last_tokens: torch.Tensor, table: torch.Tensor, *, pdl: bool = False
) -> torch.Tensor:
    """(T, D) of the table's dtype. Raises BackendError for unsupported dtypes."""
    check_tensors("embed", table)
    check("embed", table.is_contiguous() and table.ndim == 2, f"table {table.shape}, {table.stride()}")
    ids, last = input_ids.dtype, last_tokens.dtype
    check("embed", ids == torch.int32 and last == torch.int64, f"{ids}, {last}")
    tokens, d = len(input_ids), table.shape[1]
    out = torch.empty(tokens, d, dtype=table.dtype, device=table.device)
    block_d = min(BLOCK_D, next_power_of_2(d))
    embed_kernel[(tokens, triton.cdiv(d, block_d))](
        input_ids, last_tokens, table, out, D=d, BLOCK_D=block_d, PDL=pdl, num_warps=2, launch_pdl=pdl
    )
    return out
