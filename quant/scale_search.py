"""Scales of groups of weights, by least squares.

A group holds w = step * code + offset, or w = step * code. The search rounds it to codes for a few steps around
(max - min) / (levels - 1), or peak / low, and takes those codes whose own best line, in closed form, leaves the least
error; the gain follows from sums, without a residual. Then scale and offset are stored in the format's precision, the
codes follow from what is stored, and the line through these codes is tried once more.

Matrices are (G, n): the G weights of n groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llmrs.quant.quantizer_ops import Array, QuantizerOps

SMALLEST = 1e-30  # steps below are zero: their inverse overflows
# By this much, a gain is larger. Where one weight stands out and all others have one code, its code is of no account:
# the first candidate wins, whose step is small, as the largest step of a super-block is the unit of all.
TIE = 1 + 1e-5
# Where the smallest and the largest weight are tried, relative to the first and the last code. Chosen greedily out of
# 400, for normal, Laplace, Student and uniform weights and such with outliers, at 2, 4 and 5 bits.
ENDS = (
    (-0.2, 0.2), (0.1, 0.5), (-0.4, -0.1), (-0.2, -1.0), (-0.1, 0.4),
    (-0.3, 0.1), (-0.5, -0.3), (-0.1, -1.9), (0.3, -0.1), (0.1, -0.8),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Levels:
    """Codes within [low, high]: integers, or the entries of `table`."""

    low: int
    high: int
    peaks: tuple[float, ...] = ()  # codes that the weight of the largest magnitude is tried at; none: with an offset
    bounded: bool = False  # the first code is at zero or below, as the offsets of a super-block have one sign
    table: np.ndarray | None = None  # of integers

    def nearest(
        self, ops: QuantizerOps, x: Array, factor: Array | float, shift: float = 0, out: Array | None = None
    ) -> Array:
        """The codes of x * factor + shift; `out` may be overwritten."""
        if self.table is None:
            return ops.nearest(x, factor, shift, self.low, self.high, out)
        last = 2 * (self.high - self.low)
        return ops.take(self.nearest_in_table, ops.nearest(x, 2 * factor, 2 * (shift - self.low) - 0.5, 0, last, out))

    @cached_property
    def nearest_in_table(self) -> np.ndarray:
        """The entry that is nearest to n / 2 + 1 / 4 above the lowest code; two of them lie n / 2 or n apart."""
        assert self.table is not None
        y = np.arange(self.low + 0.25, self.high + 0.5, 0.5)
        return self.table[np.abs(y[:, None] - self.table).argmin(1)]


@dataclass(frozen=True)
class Groups:
    """Weights and, if not all count the same, their importance; both (G, n)."""

    ops: QuantizerOps
    x: Array
    importance: Array | None = None

    def weighted(self, y: Array) -> Array:
        return y if self.importance is None else y * self.importance

    @cached_property
    def count(self) -> Array | float:
        return float(len(self.x)) if self.importance is None else self.ops.sum(self.importance)

    @cached_property
    def total(self) -> Array:
        return self.ops.sum(self.weighted(self.x))

    @cached_property
    def squares(self) -> Array:
        return self.ops.dot(self.weighted(self.x), self.x)


@dataclass(frozen=True)
class Line:
    """w = step * code + offset of each group, (n,), as the file can express it; `stored` is what enters it."""

    step: Array
    offset: Array | None
    stored: tuple[Array, ...]


Store = Callable[[Array, Array | None], Line]  # scale, offset -> the nearest line that can be stored


def inverse(ops: QuantizerOps, x: Array) -> Array:
    return ops.where((x > SMALLEST) | (x < -SMALLEST), 1 / x, 0.0)


def extreme(ops: QuantizerOps, x: Array, axis: int) -> Array:
    """The value of the largest magnitude."""
    low, high = ops.min(x, axis), ops.max(x, axis)
    return ops.where(high > -low, high, low)


def search(groups: Groups, levels: Levels) -> tuple[Array, Array | None]:
    """Scale and offset of each group, (n,)."""
    return (_search_scale(groups, levels), None) if levels.peaks else _search_line(groups, levels)


def _search_scale(groups: Groups, levels: Levels) -> Array:
    ops, peak = groups.ops, extreme(groups.ops, groups.x, 0)
    t = groups.x * inverse(ops, peak)  # 1 at the peak
    gain, step, codes = peak * 0 - 1, peak * 0, None
    for code in levels.peaks:
        codes = levels.nearest(ops, t, code, out=codes)
        weighted = groups.weighted(codes)
        product, square = ops.dot(weighted, t), ops.dot(weighted, codes)
        gain, step = _best(ops, (gain, step), (product * product / square, product / square))
    return step * peak


def _search_line(groups: Groups, levels: Levels) -> tuple[Array, Array]:
    ops, low = groups.ops, groups.ops.min(groups.x, 0)
    if levels.bounded:
        low = ops.clip(low, -float("inf"), 0.0)
    span = ops.max(groups.x, 0) - low
    scale = inverse(ops, span)
    t = (groups.x - low) * scale  # within [0, 1]
    total = ops.sum(groups.weighted(t))
    bound = -low * scale if levels.bounded else None
    zero = span * 0
    best, codes = (zero - float("inf"), zero + 1 / levels.high, zero), None  # gain, step, offset
    for first, last in ENDS:
        codes = levels.nearest(ops, t, levels.high + last - first, first, codes)
        best = _best(ops, best, _line(groups, codes, t, total, 1 / levels.high, bound), TIE)
    return best[1] * span, low + best[2] * span


def _best(ops: QuantizerOps, old: tuple[Array, ...], new: tuple[Array, ...], margin: float = 1.0) -> tuple[Array, ...]:
    """The new ones where their first entry is larger by this factor."""
    better = new[0] > old[0] * margin
    return tuple(ops.where(better, x, y) for x, y in zip(new, old, strict=True))


def _line(
    groups: Groups, codes: Array, y: Array, total: Array, alone: Array | float, bound: Array | None
) -> tuple[Array, Array, Array]:
    """The line y = step * code + offset of the least error, with offset <= bound.

    Returns by how much its error is less than that of the mean, step, and offset. `total` is of y; `alone`: the step
    where all codes are equal.
    """
    ops, count, weighted = groups.ops, groups.count, groups.weighted(codes)
    first, square, product = ops.sum(weighted), ops.dot(weighted, codes), ops.dot(weighted, y)
    mean = total / count
    covariance, variance = product - first * mean, square - first * first / count
    step = ops.where(variance > 1e-5 * square, covariance / variance, alone)
    gain, offset = covariance * step, mean - step * first / count
    if bound is None:
        return gain, step, offset
    over, product = offset > bound, product - bound * first
    slope = ops.where(square > 0, product / square, alone)
    bounded_gain = product * slope - (bound - mean) * (bound - mean) * count
    return ops.where(over, bounded_gain, gain), ops.where(over, slope, step), ops.where(over, bound, offset)


@dataclass(frozen=True)
class _Fit:
    line: Line
    y: Array  # (G, n) weights without the offset
    codes: Array  # (G, n) float32
    error: Array  # (n,) sum of squares


def refine(
    groups: Groups, levels: Levels, fitted: tuple[Array, Array | None], store: Store
) -> tuple[Array, tuple[Array, ...]]:
    """Codes (G, n) of a scale and an offset as they are stored, or of the line through these codes, if that is better.

    Also returns what is stored.
    """
    old = _fit(groups, levels, store(*fitted))
    new = _fit(groups, levels, store(*_refit(groups, levels, old)))
    _, codes, *stored = _best(
        groups.ops, (-old.error, old.codes, *old.line.stored), (-new.error, new.codes, *new.line.stored)
    )
    return codes, tuple(stored)


def _fit(groups: Groups, levels: Levels, line: Line) -> _Fit:
    ops, constant = groups.ops, groups.squares
    y = groups.x if line.offset is None else groups.x - line.offset
    residual = y * inverse(ops, line.step)  # in steps
    codes = levels.nearest(ops, residual, 1.0)
    residual -= codes
    if line.offset is not None:
        constant = constant - line.offset * (2 * groups.total - line.offset * groups.count)
    squares = ops.dot(groups.weighted(residual), residual) * line.step * line.step
    return _Fit(line, y, codes, ops.where(line.step == 0, constant, squares))


def _refit(groups: Groups, levels: Levels, fit: _Fit) -> tuple[Array, Array | None]:
    """The best line through the codes."""
    ops, line = groups.ops, fit.line
    if line.offset is None:
        weighted = groups.weighted(fit.codes)
        square = ops.dot(weighted, fit.codes)
        return ops.where(square > 0, ops.dot(weighted, fit.y) / square, line.step), None
    total = groups.total - line.offset * groups.count
    bound = -line.offset if levels.bounded else None
    _, step, offset = _line(groups, fit.codes, fit.y, total, line.step, bound)
    return step, line.offset + offset
