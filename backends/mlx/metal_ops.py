"""Rules that run Metal kernels, with the signatures of those in ops.py, which they fall back to.

A fallback is for shapes that a kernel can't do, head sizes above all; it is chosen by shape, never by an error.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from llmrs.backends.mlx import ops, sampling
from llmrs.backends.mlx.attention import KV, Context
from llmrs.backends.mlx.kernels import attention, elementwise
from llmrs.backends.mlx.kernels import sampling as kernel_sampling
from llmrs.backends.mlx.kernels.launch import Kernels
from llmrs.backends.mlx.ops import Array, Run
from llmrs.core.ir import RopeFrequencies
from llmrs.core.sampling import SamplingArrays


def rules(kernels: Kernels) -> dict[str, Callable[..., Run]]:
    """What wins over the rules of mx ops on a Mac's GPU."""
    return {
        "attend": partial(attend, kernels),
        "qkv_rope_write_kv": partial(qkv_rope_write_kv, kernels),
        "qkv_norm_rope_write_kv": partial(qkv_rope_write_kv, kernels),
        "fused_add_rms_norm": partial(fused_add_rms_norm, kernels),
        "merged_linear_silu_and_mul": partial(gated, kernels, False),
        "merged_linear_gelu_and_mul": partial(gated, kernels, True),
    }


def attend(kernels: Kernels, *, scale: float, window: int = 0) -> Run:
    fallback = ops.fast_attend(scale=scale, window=window)

    def run(c: Context, q: Array, kv: KV) -> Array:  # (T, H, d) -> (T, H * d)
        size, same = q.shape[2], q.dtype == kv.keys.dtype
        if size % 8 or not 16 <= size <= 256 or not (same or c.singles == len(c.counts)):
            return fallback(c, q, kv)
        keys, values = (mx.unflatten(x, 0, (-1, c.block_size, kv.heads)) for x in (kv.keys, kv.values))
        parts = [_decode(kernels, c, q, keys, values, scale, window)] if c.singles else []
        parts += [_prefill(kernels, c, q, keys, values, scale, window)] if c.singles < len(c.counts) else []
        return mx.flatten(parts[0] if len(parts) == 1 else mx.concatenate(parts), 1)

    return run


def _decode(kernels: Kernels, c: Context, q: Array, keys: Array, values: Array, scale: float, window: int) -> Array:
    """The sequences of one token that come first: n of them."""
    n = c.singles
    q, owners, visible = (x if n == len(x) else x[:n] for x in (q, c.owners, c.visible))
    return attention.paged_decode(
        kernels, q, keys, values, c.tables, owners, visible, scale=scale, window=window, longest=c.longest
    )


def _prefill(kernels: Kernels, c: Context, q: Array, keys: Array, values: Array, scale: float, window: int) -> Array:
    """All others."""
    n, b = c.singles, c.batch
    tables = c.tables[n:] if n else c.tables
    starts, lengths = (b.query_start_loc[n:] - n).astype(np.int32), b.seq_lens[n:]
    return attention.paged_prefill(kernels, q[n:], keys, values, tables, starts, lengths, scale=scale, window=window)


def qkv_rope_write_kv(
    kernels: Kernels,
    *weights: Array,
    split_sizes: list[int],
    size: int,
    frequencies: RopeFrequencies,
    **norm: float,  # eps, and offset if any; none without norms
) -> Run:
    if size < 16 or size % 2:
        params: dict[str, Any] = {"split_sizes": split_sizes, "size": size, "frequencies": frequencies}
        return ops.FAST["qkv_rope_write_kv"](*weights, **params, **norm)
    matrix, norms = (weights[:-2], (weights[-2], weights[-1])) if norm else (weights, None)
    project, turns = ops.fast_linear(*matrix), mx.array(np.array(frequencies.values, np.float32))
    scale, kv_heads = frequencies.scale, split_sizes[1] // size

    def run(c: Context, x: Array, positions: Array, kv: KV) -> tuple[Array, KV]:
        qkv = mx.unflatten(project(c, x), -1, (-1, size))  # (T, Hq + 2 Hk, d)
        q, k, v = elementwise.norm_rope(
            kernels, qkv, positions, turns, norms, kv_dtype=kv.keys.dtype, kv_heads=kv_heads, rope_scale=scale, **norm
        )
        return q, ops.write(c, k, v, kv)

    return run


def fused_add_rms_norm(kernels: Kernels, weight: Array, *, eps: float, offset: float = 0.0) -> Run:
    if len(weight) < 8:
        return ops.FAST["fused_add_rms_norm"](weight, eps=eps, offset=offset)
    return lambda c, x, y: elementwise.fused_add_rms_norm(kernels, x, y, weight, eps=eps, offset=offset)


def gated(kernels: Kernels, gelu: bool, weight: Array, bias: Array | None = None, *, split_sizes: list[int]) -> Run:
    project = ops.fast_linear(weight, *([] if bias is None else [bias]))
    return lambda c, x: _gated(kernels, project(c, x), gelu=gelu)


_gated = elementwise.gated


def draw(kernels: Kernels, logits: Array, params: SamplingArrays) -> Array:
    """`llmrs.backends.mlx.sampling.draw`"""
    if logits.shape[1] < 8:
        return sampling.draw(logits, params)
    return kernel_sampling.sample(kernels, logits, params)
