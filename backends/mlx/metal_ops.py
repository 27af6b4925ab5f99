"""Ops that launch Metal kernels, with the signatures of ops.py.

They fall back to ops.py for shapes that a kernel does not support; a launch error is never a reason.
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


def ops_table(kernels: Kernels) -> dict[str, Callable[..., Run]]:
    """Overrides of the ops in ops.py."""
    return {
        "attend": partial(attend, kernels),
        "qkv_rope_write_kv": partial(qkv_rope_write_kv, kernels),
        "qkv_norm_rope_write_kv": partial(qkv_rope_write_kv, kernels),
        "fused_add_rms_norm": partial(fused_add_rms_norm, kernels),
        "merged_linear_silu_and_mul": partial(act_and_mul, kernels, False),
        "merged_linear_gelu_and_mul": partial(act_and_mul, kernels, True),
    }


def attend(kernels: Kernels, *, scale: float, window: int = 0) -> Run:
    fallback = ops.FAST["attend"](scale=scale, window=window)

    def run(c: Context, q: Array, kv: KV) -> Array:  # (T, H, d) -> (T, H * d)
        size, n, b = q.shape[2], c.num_decodes, c.batch
        prefills = n < len(c.query_lens)
        if size % 8 or not 16 <= size <= 256 or (prefills and q.dtype != kv.keys.dtype):
            return fallback(c, q, kv)
        keys, values = (mx.unflatten(x, 0, (-1, c.block_size, kv.heads)) for x in (kv.keys, kv.values))
        tables, y = c.array("block_tables"), []
        if n:
            arrays = q, c.array("token_to_seq"), c.array("context_lens")
            first, token_to_seq, context_lens = (x if n == len(x) else x[:n] for x in arrays)
            y.append(attention.paged_decode(
                kernels, first, keys, values, tables, token_to_seq, context_lens,
                scale=scale, window=window, max_seq_len=c.max_seq_len,
            ))  # fmt: skip
        if prefills:
            starts, tables = (b.query_start_loc[n:] - n).astype(np.int32), tables[n:] if n else tables
            y.append(attention.paged_prefill(
                kernels, q[n:], keys, values, tables, starts, b.seq_lens[n:], scale=scale, window=window
            ))  # fmt: skip
        return mx.flatten(y[0] if len(y) == 1 else mx.concatenate(y), 1)

    return run


def qkv_rope_write_kv(
    kernels: Kernels, *weights: Any, split_sizes: list[int], size: int, frequencies: RopeFrequencies, **norm: float
) -> Run:
    """`norm`: eps, and offset if any; none without norms."""
    if size < 16 or size % 2:
        params: dict[str, Any] = {"split_sizes": split_sizes, "size": size, "frequencies": frequencies}
        return ops.FAST["qkv_rope_write_kv"](*weights, **params, **norm)
    matrix, norms = (weights[:-2], (weights[-2], weights[-1])) if norm else (weights, None)
    project, inv_freq = ops.linear(*matrix, fast=True), mx.array(np.array(frequencies.values, np.float32))
    scale, kv_heads = frequencies.scale, split_sizes[1] // size

    def run(c: Context, x: Array, positions: Array, kv: KV) -> tuple[Array, KV]:
        qkv = mx.unflatten(project(c, x), -1, (-1, size))  # (T, Hq + 2 Hk, d)
        q, k, v = elementwise.norm_rope(
            kernels, qkv, positions, inv_freq, norms,
            kv_heads=kv_heads, rope_scale=scale, kv_dtype=kv.keys.dtype, **norm,
        )  # fmt: skip
        return q, ops.write(c, k, v, kv)

    return run


def fused_add_rms_norm(kernels: Kernels, weight: Array, *, eps: float, offset: float = 0.0) -> Run:
    if len(weight) < 8:
        return ops.FAST["fused_add_rms_norm"](weight, eps=eps, offset=offset)
    return lambda c, x, y: elementwise.fused_add_rms_norm(kernels, x, y, weight, eps=eps, offset=offset)


def act_and_mul(kernels: Kernels, gelu: bool, *weights: Any, split_sizes: list[int]) -> Run:
    project = ops.linear(*weights, fast=True)
    return lambda c, x: elementwise.act_and_mul(kernels, project(c, x), gelu=gelu)


def sample(kernels: Kernels, logits: Array, params: SamplingArrays) -> Array:
    """`llmrs.backends.mlx.sampling.sample`"""
    if logits.shape[1] < 8:
        return sampling.sample(logits, params)
    return kernel_sampling.sample(kernels, logits, params)
