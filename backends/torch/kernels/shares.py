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

Where `new` is given, this is also what kernels/rope.py does, for the tokens that segments name: each program norms and
rotates its own queries, and the one with a sequence's last key first makes and stores the new k and v.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.fp8 import Scaled, parts
from llmrs.backends.torch.kernels.attention import LEAST, LOG2E, Tiling, checked, over_keys, places, queries
from llmrs.backends.torch.kernels.fp8 import check_scales, in_half
from llmrs.backends.torch.kernels.launch import chained, check_rows, power, precision, require
from llmrs.backends.torch.kernels.rope import keep
from llmrs.backends.torch.kernels.rows_few import fetch

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
def _fetch_first(keys, values, base, D: tl.constexpr, DP: tl.constexpr):
    """Asks for a tile while the kernel ahead still runs: where it writes to it, the L2 cache has what it wrote."""
    LINE: tl.constexpr = 1024 // keys.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = DP // LINE if DP > LINE else 1
    at = base[:, None] + tl.minimum(tl.arange(0, LINES) * LINE, D - 1)[None, :]
    fetch(keys + at)
    fetch(values + at)


@triton.jit
def _turned_whole(x, other, w, turns, position, sines, d, eps, offset, D: tl.constexpr, NORM: tl.constexpr):
    """Queries x (R, d) after norm and rotation, as rope.py's `turned`; `other` has their halves in turn."""
    HALF: tl.constexpr = D // 2
    a, b = x.to(tl.float32), other.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(a * a, 1) / D + eps)[:, None]
        wa = tl.load(w + d, mask=d < D, other=0.0).to(tl.float32) + offset
        wb = tl.load(w + (d + HALF) % D).to(tl.float32) + offset
        a = (a * scale * wa[None, :]).to(x.dtype).to(tl.float32)
        b = (b * scale * wb[None, :]).to(x.dtype).to(tl.float32)
    angle = turns + position.to(tl.int64) * HALF + d % HALF
    cos = tl.load(angle, mask=d < D, other=0.0)[None, :]
    sin = tl.load(angle + sines, mask=d < D, other=0.0)[None, :]
    return tl.where((d < HALF)[None, :], a * cos - b * sin, a * cos + b * sin).to(x.dtype)


