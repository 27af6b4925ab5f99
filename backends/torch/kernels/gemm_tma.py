"""Two to 512 rows through a matrix on Hopper's tensor cores: kernel and launcher; `rows.py` says what it computes.

    x (M, K), w (N, K) or with a gate (2 N, K), bias -> y (M, N), or float32 (S, M, N): sums of S ranges of columns

The weights are the left operand, so that few rows of x leave no part of a product idle: a program multiplies EACH rows
of w with COUNT of x, PART columns at a time, (EACH, PART) x (PART, COUNT), over `span` columns of K. One thread asks
the copy engine for whole tiles (tensor descriptors, TMA), so many at a time that one program on each multiprocessor
keeps the memory busy; what lies beyond the end of x or w comes as zeros.

Where there are too few results to fill the device, K is cut into ranges. Their sums are for the norm that follows to
add up (`norm.py`), in their order, so that the same bits come each time, and no program waits for another.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product as combined

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from llmrs.backends.torch.kernels.gemv import fetch, finish, lines
from llmrs.backends.torch.kernels.launch import chained, power, require

NAME = "rows"
MANY = 512  # rows
PROGRAMS = 132  # multiprocessors of an H100, on each of which one program has all shared memory, or two have half
LINES = 4  # of 128 bytes, of each row of w, that are asked for ahead of x
SPAN = 256  # columns of a range, at least
STAGES = {64: 8, 128: 5}  # tiles on their way at most, by columns
SPARE = 8 * 1024  # bytes of shared memory that no tile gets

# Of an H100, to choose among cuts; fitted to the times of products by themselves and of whole steps (docs/log.md)
MEMORY = 3e6  # bytes a microsecond
ONE, ARITHMETIC = 84e3, 4.4e6  # bytes and operations a microsecond of a program that has a multiprocessor to itself
BEYOND = 0.3  # what a row of a tile takes that lies beyond the end of x, beside one that does not
TWO = 1.4  # what two programs take that share a multiprocessor, beside one after the other
SUMS = 1.4e6  # bytes a microsecond at which the ranges' sums are written and read


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: rows of w, rows of x and columns at a time, ranges of columns, warps, tiles on their way."""

    each: int
    count: int
    part: int
    split: int = 1
    warps: int = 4
    stages: int = 4

    def programs(self, rows: int, results: int) -> int:
        return triton.cdiv(results, self.each) * triton.cdiv(rows, self.count) * self.split


@lru_cache(maxsize=1024)
def cut_many(rows: int, results: int, width: int, gate: bool, summed: bool, shared: int) -> Tiles:
    """The tiles that take the least time on paper, where a program may have `shared` bytes; in ranges only if they are
    `summed` later."""
    counts = [n for n in (16, 32, 64, 128, 256) if n <= power(rows, 16) and 4 * n >= rows]
    shapes = [*combined((64,), counts), *((128, n) for n in counts if n >= 64)]
    shapes.sort(key=lambda shape: (shape[0] == 128) == (rows % 128 == 0))  # the first of equals: what was faster
    splits = [n for n in (1, 2, 4, 6) if n == 1 or (summed and width >= n * SPAN)]
    tried = [
        filled(each, count, split, rows, results, gate, shared)
        for (each, count), split in combined(shapes, splits)
        if each * count * (1 + gate) <= (2**15 if rows > 128 else 2**14) and each * count * split <= 2**15
    ]
    tried = [t for t in tried if t.stages > 1 and (t.split == 1 or t.programs(rows, results) <= 2 * PROGRAMS)]
    return min(tried, key=lambda t: on_paper(t, rows, results, width, gate))


