"""Attention of parts of prompts with K and V loaded by the GPU's copy engine, on Hopper and later.

The same results, arguments and tiles as kernels/attention.py, which see. There every thread computes addresses and
asks for 16 bytes at a time; here one asks for KEYS x d at once, through a tensor descriptor (TMA), since a head's
tokens of a block lie together in the pool. What differs beside:

    a tile's keys come in three parts, of which only the first (windows) and the last (the diagonal) need a mask
    PARTS blocks of keys share one maximum and one rescaling of the sum: that is d multiplications for each row
    the scale is applied where the maximum is subtracted, in one instruction

Operations of a tile of R rows and a KV head: 4 * R * d * keys. Read: 4 * d bytes a key, from the L2 cache mostly.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from llmrs.backends.torch.kernels.attention import LEAST, LOG2E, checked
from llmrs.backends.torch.kernels.launch import power, require

NAME = "prompt attention"


@triton.jit
def _row(table, start, end, block_rows, BLOCK: tl.constexpr):
    """The row of the pool, counted in rows of d elements, where the key `start` lies; beyond `end` any."""
    block = tl.load(table + start // BLOCK, mask=start < end, other=0)
    return block * block_rows + start % BLOCK


@triton.jit
def _over_keys(
    state, q, keys, values, table, low, high, end, seen_from, scale, row, block_rows,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys low .. high - 1. `keys` and `values` are descriptors of tiles (KEYS, d).

    `state` is (sum of weighted values (R, d), maximum (R,), sum of weights (R,)), of scores that are scaled.
    """
    total, most, weight = state
    first = _row(table, low, end, block_rows, BLOCK)
    second = _row(table, low + KEYS, end, block_rows, BLOCK) if PARTS == 2 else first
    for start in range(low, high, KEYS * PARTS):
        # the next blocks are looked up now, so that the copies of keys never wait for a table
        ahead = start + KEYS * PARTS
        next_first = _row(table, ahead, end, block_rows, BLOCK)
        next_second = _row(table, ahead + KEYS, end, block_rows, BLOCK) if PARTS == 2 else next_first
        at = start + tl.arange(0, KEYS)
        a = tl.dot(q, keys.load([row + first, 0]).T)  # (R, KEYS)
        if MASKED:
            a = tl.where(_seen(seen_from, at, end, WINDOW), a, LEAST)
        higher = tl.max(a, 1)
        if PARTS == 2:
            b = tl.dot(q, keys.load([row + second, 0]).T)
            if MASKED:
                b = tl.where(_seen(seen_from, at + KEYS, end, WINDOW), b, LEAST)
            higher = tl.maximum(higher, tl.max(b, 1))
        higher = tl.maximum(most, higher * scale)
        shrink = tl.exp2(most - higher)
        total = total * shrink[:, None]
        weight = weight * shrink
        most = higher
        total, weight = _add(total, weight, a, most, scale, values, row + first, at, end, MASKED)
        if PARTS == 2:
            total, weight = _add(total, weight, b, most, scale, values, row + second, at + KEYS, end, MASKED)
        first = next_first
        second = next_second
    return total, most, weight


@triton.jit
def _seen(seen_from, at, end, WINDOW: tl.constexpr):
    distance = seen_from[:, None] - at[None, :]
    seen = (distance >= 0) & (at < end)[None, :]
    if WINDOW > 0:
        seen = seen & (distance < WINDOW)
    return seen


@triton.jit
def _add(total, weight, scores, most, scale, values, row, at, end, MASKED: tl.constexpr):
    """What one tile of values adds to the sums."""
    part = tl.exp2(scores * scale - most[:, None])
    v = values.load([row, 0])  # (KEYS, d)
    if MASKED:  # what lies in a block after the last token may be anything, and 0 * NaN is NaN
        v = tl.where((at < end)[:, None], v, 0.0)
    return tl.dot(part.to(v.dtype), v, total), weight + tl.sum(part, 1)


