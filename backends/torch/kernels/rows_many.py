"""Up to 512 rows through a matrix on Hopper's tensor cores: kernel and launcher; `rows.py` says what it computes.

    x (M, K), w (N, K) or with a gate (2 N, K), bias, more (M, N) -> y (M, N)

The weights are the left operand, so that few rows of x leave no part of a product idle: a program multiplies EACH rows
of w with COUNT of x, PART columns at a time, (EACH, PART) x (PART, COUNT), over SPAN columns of K. Where one range is
not all of K, its sums go to a workspace, and the last program of a tile to arrive adds them in the order of the ranges,
so that the same bits come each time, and does the rest.

Launches that run one after the other share a workspace, as all of a model's do: sums that nobody keeps, and counters
that are 0 between launches. Chained kernels touch it only after their wait.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product as combined
from typing import Any

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import power, precision, require
from llmrs.backends.torch.kernels.rows_few import columns, fetch, finish, lines

NAME = "rows"
MANY = 512  # rows
PROGRAMS = 132  # that run at once on an H100 with all bandwidth to themselves
TILE = 2**15  # elements of a program's sums that registers have room for; half of it where K is split
SHARED = 110 * 1024  # bytes of a program, so that two fit
CACHE, ONE = 5.5e6, 65e3  # bytes a microsecond from the L2 cache: to all multiprocessors, and to one; both are guesses
JOIN = 1.5  # microseconds from a program's last product to the sums of the others: three trips to the L2 cache


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: rows of w, rows of x and columns at a time, ranges of columns, warps, tiles on their way,
    and whether the next kernel may start as soon as this one has."""

    each: int
    count: int
    part: int
    split: int
    warps: int = 4
    stages: int = 4
    early: bool = True

    def programs(self, rows: int, results: int) -> int:
        return triton.cdiv(results, self.each) * triton.cdiv(rows, self.count) * self.split


@dataclass(frozen=True)
class Workspace:
    """What programs of one tile pass each other: sums, and how many have arrived."""

    sums: torch.Tensor  # float32
    arrived: torch.Tensor  # int32, one a tile

    @staticmethod
    def on(device: torch.device) -> "Workspace":
        """For the largest launch there is, so that recorded graphs can rely on it."""
        sums = torch.empty(PROGRAMS * TILE, dtype=torch.float32, device=device)
        return Workspace(sums, torch.zeros(2 * PROGRAMS, dtype=torch.int32, device=device))


@cache
def workspace(device: torch.device) -> Workspace:
    """Of launches that bring none, as tests do, on one stream. Made before any is recorded."""
    assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
    with torch.inference_mode(False):  # it outlives the block that first needs it
        return Workspace.on(device)


