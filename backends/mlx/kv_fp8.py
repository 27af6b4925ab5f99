"""A KV cache in fp8, as backends/reference/kv_fp8.py defines it: e4m3 codes, and a scale for each token and head."""

from typing import Any

import mlx.core as mx

LARGEST, TINY = 448.0, 2.0**-100


def quantize(x: mx.array) -> tuple[mx.array, mx.array]:
    """Codes uint8 (..., d) and scales float32 (...) of x (..., d)."""
    x = x.astype(mx.float32)
    most = mx.abs(x).max(axis=-1)  # NaN where there is one
    tiny = most < TINY
    codes = mx.to_fp8(x * mx.expand_dims(mx.where(tiny, 0.0, LARGEST / most), -1))
    scales = mx.where(tiny, 0.0, most / LARGEST)
    return codes, mx.where(mx.isfinite(most), scales, mx.nan)


class Scaled:
    """A pool (n, Hk, d) kept as codes and scales, used as an array of float32 is: rounded where it is written to, and
    widened where it is read. Indices do not reach into the last dimension."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.codes = mx.zeros(shape, mx.uint8)  # (n, Hk, d)
        self.scales = mx.zeros(shape[:-1], mx.float32)  # (n, Hk)

    def __getitem__(self, at: Any) -> mx.array:
        return mx.from_fp8(self.codes[at], mx.float32) * mx.expand_dims(self.scales[at], -1)

    def __setitem__(self, at: Any, x: mx.array) -> None:
        self.codes[at], self.scales[at] = quantize(x)


def arrays(pool: mx.array | Scaled) -> list[mx.array]:
    """What a pool is made of."""
    return [pool.codes, pool.scales] if isinstance(pool, Scaled) else [pool]