@triton.jit
def _prompt(
    q, keys, values, tables, tiles, y, scale, q_row, q_head, y_row, block_rows, head_rows,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, KEYS: tl.constexpr,
    PARTS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0), tl.program_id(1)
    table = tables + tl.load(tiles + tile * 4)
    row = tl.load(tiles + tile * 4 + 1)
    count = tl.load(tiles + tile * 4 + 2)
    first = tl.load(tiles + tile * 4 + 3)
    if count == 0:
        return
    r, d = tl.arange(0, R), tl.arange(0, DP)
    mine = (r < count * G)[:, None] & (d < D)[None, :]
    seen_from = first + r // G
    heads = head * G + r % G
    queries = q + (row + r // G).to(tl.int64) * q_row + heads * q_head
    x = tl.load(queries[:, None] + d[None, :], mask=mine, other=0.0)  # (R, d)

    # which keys
    end = first + count
    low = 0
    state = tl.zeros([R, DP], tl.float32), tl.full([R], LEAST, tl.float32), tl.zeros([R], tl.float32)
    head_row = head * head_rows
    if WINDOW > 0:  # keys that only some of the rows see, since they lie before the windows of the others
        begin = tl.maximum(first - WINDOW + 1, 0) // KEYS * KEYS
        low = tl.minimum(tl.cdiv(tl.maximum(end - WINDOW, 0), KEYS), first // KEYS) * KEYS
        state = _over_keys(state, x, keys, values, table, begin, low, end, seen_from, scale, head_row, block_rows,
                           BLOCK, KEYS, 1, WINDOW, True)  # fmt: skip
        low = tl.maximum(begin, low)
    whole = low + (first - low) // (KEYS * PARTS) * (KEYS * PARTS)  # before it, no key is later than any row
    state = _over_keys(state, x, keys, values, table, low, whole, end, seen_from, scale, head_row, block_rows,
                       BLOCK, KEYS, PARTS, WINDOW, False)  # fmt: skip
    total, most, weight = _over_keys(state, x, keys, values, table, whole, end, end, seen_from, scale, head_row,
                                     block_rows, BLOCK, KEYS, 1, WINDOW, True)  # fmt: skip

    out = y + (row + r // G).to(tl.int64) * y_row + heads * D
    tl.store(out[:, None] + d[None, :], (total / weight[:, None]).to(y.dtype.element_ty), mask=mine)


@dataclass(frozen=True)
class PromptCut:
    """How a launch is cut: tokens of a tile, keys of a copy, copies that share a maximum, and what Triton is told."""

    tokens: int
    keys: int
    parts: int
    warps: int
    stages: int


def prompt_cut(group: int, size: int, block_size: int) -> PromptCut:
    """Not measured yet: chosen by what fits into shared memory and registers."""
    rows = 128 if size <= 128 else 64
    keys = min(block_size & -block_size, 64 if size <= 128 else 32)
    return PromptCut(max(rows // power(group), 1), keys, 2 if size <= 128 else 1, 8 if rows == 128 else 4, 2)


def prompt_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    y: torch.Tensor,
    *,
    scale: float,
    window: int,
    cut: PromptCut,
) -> None:
    """Writes the rows of y (T, Hq * d) that `tiles` name. Raises BackendError for shapes and types it can't do."""
    block_size, kv_heads, size = keys.shape[1:]
    group = checked(q, keys, values, tables, tiles, y)
    require(NAME, fits(keys, q.dtype) and block_size % cut.keys == 0, f"keys {keys.shape}, {keys.stride()}, {cut}")
    rows, padded = power(cut.tokens * power(group), 16), power(size, 16)
    pools = (_tiles_of(x, cut.keys, padded) for x in (keys, values))
    _prompt[(kv_heads, len(tiles))](
        q, *pools, tables, tiles, y, scale * LOG2E, q.stride(0), q.stride(1), y.stride(0),
        keys.stride(0) // size, keys.stride(2) // size,
        G=group, D=size, DP=padded, BLOCK=block_size, R=rows, KEYS=cut.keys, PARTS=cut.parts, WINDOW=window,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip


def fits(keys: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a copy engine can load tiles of a pool (blocks, block_size, Hk, d): a head's tokens of a block must lie
    side by side, at multiples of 16 bytes, and as the computation has them."""
    size = keys.shape[3]
    strides = keys.stride(1) == size and all(keys.stride(n) % size == 0 for n in (0, 2))
    return strides and size * keys.itemsize % 16 == 0 and keys.dtype == dtype != torch.float32


def _tiles_of(pool: torch.Tensor, keys: int, padded: int) -> TensorDescriptor:
    """A pool as rows of d elements, read in tiles (keys, padded)."""
    blocks, block_size, heads, size = pool.shape
    rows = ((blocks - 1) * pool.stride(0) + (heads - 1) * pool.stride(2)) // size + block_size
    require(NAME, rows < 2**31, f"{rows} rows are too many")
    return TensorDescriptor(pool, [rows, size], [size, 1], [keys, padded])
