"""Keys and values of some sequences out of the paged cache, one after the other, as libraries want them.

    keys, values (blocks, block_size, Hk, d), any strides but the last   pieces int32 (P, 3): a block, the row to which
    its first token goes, and its tokens   -> k, v (rows, Hk, d), contiguous, of the type of the computation

Moved: every key and value read and written once. That is little beside what attention computes with them.
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import chained, check_rows, power, require

NAME = "gather"


@triton.jit
def _gather(
    keys, values, pieces, k, v, key_block, key_token, key_head,
    HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    piece, head = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    block = tl.load(pieces + piece * 3).to(tl.int64)
    row = tl.load(pieces + piece * 3 + 1).to(tl.int64)
    count = tl.load(pieces + piece * 3 + 2)
    t, d = tl.arange(0, BLOCK_P), tl.arange(0, DP)
    there = (t < count)[:, None] & (d < D)[None, :]
    source = block * key_block + t[:, None] * key_token + head * key_head + d[None, :]
    to = ((row + t)[:, None] * HK + head) * D + d[None, :]
    tl.store(k + to, tl.load(keys + source, mask=there, other=0.0).to(k.dtype.element_ty), mask=there)
    tl.store(v + to, tl.load(values + source, mask=there, other=0.0).to(v.dtype.element_ty), mask=there)


def gather(
    keys: torch.Tensor, values: torch.Tensor, pieces: torch.Tensor, rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v (rows, Hk, d). Raises BackendError for types that it can't do."""
    _blocks, block_size, heads, size = keys.shape
    check_rows(NAME, keys, values)
    require(NAME, keys.stride() == values.stride(), "keys and values differ in strides")
    require(NAME, pieces.dtype == torch.int32 and pieces.is_contiguous() and pieces.ndim == 2, f"pieces {pieces.shape}")
    pdl = chained(keys.device)
    k, v = (torch.empty(rows, heads, size, dtype=dtype, device=keys.device) for _ in range(2))
    _gather[(len(pieces), heads)](
        keys, values, pieces, k, v, *keys.stride()[:3],
        HK=heads, D=size, DP=power(size), BLOCK_P=power(block_size), PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return k, v