@triton.jit
def _keep_new(
    k, v, kw, turns, keys, values, key_scales, value_scales, table, row, position, head, eps, offset, sines,
    k_row, k_head, v_row, v_head, key_block, key_token,
    D: tl.constexpr, HALF_P: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """A new token's k and v of one head into the cache, of which `keys` and the rest point to that head."""
    HALF: tl.constexpr = D // 2
    half, one = tl.arange(0, HALF_P), tl.zeros([1, 1], tl.int64)
    angle = turns + position.to(tl.int64) * HALF + half
    cos = tl.load(angle, mask=half < HALF, other=0.0)
    sin = tl.load(angle + sines, mask=half < HALF, other=0.0)
    block = tl.load(table + position // BLOCK).to(tl.int64)
    base = one + block * key_block + (position % BLOCK) * key_token
    keep(k, v, row.to(tl.int64), head + one, one == 0, kw, cos, sin, half, eps, offset, keys, values, key_scales,
         value_scales, base, k_row, k_head, v_row, v_head, D, HALF, NORM)  # fmt: skip


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
    k, v, qw, kw, turns, eps, offset, sines,
    q_row, q_head, key_block, key_token, key_head, y_row, k_row, k_head, v_row, v_head,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
    TILE: tl.constexpr, JOIN: tl.constexpr, NORM: tl.constexpr, HALF_P: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    head, worker = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(begins + worker), tl.load(begins + worker + 1)
    table, row, position, low, high, slot, first, count = _segment(segments, begin)
    keys += head * key_head
    values += head * key_head
    if PDL:
        _fetch_first(keys, values, places(tables + table, low, high, key_block, key_token, BLOCK, TILE), D, DP)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    r, d = tl.arange(0, R), tl.arange(0, DP)
    if key_scales is not None:
        key_scales += head * (key_head // D)
        value_scales += head * (key_head // D)
    for n in range(begin, end):
        after = _segment(segments, n + 1)  # asked for now, since its keys wait for it
        x, mine, seen_from, heads = queries(q, row, 1, position, head, r, d, q_row, q_head, G, D)
        if k is not None:
            other, _mine, _from, _heads = queries(q, row, 1, position, head, r, (d + D // 2) % D, q_row, q_head, G, D)
            x = _turned_whole(x, other, qw, turns, position, sines, d, eps, offset, D, NORM)
            if high > position:
                _keep_new(k, v, kw, turns, keys, values, key_scales, value_scales, tables + table, row, position, head,
                          eps, offset, sines, k_row, k_head, v_row, v_head, key_block, key_token,
                          D, HALF_P, BLOCK, NORM)  # fmt: skip
                tl.debug_barrier()  # all threads have written before any of them reads it with the other keys
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
class New:
    """What the step's tokens bring: their k and v, and how k and queries are normed, if so, and rotated."""

    k: torch.Tensor  # (T, Hk, d), any strides but the last, and v (T, Hk, d)
    v: torch.Tensor
    norms: tuple[torch.Tensor, torch.Tensor] | None  # weights (d,) for q and k
    turns: torch.Tensor  # float32 (2, positions, d / 2): cos and sin
    eps: float = 0.0
    offset: float = 0.0

    def checked(self, q: torch.Tensor, kv_heads: int) -> tuple[object, ...]:
        """The kernel's arguments. Raises BackendError."""
        (tokens, _, size), (qw, kw) = q.shape, self.norms or (None, None)
        weights = [w.shape for w in self.norms or ()]
        check_rows(NAME, self.k, self.v)
        require(NAME, self.k.dtype == q.dtype and self.k.shape == (tokens, kv_heads, size), f"k is {self.k.shape}")
        require(NAME, self.turns.shape[::2] == (2, size // 2) and self.turns.is_contiguous(), "turns have other shapes")
        require(NAME, size % 2 == 0 and all(w == (size,) for w in weights), f"norms for heads of {size}")
        return self.k, self.v, qw, kw, self.turns, float(self.eps), float(self.offset), self.turns.stride(0)


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
    new: New | None = None,
) -> None:
    """Writes the rows of y (T, Hq * d) that segments name, and what is `new` into the cache.

    `cut` reads as many keys at a time as the plan's tiles have, or a part of them. Raises BackendError for shapes and
    types that the kernel can't do.
    """
    (keys, key_scales), (values, value_scales) = parts(keys), parts(values)
    (_blocks, block_size, kv_heads, size), heads = keys.shape, q.shape[1]
    group, workers = checked(q, keys, values, tables, segments, y), len(begins) - 1
    for codes, scales in ((keys, key_scales), (values, value_scales)):
        check_scales(NAME, codes, scales)
    require(NAME, begins.dtype == torch.int32 and segments.shape[1] == 8, f"segments {segments.shape}, {begins.dtype}")
    require(NAME, cut.tokens == 1, f"a segment has one token, not {cut.tokens}")
    require(NAME, len(space.sums) >= 2 * workers * heads * size, f"{len(space.sums)} floats for {workers} workers")
    padded, pdl, together = power(size, 16), chained(q.device), power(group)
    fresh = new.checked(q, kv_heads) if new else (None, None, None, None, None, 0.0, 0.0, 0)
    strides = (*new.k.stride()[:2], *new.v.stride()[:2]) if new else (0, 0, 0, 0)
    _attend_shares[(kv_heads, workers)](
        q, keys, values, key_scales, value_scales, tables, segments, begins, y,
        space.sums, space.tops, space.weights, space.arrived, scale * LOG2E, *fresh,
        q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), keys.stride(2), y.stride(0),
        *strides,
        G=group, GP=together, D=size, DP=padded, BLOCK=block_size, R=max(together, 16), TILE=cut.keys,
        JOIN=joined(group, size, cut.warps), NORM=bool(new and new.norms), HALF_P=power(size // 2),
        PRECISION=precision(q.dtype), PDL=pdl, num_warps=cut.warps, num_stages=cut.stages, launch_pdl=pdl,
    )  # fmt: skip


def joined(group: int, size: int, warps: int) -> int:
    """Parts that are joined at a time, a power of two."""
    return max(JOINED * warps // (power(group) * power(size, 16)), 1)
