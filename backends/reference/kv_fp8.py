"""The fp8 KV cache (`kv_cache_dtype: fp8`) in NumPy: the definition.

A head (d,) of K or V of one token is stored as d e4m3 values and one float32 scale, absmax / 448: d + 4 bytes, no
overflow, no calibration.

    e4m3 (OCP 8-bit Floating Point Specification 1.0): sign, 4 exponent bits with bias 7, 3 mantissa bits; no infinity,
    subnormals in steps of 2^-9, maximum 448; 0x7f and 0xff are NaN.

A head below MIN_ABSMAX is stored as zeros. One with an infinity or NaN gets the scale NaN and reads as NaN.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray

E4M3_MAX = np.float32(448)
MIN_ABSMAX = np.float32(2.0**-100)  # 448 / MIN_ABSMAX is finite in float32


def _value(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


E4M3_VALUES = np.array([_value(code) for code in range(256)], np.float32)
MIDPOINTS = (E4M3_VALUES[:126] + E4M3_VALUES[1:127]) / 2  # between neighbouring magnitudes, exact


def encode(x: Array) -> Array:
    """Rounds to e4m3, ties to even, saturating at 448; the bits as uint8."""
    magnitude = np.abs(x)
    down, up = (np.searchsorted(MIDPOINTS, magnitude, side) for side in ("left", "right"))  # differ at a tie
    code = np.where(np.isnan(x), 0x7F, np.where(down % 2 == 0, down, up))
    return (code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def quantize(x: Array) -> tuple[Array, Array]:
    """x float32 (..., d) -> data uint8 (..., d), scales float32 (...)."""
    absmax = np.abs(x).max(axis=-1)
    kept = ~(absmax < MIN_ABSMAX)  # NaN too
    with np.errstate(invalid="ignore"):  # infinity * 0
        inverse = np.where(kept, E4M3_MAX / np.where(kept, absmax, 1), np.float32(0))
        data = encode(x * inverse[..., None])
    scales = np.where(np.isfinite(absmax), np.where(kept, absmax / E4M3_MAX, np.float32(0)), np.float32("nan"))
    return data, scales.astype(np.float32)


@dataclass(frozen=True)
class QuantizedKV:
    """An fp8 array (..., d) that reads and writes as float32. Indices do not reach into the last dimension."""

    data: Array  # uint8 (..., d)
    scales: Array  # float32 (...)

    @staticmethod
    def zeros(shape: tuple[int, ...]) -> "QuantizedKV":
        return QuantizedKV(np.zeros(shape, np.uint8), np.zeros(shape[:-1], np.float32))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes

    def __getitem__(self, at: Any) -> Array:
        return E4M3_VALUES[self.data[at]] * self.scales[at][..., None]

    def __setitem__(self, at: Any, x: Array) -> None:
        self.data[at], self.scales[at] = quantize(x)
