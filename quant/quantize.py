"""Quantizes matrices to the block types of GGUF, for the least squared error of the weights."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmrs.core.errors import ConfigError, ModelError, did_you_mean
from llmrs.quant import pack_ggml as pack
from llmrs.quant.form import IQ4, SUPER_BLOCK
from llmrs.quant.ggml import TYPES
from llmrs.quant.quantizer_ops import NUMPY_OPS, Array, QuantizerOps
from llmrs.quant.scale_search import Groups, Levels, Line, Store, extreme, inverse, refine, search

HALF_TINY = 2.0**-24  # the smallest positive f16
LARGEST = 2.0**30  # beyond what any type holds: f16's 65504 * 128 * 127
RARE = 1e-6  # the least importance of a column, relative to the mean
PEAKS = (-0.6, -0.2, 0.1, 0.4, 0.7, 1.0, 1.3, 2.0)  # where the peak is tried, relative to the lowest code


@dataclass(frozen=True)
class Recipe:
    """How a type is quantized."""

    group: int
    levels: Levels
    pack: Callable[..., np.ndarray]  # of quant/pack_ggml.py
    scales: tuple[int, int] | None = None  # integer scales, and offsets, of a super-block; None: each is an f16


def _scale(low: int, high: int) -> Levels:
    return Levels(low, high, tuple(low + c for c in PEAKS))


def _line(high: int, bounded: bool = False) -> Levels:
    return Levels(0, high, bounded=bounded)


IQ4_LEVELS = Levels(-127, 113, (-139, -133, -127, -121, -115, 113), table=IQ4)
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
    "iq4_nl": Recipe(32, IQ4_LEVELS, pack.iq4_nl),
    "iq4_xs": Recipe(32, IQ4_LEVELS, pack.iq4_xs, (-32, 31)),
}


def quantize(x: np.ndarray, kind: str, importance: np.ndarray | None = None, device: str | None = None) -> np.ndarray:
    """Blocks uint8 (N, row bytes) of weights float32 (N, K), in a type of RECIPES, as quant/ggml.py reads them.

    `importance` (K,), not negative: squared errors of a column count that much. `device`: one of Torch, such as cuda;
    without it NumPy quantizes, on all cores. What is too large for a type becomes its largest value. The bytes of a
    row depend neither on other rows nor on the number of threads.

    Raises ConfigError for a type that is not in RECIPES, ValueError where its blocks do not divide K, and ModelError
    for weights or importance that are NaN or infinite.
    """
    if kind not in RECIPES:
        raise ConfigError(f"weights can't be quantized to {kind!r}", did_you_mean(kind, RECIPES))
    (rows, columns), t = x.shape, TYPES[kind]
    if columns % t.block:
        raise ValueError(f"{columns} columns can't be cut into blocks of {t.block} weights, as {kind} needs")
    ops = _ops(device)
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, t.block)
    row = _relative(importance, columns)
    row = None if row is None else row.reshape(-1, t.block)
    packed = np.empty((len(blocks), t.block_bytes), np.uint8)
    step = ops.chunk // t.block

    def part(begin: int) -> None:
        x = blocks[begin : begin + step]
        counts = None if row is None else row[np.arange(begin, begin + len(x)) % len(row)]
        packed[begin : begin + step] = _quantize(ops, RECIPES[kind], x, counts)

    ops.run(part, range(0, len(blocks), step))
    return packed.reshape(rows, columns // t.block * t.block_bytes)


def _ops(device: str | None) -> QuantizerOps:
    if device is None:
        return NUMPY_OPS
    from llmrs.quant.quantizer_torch import TorchOps

    return TorchOps(device)


def _relative(importance: np.ndarray | None, columns: int) -> np.ndarray | None:
    """To the mean, and not zero: a group that never mattered is quantized all the same."""
    if importance is None:
        return None
    if importance.shape != (columns,):
        raise ValueError(f"an importance of the shape {importance.shape} is none of {columns} columns")
    if not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise ModelError("the importance of a column is negative, NaN or infinite", "make the imatrix anew")
    mean = importance.mean(dtype=np.float64)
    return np.maximum(importance / mean, RARE).astype(np.float32) if mean else None


def _quantize(ops: QuantizerOps, recipe: Recipe, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Blocks (B, block) to bytes (B, block bytes)."""
    peak = max(x.max(), -x.min())  # NaN where there is one
    if not peak < np.inf:
        raise ModelError("a weight is NaN or infinite", "the file is damaged, or of a training run that diverged")
    if peak > LARGEST:
        x = np.clip(x, -LARGEST, LARGEST)
    weights = ops.upload(x.reshape(-1, recipe.group))
    groups = Groups(ops, weights, None if importance is None else ops.upload(importance.reshape(-1, recipe.group)))
    fitted = search(groups, recipe.levels)
    store, supers = _halves(ops), ()
    if recipe.scales is not None:
        store, supers = _integers(ops, fitted, SUPER_BLOCK // recipe.group, recipe.scales)
    codes, stored = refine(groups, recipe.levels, fitted, store)
    packed = ops.download(codes - recipe.levels.low, np.uint8).T.reshape(x.shape)
    return recipe.pack(packed, *(ops.download(s, np.float32).reshape(len(x), -1) for s in (*stored, *supers)))


def _halves(ops: QuantizerOps) -> Store:
    """Scale and offset are f16."""

    def store(scale: Array, offset: Array | None) -> Line:
        step = ops.half(scale)
        if offset is None:
            return Line(step, None, (step,))
        offset = ops.half(offset)
        return Line(step, offset, (step, offset))

    return store


def _integers(
    ops: QuantizerOps, fitted: tuple[Array, Array | None], groups: int, bounds: tuple[int, int]
) -> tuple[Store, tuple[Array, ...]]:
    """Scale and offset are integers, times an f16 of the super-block; and these f16, of the largest ones."""
    low, high = bounds
    (scale, offset), limit = fitted, float(low or high)

    def of_super(x: Array) -> Array:
        unit = extreme(ops, x.reshape(-1, groups), 1) / limit
        tiny = ops.where(unit > 0, HALF_TINY, ops.where(unit < 0, -HALF_TINY, unit))
        return ops.where((unit < HALF_TINY) & (unit > -HALF_TINY), tiny, ops.half(unit))

    def rounded(x: Array, unit: Array) -> tuple[Array, Array]:
        integer = ops.nearest(x.reshape(-1, groups), inverse(ops, unit)[:, None], 0, low, high)
        return integer.reshape(-1), (integer * unit[:, None]).reshape(-1)

    d = of_super(scale)
    dmin = None if offset is None else of_super(-offset)

    def store(scale: Array, offset: Array | None) -> Line:
        integer, step = rounded(scale, d)
        if offset is None or dmin is None:
            return Line(step, None, (integer,))
        minimum, product = rounded(-offset, dmin)
        return Line(step, -product, (integer, minimum))

    return store, (d,) if dmin is None else (d, dmin)
