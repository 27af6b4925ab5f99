"""Paged attention of single tokens whose keys are shared out evenly, in one kernel. The plan is that of ../shares.py.

Defined by `attend` in backends/reference/ops.py, without a window. T tokens, Hq query heads, Hk KV heads, G = Hq / Hk,
d head size, W workers; q, keys, values, their scales, tables and y are as in kernels/attention.py:

    segments int32 (rows, 8), begins int32 (W + 1,)   as `share_out` fills them
    sums float32 (2 W, Hq, d), tops, weights float32 (2 W, Hq)   what is found in parts of sequences, by slot
    arrived int32 (2 W, Hk)   how many parts of a sequence are done, at its first slot; 0 before a launch and after it

A program does the G heads of a KV head for the segments of one worker, one after the other. If all programs run at
once and read alike, all end at once. The program that brings the last part of a sequence joins them all, in the order
of its slots: who comes last does not change the result.
Read per sequence and KV head: 2 * d * keys elements; written and read again per worker and KV head: 2 * G * d floats.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.fp8 import Scaled, parts
from llmrs.backends.torch.kernels.attention import LEAST, LOG2E, Tiling, checked, over_keys, queries
from llmrs.backends.torch.kernels.fp8 import check_scales, in_half
from llmrs.backends.torch.kernels.launch import chained, power, precision, require

NAME = "shared attention"
JOINED = 1024  # floats of parts that a warp joins at a time: more would not fit into its registers


@triton.jit
def _segment(segments, n):
    """What share_out says of a segment."""
    at = segments + n * 8
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3),
        tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7),
    )  # fmt: skip


@triton.jit
def _join(sums, tops, weights, first, count, out, head, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr,
          DP: tl.constexpr, JOIN: tl.constexpr):  # fmt: skip
    """G heads of y, to `out`, from `count` parts in the slots from `first` on, JOIN parts at a time."""
    g, d = tl.arange(0, GP), tl.arange(0, DP)
    heads, all_heads = head * G + g, tl.num_programs(0) * G
    top, weight = tl.full([GP], LEAST, tl.float32), tl.zeros([GP], tl.float32)
    total = tl.zeros([GP, DP], tl.float32)
    for part in range(0, count, JOIN):
        p = part + tl.arange(0, JOIN)
        at = (first + p)[:, None] * all_heads + heads[None, :]  # (JOIN, GP)
        there = (p < count)[:, None] & (g < G)[None, :]
        # others wrote them during this launch, so not from the multiprocessor's own cache
        most = tl.load(tops + at, mask=there, other=LEAST, cache_modifier=".cg")
        each = tl.load(weights + at, mask=there, other=0.0, cache_modifier=".cg")
        x = tl.load(sums + at[:, :, None] * D + d[None, None, :], mask=there[:, :, None] & (d < D)[None, None, :],
                    other=0.0, cache_modifier=".cg")  # (JOIN, GP, DP)  # fmt: skip
        higher = tl.maximum(top, tl.max(most, 0))
        share, shrink = tl.exp2(most - higher[None, :]), tl.exp2(top - higher)
        weight = weight * shrink + tl.sum(share * each, 0)
        total = total * shrink[:, None] + tl.sum(x * share[:, :, None], 0)
        top = higher
    y = (total / tl.where(g < G, weight, 1.0)[:, None]).to(out.dtype.element_ty)
    tl.store(out + heads[:, None] * D + d[None, :], y, mask=(g < G)[:, None] & (d < D)[None, :])


@triton.jit
def _attend_shares(
    q, keys, values, key_scales, value_scales, tables, segments, begins, y, sums, tops, weights, arrived, scale,
    q_row, q_head, key_block, key_token, key_head, y_row,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
    TILE: tl.constexpr, JOIN: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head, worker = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(begins + worker), tl.load(begins + worker + 1)
    table, row, position, low, high, slot, first, count = _segment(segments, begin)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    r, d = tl.arange(0, R), tl.arange(0, DP)
    keys += head * key_head
    values += head * key_head
    if key_scales is not None:
        key_scales += head * (key_head // D)
        value_scales += head * (key_head // D)
    for n in range(begin, end):
        after = _segment(segments, n + 1)  # asked for now, since its keys wait for it
        x, mine, seen_from, heads = queries(q, row, 1, position, head, r, d, q_row, q_head, G, D)
        factor = scale
        if key_scales is not None:
            x, factor = in_half(x, scale)
        state = tl.zeros([R, DP], tl.float32), tl.full([R], LEAST, tl.float32), tl.zeros([R], tl.float32)
        total, most, weight = over_keys(state, x, keys, values, key_scales, value_scales, tables + table, low, high,
                                        high, seen_from, factor, key_block, key_token, d,
                                        D, BLOCK, TILE, 0, True, PRECISION)  # fmt: skip
        out = y + row.to(tl.int64) * y_row
        if slot < 0:
            found = (total / weight[:, None]).to(y.dtype.element_ty)
            tl.store(out + heads[:, None] * D + d[None, :], found, mask=mine)
        else:
            at = slot * tl.num_programs(0) * G + heads
            tl.store(sums + at[:, None] * D + d[None, :], total, mask=mine)
            tl.store(tops + at, most, mask=r < G)
            tl.store(weights + at, weight, mask=r < G)
            tl.debug_barrier()  # all threads have written before one of them says so
            counter = arrived + first * tl.num_programs(0) + head
            before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            if before == count - 1:
                _join(sums, tops, weights, first, count, out, head, G, GP, D, DP, JOIN)
                tl.store(counter, 0)
        table, row, position, low, high, slot, first, count = after


@dataclass(frozen=True)
class Workspace:
    """Where parts of sequences lie until they are joined: for launches that run one after the other."""

    sums: torch.Tensor  # float32 (n,)
    tops: torch.Tensor
    weights: torch.Tensor
    arrived: torch.Tensor  # int32 (n,), all 0

    @staticmethod
    def of(slots: int, heads: int, size: int, device: torch.device) -> "Workspace":
        """For at most so many slots, query heads, and elements of a head."""
        sums, tops, weights = (torch.empty(slots * heads * n, device=device) for n in (size, 1, 1))
        return Workspace(sums, tops, weights, torch.zeros(slots * heads, dtype=torch.int32, device=device))


def shared_attention(
    q: torch.Tensor,
    keys: torch.Tensor | Scaled,
    values: torch.Tensor | Scaled,
    tables: torch.Tensor,
    segments: torch.Tensor,
    begins: torch.Tensor,
    y: torch.Tensor,
    space: Workspace,
    *,
    scale: float,
    cut: Tiling,
) -> None:
    """Writes the rows of y (T, Hq * d) that segments name. `cut` reads as many keys at a time as the plan's tiles
    have, or a part of them. Raises BackendError for shapes and types that the kernel can't do."""
    (keys, key_scales), (values, value_scales) = parts(keys), parts(values)
    (_blocks, block_size, kv_heads, size), heads = keys.shape, q.shape[1]
    group, workers = checked(q, keys, values, tables, segments, y), len(begins) - 1
    for codes, scales in ((keys, key_scales), (values, value_scales)):
        check_scales(NAME, codes, scales)
    require(NAME, begins.dtype == torch.int32 and segments.shape[1] == 8, f"segments {segments.shape}, {begins.dtype}")
    require(NAME, cut.tokens == 1, f"a segment has one token, not {cut.tokens}")
    require(NAME, len(space.sums) >= 2 * workers * heads * size, f"{len(space.sums)} floats for {workers} workers")
    padded, pdl, together = power(size, 16), chained(q.device), power(group)
    _attend_shares[(kv_heads, workers)](
        q, keys, values, key_scales, value_scales, tables, segments, begins, y,
        space.sums, space.tops, space.weights, space.arrived, scale * LOG2E,
        q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), keys.stride(2), y.stride(0),
        G=group, GP=together, D=size, DP=padded, BLOCK=block_size, R=max(together, 16), TILE=cut.keys,
        JOIN=joined(group, size, cut.warps), PRECISION=precision(q.dtype), PDL=pdl, num_warps=cut.warps,
        num_stages=cut.stages, launch_pdl=pdl,
    )  # fmt: skip


def joined(group: int, size: int, warps: int) -> int:
    """Parts that are joined at a time, a power of two."""
    return max(JOINED * warps // (power(group) * power(size, 16)), 1)
