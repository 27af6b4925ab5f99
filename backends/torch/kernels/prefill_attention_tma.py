"""Attention of parts of prompts with K and V loaded by the GPU's copy engine, on Hopper and later.

Results, arguments and tiles as in kernels/attention.py, which see. There every thread computes addresses and asks for
16 bytes at a time; here one thread asks for KEYS x d at once, through a tensor descriptor (TMA), since a head's tokens
of a block lie together in the pool. Beside that:

    only the last of a tile's keys, those of the diagonal, need a mask; windows are left to the other kernel
    the scale is applied where the maximum is subtracted, in one instruction
    a row's sum is rescaled once for KEYS keys, which is d multiplications: the more keys, the less of them

Operations of a tile of R rows and a KV head: 4 * R * d * keys. Read: 4 * d bytes a key, from the L2 cache mostly,
which bounds 128 rows at d = 128 to 128 operations a byte.
"""

from typing import TypeGuard

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from llmrs.backends.torch.kernels.launch import chained, power, require
from llmrs.backends.torch.kernels.paged_attention import (
    LEAST,
    LOG2E,
    AttnConfig,
    checked,
    queries,
    seen,
    store_rows,
    tile_at,
)
from llmrs.backends.torch.kv_fp8 import Scaled

NAME = "prompt attention"


@triton.jit
def _row(table, start, end, head_row, block_rows, BLOCK: tl.constexpr):
    """Where the key `start` of a head lies in the pool, in rows of d elements; from `end` on it does not matter."""
    block = tl.load(table + start // BLOCK, mask=start < end, other=0)
    return head_row + block * block_rows + start % BLOCK


@triton.jit
def _over_keys(
    state, q, keys, values, table, low, high, end, seen_from, scale, head_row, block_rows,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys low .. high - 1. `keys` and `values` are descriptors of tiles (KEYS, d).

    `state` is (sum of weighted values (R, d), maximum (R,), sum of weights (R,)), the maximum of scaled scores.
    """
    total, most, weight = state
    row = _row(table, low, end, head_row, block_rows, BLOCK)
    for start in range(low, high, KEYS):
        # the next block is looked up now, so that no copy waits for a table
        ahead = _row(table, start + KEYS, end, head_row, block_rows, BLOCK)
        # values first: Triton has all warps meet between the two copies, which then need not meet before the sums
        v = values.load([row, 0])  # (KEYS, d)
        scores = tl.dot(q, keys.load([row, 0]).T)  # (R, KEYS)
        if MASKED:
            at = start + tl.arange(0, KEYS)
            scores = tl.where(seen(seen_from, at, end, 0), scores, LEAST)
            v = tl.where((at < end)[:, None], v, 0.0)  # after the last token anything may lie, and 0 * NaN is NaN
        higher = tl.maximum(most, tl.max(scores, 1) * scale)
        part = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(most - higher)
        total = tl.dot(part.to(v.dtype), v, total * shrink[:, None])
        weight = weight * shrink + tl.sum(part, 1)
        most = higher
        row = ahead
    return total, most, weight


@triton.jit
def _prompt(
    q, keys, values, tables, tiles, y, scale, q_row, q_head, y_row, block_rows, head_rows,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, KEYS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0), tl.program_id(1)
    table, row, count, first = tile_at(tables, tiles, tile)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if count == 0:
        return
    r, d = tl.arange(0, R), tl.arange(0, DP)
    x, mine, seen_from, heads = queries(q, row, count, first, head, r, d, q_row, q_head, G, D)

    # which keys
    end = first + count
    whole = first // KEYS * KEYS  # before it, no key is later than any row
    state = tl.zeros([R, DP], tl.float32), tl.full([R], LEAST, tl.float32), tl.zeros([R], tl.float32)
    head_row = head * head_rows
    state = _over_keys(state, x, keys, values, table, 0, whole, end, seen_from, scale, head_row, block_rows,
                       BLOCK, KEYS, False)  # fmt: skip
    state = _over_keys(state, x, keys, values, table, whole, end, end, seen_from, scale, head_row, block_rows,
                       BLOCK, KEYS, True)  # fmt: skip
    store_rows(y, state[0], state[2], row, r, heads, d, y_row, mine, G, D)


def prefill_config(group: int, size: int, block_size: int) -> AttnConfig:
    """Chosen by what fits into shared memory and registers: 128 rows x 128 keys of 128 take 245 of 255.

    128 keys at a time need blocks of 128 tokens (`block_size: 128`).
    """
    rows = 128 if size <= 128 else 64
    keys = min(block_size & -block_size, 128 if size <= 128 else 32)
    return AttnConfig(max(rows // power(group), 1), keys, 8, 2 if keys == 128 else 3)


def prompt_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    y: torch.Tensor,
    *,
    scale: float,
    config: AttnConfig,
) -> None:
    """Writes the rows of y (T, Hq * d) that `tiles` name. Raises BackendError for shapes and types it can't do."""
    block_size, kv_heads, size = keys.shape[1:]
    group = checked(q, keys, values, tables, tiles, y)
    require(
        NAME, fits(keys, q.dtype) and block_size % config.block_n == 0, f"keys {keys.shape}, {keys.stride()}, {config}"
    )
    rows, padded = power(config.q_tokens * power(group), 16), power(size, 16)
    pdl = chained(q.device)
    pools = (_tiles_of(x, config.block_n, padded) for x in (keys, values))
    _prompt[(kv_heads, len(tiles))](
        q, *pools, tables, tiles, y, scale * LOG2E, q.stride(0), q.stride(1), y.stride(0),
        keys.stride(0) // size, keys.stride(2) // size,
        G=group, D=size, DP=padded, BLOCK=block_size, R=rows, KEYS=config.block_n, PDL=pdl,
        num_warps=config.num_warps, num_stages=config.num_stages, launch_pdl=pdl,
    )  # fmt: skip


def fits(keys: torch.Tensor | Scaled, dtype: torch.dtype) -> TypeGuard[torch.Tensor]:
    """Whether a copy engine can load tiles of a pool (blocks, block_size, Hk, d): a head's tokens of a block must lie
    side by side, each at a multiple of 16 bytes, in the type of the computation."""
    if isinstance(keys, Scaled) or keys.dtype != dtype or dtype == torch.float32:
        return False
    size = keys.shape[3]
    strides = keys.stride(1) == size and all(keys.stride(n) % size == 0 for n in (0, 2))
    return strides and keys.shape[1] % 16 == size * 2 % 16 == 0


def _tiles_of(pool: torch.Tensor, keys: int, padded: int) -> TensorDescriptor:
    """A pool as rows of d elements, read in tiles (keys, padded)."""
    blocks, block_size, heads, size = pool.shape
    rows = ((blocks - 1) * pool.stride(0) + (heads - 1) * pool.stride(2)) // size + block_size
    require(NAME, rows < 2**31, f"{rows} rows are too many")
    return TensorDescriptor(pool, [rows, size], [size, 1], [keys, padded])
