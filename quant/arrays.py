"""The few array operations that unpacking needs, so that it is written once for NumPy, Torch and MLX.

Arrays of all three have `shape`, `reshape`, indexing, `+ - *` and, for unsigned integers, `& | << >>`.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Array = Any  # of one framework


def _e4m3() -> np.ndarray:
    """The 256 values of float8_e4m3fn: 4 exponent bits with a bias of 7, 3 of mantissa, no infinity, NaN as 0x7f."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    value = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), np.ldexp(1 + mantissa / 8, exponent - 7))
    value = np.where(code & 127 == 127, np.nan, value)
    return np.where(code & 128, -value, value).astype(np.float32)


with np.errstate(over="ignore"):  # 2^128 is infinity
    E8M0 = np.ldexp(np.float32(1), np.arange(256) - 127).astype(np.float32)
HALF_E8M0 = np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)
FLOAT8: dict[str, np.ndarray] = {"e4m3": _e4m3(), "e8m0": E8M0, "half_e8m0": HALF_E8M0}  # values by their byte


class Arrays(Protocol):
    """One framework's operations."""

    def float32(self, x: Array, dtype: str) -> Array:
        """The values of stored numbers as float32, exactly.

        `dtype`: f32, f16, bf16 (NumPy: uint16), u8, i8, or one of FLOAT8 (uint8).
        """

    def view(self, x: Array, dtype: str) -> Array:
        """The bytes of a uint8 array (..., n) as numbers of another size, (..., n / size)."""

    def stack(self, arrays: Sequence[Array], axis: int) -> Array: ...

    def concatenate(self, arrays: Sequence[Array], axis: int) -> Array: ...

    def take(self, table: np.ndarray, codes: Array) -> Array:
        """table[codes] in float32, for a table of at most 256 values."""


class NumpyArrays:
    """`Arrays` of NumPy."""

    def float32(self, x: np.ndarray, dtype: str) -> np.ndarray:
        if dtype == "bf16":  # the upper half of a float32
            return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if dtype in FLOAT8:
            return FLOAT8[dtype][x]
        return x.astype(np.float32)

    def view(self, x: np.ndarray, dtype: str) -> np.ndarray:
        kind: np.dtype[Any] = np.dtype({"f16": "<f2", "f32": "<f4", "bf16": "<u2", "i8": "i1"}.get(dtype, "u1"))
        return np.ascontiguousarray(x).view(kind)

    def stack(self, arrays: Sequence[np.ndarray], axis: int) -> np.ndarray:
        return np.stack(arrays, axis)

    def concatenate(self, arrays: Sequence[np.ndarray], axis: int) -> np.ndarray:
        return np.concatenate(arrays, axis)

    def take(self, table: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return table[codes]


NUMPY = NumpyArrays()
