"""The ops in MLX: each function binds an op's weights and params, and returns `run(context, *inputs)`.

`fast`: with mx.fast ops, one kernel each on a GPU, many small ops on a CPU.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np

from llmrs.backends.mlx import attention
from llmrs.backends.mlx.attention import KV, Context
from llmrs.backends.mlx.quant_matrix import Matrix, QuantMatrix
from llmrs.core.ir import RopeFrequencies

Array = mx.array
Run = Callable[..., Any]


def embed(table: Matrix) -> Run:
    if isinstance(table, QuantMatrix):
        return lambda c, tokens: table.gather(tokens)
    return lambda c, tokens: table[tokens]


def linear(weight: Matrix, bias: Array | None = None, *, fast: bool = False) -> Run:
    if isinstance(weight, QuantMatrix):
        return lambda c, x: weight.linear(x) if bias is None else weight.linear(x) + bias
    w = weight.T  # (K, N)
    if weight.dtype == mx.float32 and not fast:
        w = mx.contiguous(w)  # MLX's CPU GEMM takes twice as long on a view
        mx.eval(w)
    if bias is None:
        return lambda c, x: x @ w
    return lambda c, x: mx.addmm(bias, x, w)


def merged_linear(*weights: Any, split_sizes: list[int], fast: bool = False) -> Run:
    run, offsets = linear(*weights, fast=fast), list(accumulate(split_sizes))[:-1]
    return lambda c, x: mx.split(run(c, x), offsets, axis=-1)


def mul_scalar(*, by: float) -> Run:
    return lambda c, x: x * by  # a Python number keeps x's dtype


def rms_norm(weight: Array, *, eps: float, offset: float = 0.0, fast: bool = False) -> Run:
    if fast and not offset:
        return lambda c, x: mx.fast.rms_norm(x, weight, eps)
    wide = weight.astype(mx.float32) + offset  # in float32: 1 + w would round w in bf16
    if fast:
        return lambda c, x: mx.fast.rms_norm(x, wide, eps).astype(x.dtype)
    dtype, run = weight.dtype, _norm_to_float32(wide, eps, weight.dtype)
    return run if dtype == mx.float32 else lambda c, x: run(c, x).astype(dtype)


def _norm_to_float32(weight: Array, eps: float, dtype: mx.Dtype) -> Run:
    """RMSNorm of x (T, ..., n) of this dtype in four ops: mx.fast.rms_norm is a dozen on a CPU. weight (..., n)."""
    size = weight.shape[-1]
    wide = (weight.astype(mx.float32) * size**0.5)[None]
    scaled_eps = mx.full((1,) * wide.ndim, size * eps)
    mx.eval(wide, scaled_eps)

    def run(_: Context, x: Array) -> Array:
        return x * mx.rsqrt(mx.sum(mx.square(x), -1, True) + scaled_eps) * wide  # both times sqrt(size)

    return run if dtype == mx.float32 else lambda c, x: run(c, x.astype(mx.float32))


def heads(*, size: int) -> Run:  # (T, H * d) -> (T, H, d)
    return lambda c, x: mx.unflatten(x, -1, (-1, size))


def rope(*, frequencies: RopeFrequencies, fast: bool = False) -> Run:
    half = len(frequencies.values)

    def run(c: Context, x: Array, positions: Array) -> Array:  # (T, H, d), (T,)
        cos, sin = c.cos_sin(frequencies, positions)
        return (x * cos + mx.roll(x, half, -1) * sin).astype(x.dtype)

    return _fast_rope(frequencies) if fast else run


def _fast_rope(frequencies: RopeFrequencies) -> Run:
    periods = mx.array(1 / np.array(frequencies.values), mx.float32)
    size = 2 * len(frequencies.values)

    def run(c: Context, x: Array, positions: Array) -> Array:
        x = mx.expand_dims(x, 2)  # (T, H, 1, d): a batch of T sequences of one token
        x = mx.fast.rope(x, size, traditional=False, base=None, scale=1.0, offset=positions, freqs=periods)
        y = mx.squeeze(x, 2)
        return y if frequencies.scale == 1 else y * frequencies.scale

    return run


def write_kv() -> Run:
    return write


def write(c: Context, k: Array, v: Array, kv: KV) -> KV:  # (T, Hk, d) each
    kv.write(c.array("slot_mapping", kv.heads), k, v)
    return kv


def attend(*, scale: float, window: int = 0, fast: bool = False) -> Run:
    decode = attention.decode_sdpa if fast else attention.decode_attention
    return lambda c, q, kv: attention.attend(c, q, kv, scale, window, decode)


def silu_and_mul() -> Run:
    return _silu_and_mul


def _silu_and_mul(_: Context, gate: Array, up: Array) -> Array:
    return gate * mx.sigmoid(gate) * up


def gelu_and_mul() -> Run:
    def run(c: Context, gate: Array, up: Array) -> Array:
        x = gate.astype(mx.float32)
        inner = (2 / mx.pi) ** 0.5 * (x + 0.044715 * x * x * x)
        return (0.5 * x * (1 + mx.tanh(inner))).astype(gate.dtype) * up

    return run


def moe(router: Matrix, *stacks: Matrix, top_k: int, norm_topk_prob: bool) -> Run:
    """Gathered GEMMs over each token's top_k experts."""
    count, route = router.shape[0], linear(router, fast=True)
    gate, up, down = (_gather_matmul(w, count) for w in stacks)

    def run(c: Context, x: Array) -> Array:
        p = mx.softmax(route(c, x).astype(mx.float32), axis=-1)
        chosen = mx.argsort(-p, axis=-1)[:, :top_k]
        weights = mx.take_along_axis(p, chosen, axis=-1)
        if norm_topk_prob:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        rows = mx.expand_dims(x, (1, 2))  # (T, 1, 1, D)
        g, u = gate(rows, chosen), up(rows, chosen)  # (T, top_k, 1, I)
        y = down(_silu_and_mul(c, g, u), chosen)[:, :, 0]
        return (y * weights[..., None].astype(x.dtype)).sum(axis=1)

    return run


