"""Paged attention for one ragged step: single tokens of answers, parts of prompts, or both.

Defined by `attend` in backends/reference/ops.py; backends/torch/sdpa_attention.py is plain torch. Letters:
T tokens, Hq query heads, Hk KV heads, G = Hq / Hk, d head size, N tiles.

    q (T, Hq, d)   keys, values (blocks, block_size, Hk, d), any strides but the last   y (T, Hq * d)
    in fp8, key_scales, value_scales float32 (blocks, block_size, Hk): a scale lies where its codes do, over d
    tiles int32 (N, 4): where a tile's block table begins in `tables`, its first row of q, its rows (0: an empty
    tile, skipped), and the first row's position. A tile's rows are tokens of one sequence, side by side.

A program does the G heads of a KV head for the rows of one tile: rows x G queries in one `tl.dot`, padded to 16,
against TILE keys at a time, with the running maximum and sum of online softmax (arXiv 1805.02867). Where there are
too few tiles to fill the chip, SPLITS programs share a tile's keys and `_combine` joins what they found.
Read per tile and KV head: 2 * d * keys elements, which is nearly all of what a step of single tokens reads.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.kv_fp8 import check_scales, in_half, shares
from llmrs.backends.torch.kernels.launch import POOLS, chained, check_rows, power, precision, require
from llmrs.backends.torch.kv_fp8 import Scaled, parts

NAME = "attention"
LEAST = tl.constexpr(-1e30)  # a score of what is not seen; finite, so that exp2 of differences never meets inf - inf
LOG2E = 1.4426950408889634


@triton.jit
def _places(table, start, end, key_block, key_token, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Where the keys start .. start + TILE - 1 lie in the pool, int64 (TILE,); from `end` on it does not matter."""
    at = start + tl.arange(0, TILE)
    if BLOCK % TILE == 0:  # within one block
        block = tl.load(table + start // BLOCK, mask=start < end, other=0).to(tl.int64) * key_block
    else:
        block = tl.load(table + at // BLOCK, mask=at < end, other=0).to(tl.int64) * key_block
    return block + (at % BLOCK) * key_token


@triton.jit
def seen(seen_from, at, end, WINDOW: tl.constexpr):
    """Which of the keys `at` the positions `seen_from` (R,) see."""
    distance = seen_from[:, None] - at[None, :]
    found = (distance >= 0) & (at < end)[None, :]
    if WINDOW > 0:
        found = found & (distance < WINDOW)
    return found


@triton.jit
def tile_at(tables, tiles, tile):
    """A tile's block table, first row, rows, and first position."""
    table = tables + tl.load(tiles + tile * 4)
    row = tl.load(tiles + tile * 4 + 1)
    count = tl.load(tiles + tile * 4 + 2)
    first = tl.load(tiles + tile * 4 + 3)
    return table, row, count, first


@triton.jit
def queries(q, row, count, first, head, r, d, q_row, q_head, G: tl.constexpr, D: tl.constexpr):
    """A tile's queries (R, d), which of them there are, their positions (R,), and their heads (R,)."""
    mine = (r < count * G)[:, None] & (d < D)[None, :]
    heads = head * G + r % G
    places = q + (row + r // G).to(tl.int64) * q_row + heads * q_head
    return tl.load(places[:, None] + d[None, :], mask=mine, other=0.0), mine, first + r // G, heads


@triton.jit
def store_rows(y, total, weight, row, r, heads, d, y_row, mine, G: tl.constexpr, D: tl.constexpr):
    """A tile's results, from sums of weighted values (R, d) and of weights (R,); the rest as `queries` has it."""
    out = y + (row + r // G).to(tl.int64) * y_row + heads * D
    tl.store(out[:, None] + d[None, :], (total / weight[:, None]).to(y.dtype.element_ty), mask=mine)


@triton.jit
def _over_keys(
    state, q, keys, values, key_scales, value_scales, table, low, high, end, seen_from, scale,
    key_block, key_token, d, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys low .. high - 1, of which those from `end` on do not count.

    `state` is (sum of weighted values (R, d), maximum (R,), sum of weights (R,)); `seen_from` (R,) are positions.
    """
    total, most, weight = state
    base = _places(table, low, end, key_block, key_token, BLOCK, TILE)
    for start in range(low, high, TILE):
        at = start + tl.arange(0, TILE)
        # the next tile's block is looked up now: keys must not wait for it, nor Triton's pipeline reckon with two loads
        ahead = _places(table, start + TILE, end, key_block, key_token, BLOCK, TILE)
        there = (at < end)[:, None] & (d < D)[None, :]
        k = tl.load(keys + base[:, None] + d[None, :], mask=there, other=0.0).to(q.dtype)  # (TILE, d)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # (R, TILE)
        if key_scales is not None:
            scores *= tl.load(key_scales + base // D, mask=at < end, other=0.0)[None, :]
        if MASKED:
            scores = tl.where(seen(seen_from, at, end, WINDOW), scores, LEAST)
        higher = tl.maximum(most, tl.max(scores, 1))
        part = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(most - higher)
        v = tl.load(values + base[:, None] + d[None, :], mask=there, other=0.0).to(q.dtype)
        if value_scales is None:
            total = tl.dot(part.to(q.dtype), v, total * shrink[:, None], input_precision=PRECISION)
        else:
            share, peak = shares(tl.load(value_scales + base // D, mask=at < end, other=0.0))
            sums = tl.dot((part * share[None, :]).to(q.dtype), v, input_precision=PRECISION)
            total = total * shrink[:, None] + sums * peak
        weight = weight * shrink + tl.sum(part, 1)
        most = higher
        base = ahead
    return total, most, weight


@triton.jit
def _attend(
    q, keys, values, key_scales, value_scales, tables, tiles, y, part_sum, part_most, part_weight, scale,
    q_row, q_head, key_block, key_token, key_head, y_row,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, WINDOW: tl.constexpr, PROMPT: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
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
    low = 0
    if WINDOW > 0:
        low = tl.maximum(first - WINDOW + 1, 0) // TILE * TILE
    if SPLITS > 1:
        each = tl.cdiv(tl.cdiv(end - low, TILE), SPLITS) * TILE
        low += split * each
        end = tl.minimum(end, low + each)

    state = tl.zeros([R, DP], tl.float32), tl.full([R], LEAST, tl.float32), tl.zeros([R], tl.float32)
    keys += head * key_head
    values += head * key_head
    if key_scales is not None:
        x, scale = in_half(x, scale)
        key_scales += head * (key_head // D)
        value_scales += head * (key_head // D)
    if PROMPT and WINDOW == 0:  # no mask is needed before the first row's own position
        whole = first // TILE * TILE
        state = _over_keys(state, x, keys, values, key_scales, value_scales, table, low, whole, end, seen_from, scale,
                           key_block, key_token, d, D, BLOCK, TILE, WINDOW, False, PRECISION)  # fmt: skip
        low = whole
    total, most, weight = _over_keys(state, x, keys, values, key_scales, value_scales, table, low, end, end,
                                     seen_from, scale, key_block, key_token, d,
                                     D, BLOCK, TILE, WINDOW, True, PRECISION)  # fmt: skip

    # results
    if SPLITS > 1:  # as (tiles, Hq, SPLITS) and d more; a tile is one token here
        at = (tile * tl.num_programs(0) * G + heads) * SPLITS + split
        tl.store(part_sum + at[:, None].to(tl.int64) * D + d[None, :], total, mask=mine)
        tl.store(part_most + at, most, mask=r < G)
        tl.store(part_weight + at, weight, mask=r < G)
    else:
        store_rows(y, total, weight, row, r, heads, d, y_row, mine, G, D)


@triton.jit
def _combine(
    part_sum, part_most, part_weight, tiles, y, y_row,
    D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y of one head of one tile from what the splits found; one that saw nothing has LEAST as its maximum."""
    head, tile = tl.program_id(0), tl.program_id(1)
    row = tl.load(tiles + tile * 4 + 1)
    count = tl.load(tiles + tile * 4 + 2)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if count == 0:
        return
    s, d = tl.arange(0, SPLITS), tl.arange(0, DP)
    at = (tile * tl.num_programs(0) + head) * SPLITS + s
    most = tl.load(part_most + at)  # (SPLITS,)
    share = tl.exp2(most - tl.max(most, 0))
    weight = tl.sum(share * tl.load(part_weight + at), 0)
    sums = tl.load(part_sum + at[:, None].to(tl.int64) * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    total = tl.sum(sums * share[:, None], 0)
    tl.store(y + row.to(tl.int64) * y_row + head * D + d, (total / weight).to(y.dtype.element_ty), mask=d < D)


@dataclass(frozen=True)
class AttnConfig:
    """Query tokens and keys per tile, and Triton's launch options."""

    q_tokens: int
    block_n: int
    num_warps: int
    num_stages: int


def default_config(group: int, size: int, dtype: torch.dtype, *, prefill: bool, fp8: bool = False) -> AttnConfig:
    """For single tokens, or parts of prompts. `fp8`: the KV cache is in it; float32 is for tests and small models."""
    if dtype == torch.float32:
        return AttnConfig(max(32 // power(group), 1) if prefill else 1, 32 if size <= 128 else 16, 4, 1)
    if not prefill:
        small = size <= 64
        warps = 2 if (small or fp8) and group <= 16 else 4
        return AttnConfig(1, 64 if size <= 128 else 32, warps, 2 if small else 3)
    rows = 128 if size <= 128 else 64
    return AttnConfig(max(rows // power(group), 1), 64 if size <= 128 else 32, 8 if rows == 128 else 4, 3)


def attention(
    q: torch.Tensor,
    keys: torch.Tensor | Scaled,
    values: torch.Tensor | Scaled,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    y: torch.Tensor,
    *,
    scale: float,
    window: int,
    config: AttnConfig,
    split: int = 1,
) -> None:
    """Writes the rows of y (T, Hq * d) that `tiles` name; the module says what is what.

    `split` programs share a tile, which then has one token. Raises BackendError for shapes and types it can't do.
    """
    (keys, key_scales), (values, value_scales) = parts(keys), parts(values)
    (_blocks, block_size, kv_heads, size), heads = keys.shape, q.shape[1]
    group = checked(q, keys, values, tables, tiles, y)
    for codes, scales in ((keys, key_scales), (values, value_scales)):
        check_scales(NAME, codes, scales)
    require(NAME, split == 1 or config.q_tokens == 1, "only tiles of one token are split")
    rows, padded, pdl = power(config.q_tokens * power(group), 16), power(size, 16), chained(q.device)
    found = _workspace(len(tiles) * heads if split > 1 else 0, split, size, q.device)
    _attend[(kv_heads, len(tiles), split)](
        q, keys, values, key_scales, value_scales, tables, tiles, y, *found, scale * LOG2E,
        q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), keys.stride(2), y.stride(0),
        G=group, D=size, DP=padded, BLOCK=block_size, R=rows, TILE=config.block_n, SPLITS=split, WINDOW=window,
        PROMPT=config.q_tokens > 1, PRECISION=precision(q.dtype), PDL=pdl, num_warps=config.num_warps,
        num_stages=config.num_stages, launch_pdl=pdl,
    )  # fmt: skip
    if split > 1:
        _combine[(heads, len(tiles))](
            *found, tiles, y, y.stride(0), D=size, DP=padded, SPLITS=split, PDL=pdl, num_warps=1, launch_pdl=pdl
        )


def checked(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    y: torch.Tensor,
) -> int:
    """Query heads of a KV head. Raises BackendError."""
    tokens, heads, size = q.shape
    check_rows(NAME, q)
    check_rows(NAME, keys, values, types=POOLS)
    require(NAME, keys.stride() == values.stride(), "keys and values differ in strides")
    require(NAME, keys.shape[3] == size <= 256 and heads % keys.shape[2] == 0, f"q {q.shape}, keys {keys.shape}")
    require(NAME, y.shape == (tokens, heads * size) and y.dtype == q.dtype and y.stride(1) == 1, f"y is {y.shape}")
    for ints in (tables, tiles):
        require(NAME, ints.dtype == torch.int32 and ints.is_contiguous(), "tables and tiles are int32")
    return heads // keys.shape[2]


def _workspace(heads: int, split: int, size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Sums, maxima and weights of splits, float32."""
    shapes = ((heads, split, size), (heads, split), (heads, split))
    return tuple(torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes)
