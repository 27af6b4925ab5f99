"""The operations of the quantizer, so that it is written once for NumPy, Torch and MLX."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np

from llmrs.quant.arrays import Array, Arrays, NumpyArrays

S, T = TypeVar("S"), TypeVar("T")
CACHED_WEIGHTS = 2**17  # of a chunk on a CPU: its few temporaries stay in the caches
HALF_MAX, HALF_TINY = 65504.0, 2.0**-24  # the largest and the smallest positive f16


class QuantizerOps(Arrays, Protocol):
    """One framework's operations. Where a result depends on an order of additions, it is the same for every shape."""

    chunk: int  # weights that are quantized at a time

    def upload(self, x: np.ndarray) -> Array: ...

    def download(self, x: Array) -> np.ndarray: ...

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        """function(item) in the order of the items, on as many threads as pay."""

    def peak(self, x: Array) -> float:
        """The largest magnitude; NaN where x holds one."""

    def transpose(self, x: Array) -> Array:
        """(n, m) -> (m, n), contiguous."""

    def nearest(self, x: Array, factor: Array | float, low: float, high: float) -> Array:
        """x * factor, rounded to integers within [low, high], ties to even; float32."""

    def where(self, condition: Array, x: Array | float, y: Array | float) -> Array: ...

    def minimum(self, x: Array, y: Array | float) -> Array: ...

    def maximum(self, x: Array, y: Array | float) -> Array: ...

    def sum(self, x: Array) -> Array:
        """Over the first axis of a matrix."""

    def min(self, x: Array, axis: int) -> Array: ...

    def max(self, x: Array, axis: int) -> Array: ...

    def encode(self, x: Array, dtype: str) -> Array:
        """float32 (...) rounded to f16, bf16, f32, u8, i8 or e4m3, as bytes: uint8 (..., size). All are in range."""


def rounded(ops: QuantizerOps, x: Array, dtype: str) -> Array:
    """x as it is after it was stored in this dtype; f16 saturates, and no positive number becomes zero."""
    if dtype == "f16":
        x = ops.maximum(ops.minimum(x, HALF_MAX), -HALF_MAX)
        tiny = ops.where(x > 0, HALF_TINY, ops.where(x < 0, -HALF_TINY, x))
        x = ops.where((x < HALF_TINY) & (x > -HALF_TINY), tiny, x)
    return ops.float32(ops.view(ops.encode(x, dtype), dtype), dtype).reshape(x.shape)


class NumpyOps(NumpyArrays):
    """`QuantizerOps` of NumPy."""

    chunk = CACHED_WEIGHTS
    sizes: dict[str, type[Any]] = {"f16": np.float16, "f32": np.float32, "u8": np.uint8, "i8": np.int8}  # noqa: RUF012

    def upload(self, x: np.ndarray) -> np.ndarray:
        return x

    def download(self, x: np.ndarray) -> np.ndarray:
        return x

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        def quiet(item: S) -> T:
            with np.errstate(all="ignore"):
                return function(item)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield from pool.map(quiet, items)

    def peak(self, x: np.ndarray) -> float:
        return float(np.maximum(x.max(), -x.min()))

    def transpose(self, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x.T)

    def nearest(self, x: np.ndarray, factor: Array | float, low: float, high: float) -> np.ndarray:
        y = x * factor
        np.rint(y, out=y)
        return np.clip(y, low, high, out=y)

    def where(self, condition: np.ndarray, x: Array | float, y: Array | float) -> np.ndarray:
        return np.where(condition, x, y)

    def minimum(self, x: np.ndarray, y: Array | float) -> np.ndarray:
        return np.minimum(x, y)

    def maximum(self, x: np.ndarray, y: Array | float) -> np.ndarray:
        return np.maximum(x, y)

    def sum(self, x: np.ndarray) -> np.ndarray:
        return np.add.reduce(x, 0) if x.shape[1] > 1 else halved_sum(x)  # NumPy adds a lone column pairwise

    def min(self, x: np.ndarray, axis: int) -> np.ndarray:
        return x.min(axis)

    def max(self, x: np.ndarray, axis: int) -> np.ndarray:
        return x.max(axis)

    def encode(self, x: np.ndarray, dtype: str) -> np.ndarray:
        if dtype == "bf16":
            bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
            y: np.ndarray = (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)  # to nearest, ties to even
        elif dtype == "e4m3":
            y = _e4m3_code(x)
        else:
            y = np.asarray(x, np.float32).astype(self.sizes[dtype])
        return np.ascontiguousarray(y)[..., None].view(np.uint8)


def halved_sum(x: Array) -> Array:
    """Over the first axis, whose length is a power of two, in the same order everywhere."""
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def _e4m3_code(x: np.ndarray) -> np.ndarray:
    """To nearest, ties to even; |x| <= 448."""
    size = np.abs(np.asarray(x, np.float32))
    bits = size.view(np.uint32)
    normal = (bits + 0x7FFFF + (bits >> 20 & 1) >> 20).astype(np.int32) - (127 - 7 << 3)
    code = np.where(size < 2.0**-6, np.rint(size * 512).astype(np.int32), normal)
    return np.where(np.signbit(x), code | 128, code).astype(np.uint8)


NUMPY_OPS = NumpyOps()