def _gather_matmul(stack: Matrix, count: int) -> Callable[[Array, Array], Array]:
    """x (T, 1 or k, 1, K), experts (T, k) -> x w[expert]^T (T, k, 1, N), of `count` experts (count * N, K)."""
    if isinstance(stack, QuantMatrix):
        return lambda x, experts: stack.gather_matmul(x, count, experts)
    w = mx.unflatten(stack, 0, (count, -1)).swapaxes(1, 2)  # (E, K, N)
    return lambda x, experts: mx.gather_mm(x, w, rhs_indices=experts)


def add() -> Run:
    return lambda c, x, y: x + y


def gather_logits_rows() -> Run:
    return lambda c, x: x if c.is_decode_only else x[c.array("logits_indices")]


def lm_head(weight: Matrix) -> Run:
    run = linear(weight, fast=True)
    return lambda c, x: run(c, x).astype(mx.float32)


# Fused ops: fewer calls per layer, the same arithmetic as their definitions.


def fused_add_rms_norm(weight: Array, *, fast: bool = False, **norm: float) -> Run:
    run_norm = rms_norm(weight, fast=fast, **norm)

    def run(c: Context, x: Array, y: Array) -> tuple[Array, Array]:
        total = x + y
        return total, run_norm(c, total)

    return run


def rope_write_kv(*norm_weights: Array, frequencies: RopeFrequencies, **norm: Any) -> Run:
    """With two weights, for queries and keys, and `norm` (eps, offset) also `qk_norm_rope_write_kv`."""
    norms, rotate = [rms_norm(w, **norm) for w in norm_weights], rope(frequencies=frequencies)

    def run(c: Context, q: Array, positions: Array, k: Array, v: Array, kv: KV) -> tuple[Array, KV]:
        if norms:
            q, k = norms[0](c, q), norms[1](c, k)
        return rotate(c, q, positions), write(c, rotate(c, k, positions), v, kv)

    return run


def gated_linear(activation: Callable[[], Run], *weights: Any, split_sizes: list[int], fast: bool = False) -> Run:
    merged, act_and_mul = merged_linear(*weights, split_sizes=split_sizes, fast=fast), activation()
    return lambda c, x: act_and_mul(c, *merged(c, x))


def qkv_rope_write_kv(
    *weights: Any, split_sizes: list[int], size: int, frequencies: RopeFrequencies,
    eps: float | None = None, offset: float = 0.0, fast: bool = False,
) -> Run:  # fmt: skip
    """With `eps` queries and keys are normalized, at once: the last two weights are their norms'."""
    heads, rotate, norm = [n // size for n in split_sizes], rope(frequencies=frequencies, fast=fast), None
    if eps is not None:
        wide = [w.astype(mx.float32) + offset if offset else w for w in weights[-2:]]
        both = mx.concatenate([mx.broadcast_to(w, (n, size)) for w, n in zip(wide, heads, strict=False)])
        mx.eval(both)
        norm = _fast_head_norm(both, eps) if fast else _norm_to_float32(both, eps, weights[0].dtype)
        weights = weights[:-2]
    project = linear(*weights, fast=fast)

    def run(c: Context, x: Array, positions: Array, kv: KV) -> tuple[Array, KV]:
        qk, v = mx.split(mx.unflatten(project(c, x), -1, (-1, size)), [heads[0] + heads[1]], axis=1)
        qk = rotate(c, norm(c, qk) if norm else qk, positions)
        q, k = mx.split(qk.astype(x.dtype), [heads[0]], axis=1)
        return q, write(c, k, v, kv)

    return run


def _fast_head_norm(weight: Array, eps: float) -> Run:
    return lambda c, x: mx.fast.rms_norm(x, None, eps) * weight


PLAIN: dict[str, Callable[..., Run]] = {
    f.__name__: f
    for f in (
        embed, mul_scalar, linear, rms_norm, heads, rope, write_kv, attend, silu_and_mul, gelu_and_mul, moe, add,
        gather_logits_rows, lm_head,
    )
}  # fmt: skip
FUSED: dict[str, Callable[..., Run]] = {  # of llmrs.backends.fusion
    "merged_linear": merged_linear,
    "fused_add_rms_norm": fused_add_rms_norm,
    "qk_norm_rope_write_kv": rope_write_kv,
    "rope_write_kv": rope_write_kv,
}
OWN: dict[str, Callable[..., Run]] = {  # of fusion.py here
    "merged_linear_silu_and_mul": partial(gated_linear, silu_and_mul),
    "merged_linear_gelu_and_mul": partial(gated_linear, gelu_and_mul),
    "qkv_rope_write_kv": qkv_rope_write_kv,
    "qkv_norm_rope_write_kv": qkv_rope_write_kv,
}
COMMON = {**PLAIN, **FUSED, **OWN}
GPU = ("linear", "rope", "attend", "rms_norm", "merged_linear", "fused_add_rms_norm", *OWN)
FAST = {op: partial(COMMON[op], fast=True) for op in GPU}  # overrides on a GPU
