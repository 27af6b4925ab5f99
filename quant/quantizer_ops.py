"""The operations of the quantizer, so that it is written once for NumPy and Torch.

Matrices are (G, n): sums over the first axis run along long rows, and add in the same order for every n.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

Array = Any  # of one framework
HALF_MAX, HALF_TINY = 65504.0, 2.0**-24  # the largest and the smallest positive f16


class QuantizerOps(Protocol):
    """One framework's operations on float32 arrays."""

    chunk: int  # weights that are quantized at a time

    def upload(self, x: np.ndarray) -> Array:
        """(n, G) -> (G, n), contiguous."""

    def download(self, x: Array, dtype: type[Any]) -> np.ndarray:
        """(...) -> NumPy's, in another type; the values fit."""

    def run(self, function: Callable[[int], None], items: Iterable[int]) -> None:
        """function(item), on as many threads as pay."""

    def nearest(
        self, x: Array, factor: Array | float, shift: float, low: float, high: float, out: Array | None = None
    ) -> Array:
        """x * factor + shift, rounded to integers within [low, high], ties to even. `out` may be overwritten."""

    def take(self, table: np.ndarray, index: Array) -> Array:
        """table[index], for integers that are float32."""

    def sum(self, x: Array) -> Array:
        """(G, n) -> (n,)."""

    def dot(self, x: Array, y: Array) -> Array:
        """The sum of x * y, (n,)."""

    def min(self, x: Array, axis: int) -> Array: ...

    def max(self, x: Array, axis: int) -> Array: ...

    def clip(self, x: Array, low: float, high: float) -> Array: ...

    def where(self, condition: Array, x: Array | float, y: Array | float) -> Array: ...

    def half(self, x: Array) -> Array:
        """Rounded to f16, which saturates."""


class NumpyOps:
    """`QuantizerOps` of NumPy, on all cores."""

    chunk = 2**18  # a few temporaries stay in the caches

    def upload(self, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x.T)

    def download(self, x: np.ndarray, dtype: type[Any]) -> np.ndarray:
        return x.astype(dtype)

    def run(self, function: Callable[[int], None], items: Iterable[int]) -> None:
        def quiet(item: int) -> None:
            with np.errstate(all="ignore"):
                function(item)

        np.empty(
            2**24, np.uint8
        )  # freed at once: now glibc keeps smaller arrays for the next ones, without page faults
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            deque(pool.map(quiet, items), 0)  # raises what they raised

    def nearest(
        self, x: np.ndarray, factor: Array | float, shift: float, low: float, high: float, out: Array | None = None
    ) -> np.ndarray:
        y = np.multiply(x, factor, out=out)
        if shift:
            y += shift
        np.rint(y, out=y)
        return np.clip(y, low, high, out=y)

    def take(self, table: np.ndarray, index: np.ndarray) -> np.ndarray:
        return table.take(index.astype(np.intp))

    def sum(self, x: np.ndarray) -> np.ndarray:
        return np.add.reduce(x, 0) if x.shape[1] > 1 else _sum_in_order(x)

    def dot(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.einsum("ij,ij->j", x, y) if x.shape[1] > 1 else _sum_in_order(x * y)

    def min(self, x: np.ndarray, axis: int) -> np.ndarray:
        return x.min(axis)

    def max(self, x: np.ndarray, axis: int) -> np.ndarray:
        return x.max(axis)

    def clip(self, x: np.ndarray, low: float, high: float) -> np.ndarray:
        return np.clip(x, low, high)

    def where(self, condition: np.ndarray, x: Array | float, y: Array | float) -> np.ndarray:
        return np.where(condition, x, y)

    def half(self, x: np.ndarray) -> np.ndarray:
        return np.clip(x, -HALF_MAX, HALF_MAX).astype(np.float16).astype(np.float32)


def _sum_in_order(x: np.ndarray) -> np.ndarray:
    """NumPy adds a lone column pairwise."""
    total = x[0]
    for row in x[1:]:
        total = total + row
    return total


NUMPY_OPS = NumpyOps()
