"""Every op of the IR in NumPy float32: the specification.

T tokens of S sequences; D hidden_size; H query heads, Hk KV heads, d head_dim; V vocab_size; R logits rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmrs.backends.reference.kv_fp8 import QuantizedKV
from llmrs.core.batch import Batch
from llmrs.core.ir import RopeFrequencies

Array = np.ndarray


@dataclass
class KV:
    """KV cache of one layer: keys and values (blocks, block_size, Hk, d)."""

    keys: Array | QuantizedKV
    values: Array | QuantizedKV


@dataclass
class Context:
    """The step, for `write_kv`, `attend` and `gather_logits_rows`."""

    batch: Batch
    block_size: int


def embed(_: Context, tokens: Array, table: Array) -> Array:  # (T,), (V, D) -> (T, D)
    return table[tokens]


def linear(_: Context, x: Array, w: Array, bias: Array | None = None, *, shard: str) -> Array:  # (n, K), (N, K)
    del shard  # one device
    y = x @ w.T
    return y if bias is None else y + bias


def mul_scalar(_: Context, x: Array, *, by: float) -> Array:
    return x * np.float32(by)


def rms_norm(_: Context, x: Array, w: Array, *, eps: float, offset: float = 0.0) -> Array:  # (..., n), (n,)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * (w + np.float32(offset))


def heads(_: Context, x: Array, *, size: int) -> Array:  # (T, H * d) -> (T, H, d)
    return x.reshape(len(x), -1, size)


def rope(_: Context, x: Array, positions: Array, *, frequencies: RopeFrequencies) -> Array:  # (T, H, d), (T,)
    angles = positions[:, None].astype(np.float32) * np.array(frequencies.values, np.float32)  # (T, d/2)
    cos, sin = (f(angles)[:, None, :] * np.float32(frequencies.scale) for f in (np.cos, np.sin))
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def write_kv(c: Context, k: Array, v: Array, kv: KV) -> KV:  # (T, Hk, d) each
    """Token t of sequence s goes to block_tables[s, positions[t] // block_size], row positions[t] % block_size."""
    for s, tokens in enumerate(sequences(c.batch)):
        positions = c.batch.positions[tokens]
        blocks = c.batch.block_tables[s, positions // c.block_size]
        kv.keys[blocks, positions % c.block_size] = k[tokens]
        kv.values[blocks, positions % c.block_size] = v[tokens]
    return kv


def attend(c: Context, q: Array, kv: KV, *, scale: float, window: int = 0) -> Array:  # (T, H, d) -> (T, H * d)
    """Causal softmax(q k^T * scale) v, over the last `window` positions if set; H / Hk query heads share a KV head."""
    y = np.empty_like(q)
    for s, tokens in enumerate(sequences(c.batch)):
        length = c.batch.seq_lens[s]
        blocks = c.batch.block_tables[s, : -(-length // c.block_size)]
        group = q.shape[1] // kv.keys.shape[2]
        k, v = (np.repeat(np.concatenate(x[blocks])[:length], group, axis=1) for x in (kv.keys, kv.values))
        scores = np.einsum("thd,khd->htk", q[tokens], k) * np.float32(scale)
        distance = c.batch.positions[tokens][:, None] - np.arange(length)  # (t, k)
        masked = (distance < 0) | (distance >= (window or length))
        scores = np.where(masked, np.float32(-np.inf), scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        y[tokens] = np.einsum("htk,khd->thd", weights / weights.sum(axis=-1, keepdims=True), v)
    return y.reshape(len(y), -1)


def silu_and_mul(_: Context, gate: Array, up: Array) -> Array:
    return gate / (1 + np.exp(-gate)) * up


def gelu_and_mul(_: Context, gate: Array, up: Array) -> Array:
    inner = np.float32(np.sqrt(2 / np.pi)) * (gate + np.float32(0.044715) * gate**3)
    return np.float32(0.5) * gate * (1 + np.tanh(inner)) * up


def moe(
    c: Context, x: Array, router: Array, gate: Array, up: Array, down: Array, *, top_k: int, norm_topk_prob: bool
) -> Array:
    """Softmax router; the top_k experts' outputs, weighted by their probabilities."""
    scores = x @ router.T  # (T, E)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    chosen = np.argsort(-p, axis=-1, kind="stable")[:, :top_k]  # ties: the first
    total = np.take_along_axis(p, chosen, axis=-1).sum(axis=-1) if norm_topk_prob else np.ones(len(x), np.float32)
    gates, ups, downs = (w.reshape(len(router), -1, w.shape[1]) for w in (gate, up, down))
    y = np.zeros_like(x)
    for t, experts in enumerate(chosen):
        for e in experts:
            y[t] += downs[e] @ silu_and_mul(c, gates[e] @ x[t], ups[e] @ x[t]) * (p[t, e] / total[t])
    return y


def add(_: Context, x: Array, y: Array) -> Array:
    return x + y


def gather_logits_rows(c: Context, x: Array) -> Array:  # (T, D) -> (R, D)
    return x[c.batch.logits_indices]


def lm_head(_: Context, x: Array, w: Array) -> Array:  # (R, D), (V, D) -> (R, V)
    return x @ w.T


def sequences(batch: Batch) -> list[slice]:
    """The tokens of each sequence."""
    return [slice(a, b) for a, b in zip(batch.query_start_loc[:-1], batch.query_start_loc[1:], strict=True)]


OPS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        embed, mul_scalar, linear, rms_norm, heads, rope, write_kv, attend, silu_and_mul, gelu_and_mul, moe, add,
        gather_logits_rows, lm_head,
    )
}  # fmt: skip
