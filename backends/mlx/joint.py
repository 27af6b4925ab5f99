"""Queries, keys and values of one merged linear, normalized, rotated and stored together: what costs the host least.

Every op that a step is made of takes MLX about a microsecond of the host. So values go through norm and rotation
beside queries and keys, and come out as they went in: their root mean square has the power 0, and they turn by 0. And
the weights' rows are in an order in which the two elements that are rotated together are neighbours: a rotation is then
one complex product. Keys stay in that order in the KV cache; their products with queries are the same.

Letters: T tokens, H query heads, Hk KV heads, d head size; A = H + 2 Hk.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from llmrs.backends.mlx.attention import KV, Context
from llmrs.core.ir import RopeFrequencies

Norm = Callable[[mx.array], mx.array]


def pairs(size: int) -> np.ndarray:
    """Elements of a head in their new order: the first of each half, the second of each half, ..."""
    return np.arange(size, dtype=np.int32).reshape(2, -1).T.flatten()


def paired_rows(rows: list[int], size: int) -> mx.array:
    """Rows of the merged matrix in their new order: those of values stay."""
    turned = np.arange(0, rows[0] + rows[1], size, dtype=np.int32)[:, None] + pairs(size)
    return mx.array(np.append(turned, np.arange(rows[0] + rows[1], sum(rows), dtype=np.int32)))


def head_norm(q_weight: mx.array, k_weight: mx.array, rows: list[int], size: int, eps: float) -> Norm:
    """x (T, A, d) float32: queries and keys by their root mean square, times their weights; values as they are."""
    turned, kept = (rows[0] + rows[1]) // size, rows[2] // size
    weights = [
        mx.broadcast_to(w[mx.array(pairs(size))], (n // size, size))
        for w, n in zip((q_weight, k_weight), rows, strict=False)
    ]
    weight = mx.concatenate([*(w * size**0.5 for w in weights), mx.ones((kept, size))])[None]  # (1, A, d)
    power = mx.concatenate([mx.full((1, turned, 1), -0.5), mx.zeros((1, kept, 1))], axis=1)
    least = mx.full((1, 1, 1), size * eps)
    mx.eval(weight, power, least)
    return lambda x: x * mx.power(mx.sum(mx.square(x), -1, True) + least, power) * weight


def qkv(
    project: Callable[..., mx.array],
    rows: list[int],
    size: int,
    frequencies: RopeFrequencies,
    norm: Norm | None,
    wide: bool,
) -> Callable[..., Any]:
    """`project` gives the merged result (T, A * d), of `paired_rows`; `wide`: in another type than float32."""
    heads, turned, queries = sum(rows) // size, (rows[0] + rows[1]) // size, [rows[0] // size]
    shape = (heads, size)

    def run(c: Context, x: mx.array, positions: mx.array, kv: KV) -> tuple[mx.array, KV]:
        y = mx.unflatten(project(c, x), 1, shape)
        if wide:
            y = y.astype(mx.float32)
        if norm is not None:
            y = norm(y)
        y = mx.view(mx.view(y, mx.complex64) * c.cis(frequencies, positions, turned, heads), mx.float32)
        q, both = mx.split(y.astype(x.dtype) if wide else y, queries, 1)
        kv.write_interleaved(c.slot_mapping(kv.entries_per_slot), both)
        return q, kv

    return run