def filled(each: int, count: int, split: int, rows: int, results: int, gate: bool, shared: int) -> Tiles:
    """With as many tiles on their way as fit: wide ones, unless they would be too few. Where programs must take turns,
    two share a multiprocessor."""
    room = (shared - SPARE) // (2 * (each * (1 + gate) + count))  # columns
    twice = count >= 64 and room >= 6 * 64 and Tiles(each, count, 64, split).programs(rows, results) > PROGRAMS
    room //= 1 + twice
    part = 128 if room // 128 >= 4 - twice else 64
    warps = 8 if each * count * (1 + gate) > 2**14 else 4
    return Tiles(each, count, part, split, warps, min(room // part, STAGES[part]))


def on_paper(t: Tiles, rows: int, results: int, width: int, gate: bool) -> float:
    """Microseconds: what a program takes, as often as they must take turns, or the memory; and the ranges' sums."""
    programs, each = t.programs(rows, results), t.each * (1 + gate)
    loaded = each + t.count + BEYOND * (-rows % t.count)
    own = 2 * triton.cdiv(width, t.split) * max(loaded / ONE, each * t.count / ARITHMETIC)
    turns = max(programs, PROGRAMS) / PROGRAMS if programs <= 2 * PROGRAMS else 2 * triton.cdiv(programs, 2 * PROGRAMS)
    own *= turns * (TWO if turns > 1 else 1)
    sums = t.split * rows * results * 8 / SUMS if t.split > 1 else 0
    return max(own, 2 * results * (1 + gate) * width / MEMORY) + own / 2 + sums


@triton.jit(do_not_specialize=["M"])
def many(
    x_tiles, w_tiles, w, bias, y, M, N, K, w_row, y_row, span,
    PART: tl.constexpr, EACH: tl.constexpr, COUNT: tl.constexpr, LINES: tl.constexpr,
    GATE: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first_m, first_n, first_k = tl.program_id(0) * COUNT, tl.program_id(1) * EACH, tl.program_id(2) * span
    m, n = (first_m + tl.arange(0, COUNT))[None, :], (first_n + tl.arange(0, EACH))[:, None]
    if PDL:
        fetch(lines(w + tl.minimum(n, N - 1).to(tl.int64) * w_row, first_k, K, LINES))
        if GATE:
            fetch(lines(w + (tl.minimum(n, N - 1) + N).to(tl.int64) * w_row, first_k, K, LINES))
        if BIAS:
            fetch(bias + tl.minimum(n, N - 1))
        tl.extra.cuda.gdc_wait()  # nothing that another kernel makes is read before
        tl.extra.cuda.gdc_launch_dependents()
    a = tl.zeros([EACH, COUNT], tl.float32)
    b = tl.zeros([EACH, COUNT], tl.float32)
    for k in range(first_k, tl.minimum(first_k + span, K), PART):
        value = x_tiles.load([first_m, k]).T  # (PART, COUNT)
        a = tl.dot(w_tiles.load([first_n, k]), value, a)
        if GATE:
            b = tl.dot(w_tiles.load([first_n + N, k]), value, b)
    at = y + (tl.program_id(2) * M + m) * y_row + n
    finish(a, b, n, bias, 0.0, at, (n < N) & (m < M), N, GATE, BIAS, False)


def launch_many(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, gate: int, cut: Tiles) -> torch.Tensor:
    """(M, N) of x's type, or float32 (S, M, N), to be added up."""
    (rows, width), results = x.shape, len(w) // (2 if gate else 1)
    require(NAME, loadable(x) and loadable(w), f"x {x.shape}, {x.stride()}, w {w.shape}, {w.stride()} of {x.dtype}")
    span = triton.cdiv(triton.cdiv(width, cut.part), cut.split) * cut.part
    ranges, pdl = triton.cdiv(width, span), chained(x.device)  # no range is empty
    require(NAME, ranges == 1 or not (gate or bias is not None), f"{ranges} ranges with a gate or a bias")
    shape = (rows, results) if ranges == 1 else (ranges, rows, results)
    y = torch.empty(shape, dtype=x.dtype if ranges == 1 else torch.float32, device=x.device)
    many[triton.cdiv(rows, cut.count), triton.cdiv(results, cut.each), ranges](
        _tiles_of(x, cut.count, cut.part), _tiles_of(w, cut.each, cut.part), w, bias if bias is not None else x, y,
        rows, results, width, w.stride(0), results, span, PART=cut.part, EACH=cut.each, COUNT=cut.count, LINES=LINES,
        GATE=gate, BIAS=bias is not None, PDL=pdl, num_warps=cut.warps, num_stages=cut.stages, launch_pdl=pdl,
    )  # fmt: skip
    return y


def loadable(t: torch.Tensor) -> bool:
    """Whether the copy engine can load tiles of it, whose rows begin at multiples of 16 bytes, for the tensor cores."""
    aligned = t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0
    return t.element_size() == 2 and t.stride(1) == 1 and aligned


def _tiles_of(t: torch.Tensor, rows: int, part: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, part])