@lru_cache(maxsize=1024)
def cut_many(rows: int, results: int, width: int, size: int, gate: bool) -> Tiles:
    """The tiles that take the least time on paper, with as many on their way as fit; float32 is for small models."""
    eaches, most = ((16,), 16) if size > 2 else ((64, 128), power(rows, 16))
    counts, part = [n for n in (16, 32, 64, 128, 256) if n <= most], 32 if size > 2 else 64
    tried = [
        Tiles(each, count, part, split)
        for each, count, split in combined(eaches, counts, (1, 2, 3, 4, 6, 8))
        if each * count * (1 + gate) <= TILE // (1 + (split > 1)) and split <= triton.cdiv(width, part)
    ]
    tried = [t for t in tried if t.split == 1 or t.programs(rows, results) <= 2 * PROGRAMS]
    best = min(tried, key=lambda t: on_paper(t, rows, results, width, size, gate))
    stage = part * size * (best.each * (1 + gate) + best.count)
    twice = size == 2 and 8 * stage <= SHARED
    warps = 4 if best.each * best.count * (1 + gate) <= TILE // 4 else 8
    stages = min(max(SHARED // (stage * (1 + twice)), 3), 5)
    return Tiles(best.each, best.count, part * (1 + twice), best.split, warps, stages)


def on_paper(t: Tiles, rows: int, results: int, width: int, size: int, gate: bool) -> float:
    """Microseconds: all programs' loads from the L2 cache, or those of one multiprocessor; then to add up ranges."""
    programs = t.programs(rows, results)
    own = triton.cdiv(width, t.split) * size * (t.each * (1 + gate) + t.count)
    sums = (t.split + 1) * t.each * t.count * 4 * (1 + gate)
    joined = JOIN + sums / ONE if t.split > 1 else 0
    return max(programs * own / CACHE, triton.cdiv(programs, PROGRAMS) * own / ONE) + joined


@triton.jit
def _end(
    a, b, m, n, bias, more, y, M, N, more_row, y_row,
    GATE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """`finish` of sums (EACH, COUNT) of results n (EACH, 1) and rows m (1, COUNT)."""
    there, place, added = (n < N) & (m < M), tl.minimum(m, M - 1).to(tl.int64), 0.0
    if ADD:
        added = tl.load(more + place * more_row + n, mask=there, other=0.0)
    finish(a, b, n, bias, added, y + place * y_row + n, there, N, GATE, BIAS, ADD)


@triton.jit
def _added(at, SPLIT: tl.constexpr, STEP: tl.constexpr):
    """The sum of SPLIT tiles, STEP apart, in their order. Others wrote them just now: read past the L1 cache."""
    total = tl.load(at, cache_modifier=".cg")
    for split in tl.static_range(1, SPLIT):
        total += tl.load(at + split * STEP, cache_modifier=".cg")
    return total


@triton.jit(do_not_specialize=["M"])
def many(
    x, w, bias, more, y, sums, arrived, M, N, x_row, w_row, more_row, y_row,
    K: tl.constexpr, PART: tl.constexpr, EACH: tl.constexpr, COUNT: tl.constexpr, SPLIT: tl.constexpr,
    SPAN: tl.constexpr, LINES: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    PDL: tl.constexpr, EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * EACH + tl.arange(0, EACH))[:, None]
    m, k = tl.program_id(2) * COUNT + tl.arange(0, COUNT), tl.arange(0, PART)[None, :]
    first = tl.program_id(1) * SPAN
    gate_rows = w + tl.minimum(n, N - 1).to(tl.int64) * w_row  # (EACH, 1)
    up_rows = w + (tl.minimum(n, N - 1) + N).to(tl.int64) * w_row
    if PDL:
        fetch(lines(gate_rows, first, K, LINES))
        if GATE:
            fetch(lines(up_rows, first, K, LINES))
        if BIAS:
            fetch(bias + tl.minimum(n, N - 1))
        tl.extra.cuda.gdc_wait()  # nothing that another kernel makes is read before, and no sum is stored
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
    x_at, x_there = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * x_row + k, (m < M)[:, None]
    a = tl.zeros([EACH, COUNT], tl.float32)
    b = tl.zeros([EACH, COUNT], tl.float32)
    for begin in range(first, tl.minimum(first + SPAN, K), PART):
        value = columns(x_at, x_there, begin, k, K, PART).T  # (PART, COUNT)
        a = tl.dot(columns(gate_rows + k, k >= 0, begin, k, K, PART), value, a, input_precision=PRECISION)
        if GATE:
            b = tl.dot(columns(up_rows + k, k >= 0, begin, k, K, PART), value, b, input_precision=PRECISION)
    if PDL and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLIT == 1:
        _end(a, b, m[None, :], n, bias, more, y, M, N, more_row, y_row, GATE, BIAS, ADD)
    else:
        tile = tl.program_id(0) + tl.program_id(2) * tl.num_programs(0)
        STEP: tl.constexpr = EACH * COUNT * (2 if GATE else 1)
        inside = tl.arange(0, EACH)[:, None] + tl.arange(0, COUNT)[None, :] * EACH  # as results lie in y
        at = sums + tile * SPLIT * STEP + inside
        own = at + tl.program_id(1) * STEP
        tl.store(own, a)
        if GATE:
            tl.store(own + EACH * COUNT, b)
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            tl.store(arrived + tile, 0)
            total, other = _added(at, SPLIT, STEP), 0.0
            if GATE:
                other = _added(at + EACH * COUNT, SPLIT, STEP)
            _end(total, other, m[None, :], n, bias, more, y, M, N, more_row, y_row, GATE, BIAS, ADD)


def launch_many(
    tensors: list[torch.Tensor], sizes: list[int], cut: Tiles, shared: dict[str, Any], space: Workspace | None
) -> None:
    """`tensors` x, w, bias, more, y; `sizes` M, N and the strides; `shared` the constants of all three kernels."""
    (rows, results), width, gate = sizes[:2], shared["K"], bool(shared["GATE"])
    own = of_many(cut, width, tensors[0].dtype)
    split, elements = own["SPLIT"], cut.each * cut.count * (1 + gate)
    found = space or workspace(tensors[0].device)
    tiles = cut.programs(rows, results) // cut.split
    fits = split == 1 or (tiles <= len(found.arrived) and tiles * split * elements <= len(found.sums))
    require(NAME, fits, f"{tiles} tiles of {elements} sums in {split} ranges")
    grid = (triton.cdiv(results, cut.each), split, triton.cdiv(rows, cut.count))
    many[grid](*tensors, found.sums, found.arrived, *sizes, **shared, **own)


def of_many(cut: Tiles, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """The kernel's constants that follow from a cut, and the number of stages. No range is empty."""
    span = triton.cdiv(triton.cdiv(width, cut.part), cut.split) * cut.part
    return {
        "COUNT": cut.count, "SPLIT": triton.cdiv(width, span), "SPAN": span,
        "LINES": power(triton.cdiv(span * dtype.itemsize, 128)), "PRECISION": precision(dtype),
        "num_stages": cut.stages,
    }  # fmt: skip
