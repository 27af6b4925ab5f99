"""Quantizes matrices to the block types of GGUF, for the least squared error of the weights."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmrs.core.errors import ModelError, did_you_mean
from llmrs.quant import pack_ggml as pack
from llmrs.quant.form import IQ4, SUPER_BLOCK
from llmrs.quant.ggml import TYPES
from llmrs.quant.quantizer_ops import NUMPY_OPS, Array, QuantizerOps
from llmrs.quant.scale_search import Groups, Levels, Line, Store, extreme, inverse, refine, search

HALF_TINY = 2.0**-24  # the smallest positive f16
LARGEST = 2.0**30  # beyond what any type holds: f16's 65504 * 128 * 127
CANDIDATES = (-0.8, -0.4, -0.1, 0.2, 0.5, 0.8)


@dataclass(frozen=True)
class Recipe:
    """How a type is quantized."""

    group: int
    levels: Levels
    pack: Callable[..., np.ndarray]  # of quant/pack_ggml.py
    scales: tuple[int, int] | None = None  # integer scales, and offsets, of a super-block; None: each is an f16


def _scale(low: int, high: int) -> Levels:
    return Levels(low, high, CANDIDATES)


def _line(high: int, bounded: bool = False) -> Levels:
    return Levels(0, high, CANDIDATES, offset=True, bounded=bounded)


IQ4_LEVELS = Levels(-127, 113, (-12, -6, 0, 6, 12), table=tuple(float(v) for v in IQ4))
RECIPES = {
    "q4_0": Recipe(32, _scale(-8, 7), pack.q4_0),
    "q4_1": Recipe(32, _line(15), pack.q4_0),
    "q5_0": Recipe(32, _scale(-16, 15), pack.q5_0),
    "q5_1": Recipe(32, _line(31), pack.q5_0),
    "q8_0": Recipe(32, _scale(-127, 127), pack.q8_0),
    "q2_k": Recipe(16, _line(3, bounded=True), pack.q2_k, (0, 15)),
    "q3_k": Recipe(16, _scale(-4, 3), pack.q3_k, (-32, 31)),
    "q4_k": Recipe(32, _line(15, bounded=True), pack.q4_k, (0, 63)),
    "q5_k": Recipe(32, _line(31, bounded=True), pack.q5_k, (0, 63)),
    "q6_k": Recipe(16, _scale(-32, 31), pack.q6_k, (-128, 127)),
    "iq4_nl": Recipe(32, IQ4_LEVELS, pack.q4_0),
    "iq4_xs": Recipe(32, IQ4_LEVELS, pack.iq4_xs, (-32, 31)),
}
IQ4_INDEX = np.zeros(256, np.uint8)
IQ4_INDEX[(IQ4 + 127).astype(int)] = np.arange(16)


def quantize(
    x: np.ndarray, kind: str, importance: np.ndarray | None = None, ops: QuantizerOps = NUMPY_OPS
) -> np.ndarray:
    """Blocks uint8 (N, row bytes) of weights float32 (N, K), in a type of RECIPES, as quant/ggml.py reads them.

    `importance` (K,), not negative: squared errors of the columns count that much. What is too large for a type
    becomes its largest value. The bytes depend on no other rows, and on no number of threads.

    Raises ValueError where blocks do not divide K, and ModelError for a type that is not in RECIPES and for weights or
    importance that are NaN or infinite.
    """
    if kind not in RECIPES:
        raise ModelError(f"weights can't be quantized to {kind!r}", did_you_mean(kind, RECIPES))
    (rows, columns), block = x.shape, TYPES[kind].block
    if columns % block:
        raise ValueError(f"rows of {columns} weights are no blocks of {block}, as {kind} has them")
    parts = ops.map(lambda part: _quantize(ops, kind, *part), _parts(x, block, importance, ops.chunk // block))
    return np.concatenate([*parts, np.empty((0, TYPES[kind].block_bytes), np.uint8)]).reshape(rows, -1)


def _parts(
    x: np.ndarray, block: int, importance: np.ndarray | None, count: int
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Blocks (count, block), and their importance."""
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, block)
    parts = [blocks[n : n + count] for n in range(0, len(blocks), count)]
    if importance is None:
        return [(part, None) for part in parts]
    row = np.ascontiguousarray(importance, np.float32).reshape(-1, block)
    return [(p, row[np.arange(n * count, n * count + len(p)) % len(row)]) for n, p in enumerate(parts)]


def _quantize(ops: QuantizerOps, kind: str, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Blocks (B, block) to bytes (B, block bytes)."""
    recipe = RECIPES[kind]
    weights = ops.upload(np.clip(x, -LARGEST, LARGEST).reshape(-1, recipe.group))
    counts = None if importance is None else ops.upload(importance.reshape(-1, recipe.group))
    groups = Groups(ops, weights, counts)
    fitted = search(groups, recipe.levels)
    store, supers = _halves(ops), ()
    if recipe.scales is not None:
        store, supers = _super_block(ops, fitted, SUPER_BLOCK // recipe.group, recipe.scales)
    fit = refine(groups, recipe.levels, fitted, store)
    codes = ops.download(fit.codes - recipe.levels.low, np.uint8).T.reshape(x.shape)
    if recipe.levels.table:
        codes = IQ4_INDEX[codes]
    return recipe.pack(codes, *(ops.download(s, np.float32).reshape(len(x), -1) for s in (*fit.stored, *supers)))


def _halves(ops: QuantizerOps) -> Store:
    """Scale and offset are f16."""

    def store(scale: Array, offset: Array | None) -> Line:
        step = _half(ops, scale)
        if offset is None:
            return Line(step, None, (step,))
        offset = ops.half(offset)
        return Line(step, offset, (step, offset))

    return store


def _half(ops: QuantizerOps, x: Array) -> Array:
    """f16; what is not zero stays so."""
    tiny = ops.where(x > 0, HALF_TINY, ops.where(x < 0, -HALF_TINY, x))
    return ops.where((x < HALF_TINY) & (x > -HALF_TINY), tiny, ops.half(x))


def _super_block(
    ops: QuantizerOps, fitted: tuple[Array, Array | None], groups: int, bounds: tuple[int, int]
) -> tuple[Store, tuple[Array, ...]]:
    """Scales, and offsets, are integers times an f16 of a super-block; these f16."""
    (scale, offset), (low, high) = fitted, bounds
    low_or_high = float(high if low == 0 else low)

    def of_super(x: Array) -> Array:
        return _half(ops, extreme(ops, x.reshape(-1, groups), 1) / low_or_high)

    def rounded(x: Array, d: Array) -> tuple[Array, Array]:
        integer = ops.nearest(x.reshape(-1, groups), inverse(ops, d)[:, None], low, high)
        return integer.reshape(-1), (integer * d[:, None]).reshape(-1)

    d = of_super(scale)
    dmin = None if offset is None else of_super(-offset)

    def store(scale: Array, offset: Array | None) -> Line:
        integer, step = rounded(scale, d)
        if offset is None or dmin is None:
            return Line(step, None, (integer,))
        minimum, product = rounded(-offset, dmin)
        return Line(step, -product, (integer, minimum))

    return store, (d,) if dmin is None else (d, dmin)
