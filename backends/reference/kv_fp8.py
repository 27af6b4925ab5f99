"""The KV cache in 8-bit floats: what `kv_cache_dtype: fp8` keeps, in NumPy.

A token's head (d,) of keys, and that of values, becomes d e4m3 codes and one float32 scale, its largest magnitude
over 448, so that nothing overflows and nothing is calibrated: d + 4 bytes.

    e4m3 (OCP 8-bit Floating Point Specification 1.0): sign, 4 bits of exponent with bias 7, 3 of mantissa; no
    infinity, subnormals in steps of 2^-9, 448 the largest; 0x7f and 0xff are NaN.

A head that is smaller than TINY is kept as zeros. One with an infinity or a NaN is kept with the scale NaN: all of it
reads as NaN, and nothing hides that.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray

LARGEST = np.float32(448)
TINY = np.float32(2.0**-100)  # whose inverse times 448 is far from infinity


def _value(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


VALUES = np.array([_value(code) for code in range(256)], np.float32)
MIDDLES = (VALUES[:126] + VALUES[1:127]) / 2  # between the magnitudes of one code and the next, exact


def encode(x: Array) -> Array:
    """The uint8 codes of the nearest e4m3 numbers, of two the even code, and of what is beyond 448 that of 448."""
    size = np.abs(x)
    down, up = (np.searchsorted(MIDDLES, size, side) for side in ("left", "right"))  # differ halfway between two
    code = np.where(np.isnan(x), 0x7F, np.where(down % 2 == 0, down, up))
    return (code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def quantize(x: Array) -> tuple[Array, Array]:
    """Codes uint8 (..., d) and scales float32 (...) of x float32 (..., d)."""
    most = np.abs(x).max(axis=-1)
    kept = ~(most < TINY)  # NaN too
    with np.errstate(invalid="ignore"):  # infinity * 0
        inverse = np.where(kept, LARGEST / np.where(kept, most, 1), np.float32(0))
        codes = encode(x * inverse[..., None])
    scales = np.where(np.isfinite(most), np.where(kept, most / LARGEST, np.float32(0)), np.float32("nan"))
    return codes, scales.astype(np.float32)


@dataclass(frozen=True)
class Scaled:
    """An array float32 (..., d) kept as codes and scales: rounded where it is written, widened where it is read."""

    codes: Array  # uint8 (..., d)
    scales: Array  # float32 (...)

    @staticmethod
    def zeros(shape: tuple[int, ...]) -> "Scaled":
        return Scaled(np.zeros(shape, np.uint8), np.zeros(shape[:-1], np.float32))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def __getitem__(self, at: Any) -> Array:
        """`at` does not reach into the last dimension, here and below."""
        found: Array = VALUES[self.codes[at]] * self.scales[at][..., None]
        return found

    def __setitem__(self, at: Any, x: Array) -> None:
        self.codes[at], self.scales[at] = quantize(x)
