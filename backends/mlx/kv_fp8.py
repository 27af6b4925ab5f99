"""The fp8 KV cache in MLX, as backends/reference/kv_fp8.py defines it: e4m3 data and one scale per token and head."""

from typing import Any

import mlx.core as mx

E4M3_MAX, MIN_ABSMAX = 448.0, 2.0**-100


def quantize(x: mx.array) -> tuple[mx.array, mx.array]:
    """x (..., d) -> data uint8 (..., d), scales float32 (...)."""
    x = x.astype(mx.float32)
    absmax = mx.abs(x).max(axis=-1)  # NaN if any element is
    tiny = absmax < MIN_ABSMAX
    data = mx.to_fp8(x * mx.expand_dims(mx.where(tiny, 0.0, E4M3_MAX / absmax), -1))
    scales = mx.where(tiny, 0.0, absmax / E4M3_MAX)
    return data, mx.where(mx.isfinite(absmax), scales, mx.nan)


class QuantizedKV:
    """A pool (n, Hk, d) in fp8 that reads and writes as float32. Indices do not reach into the last dimension."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.data = mx.zeros(shape, mx.uint8)  # (n, Hk, d)
        self.scales = mx.zeros(shape[:-1], mx.float32)  # (n, Hk)

    def __getitem__(self, at: Any) -> mx.array:
        return mx.from_fp8(self.data[at], mx.float32) * mx.expand_dims(self.scales[at], -1)

    def __setitem__(self, at: Any, x: mx.array) -> None:
        self.data[at], self.scales[at] = quantize(x)


def unpack(pool: mx.array | QuantizedKV) -> list[mx.array]:
    return [pool.data, pool.scales] if isinstance(pool, QuantizedKV) else [pool]
