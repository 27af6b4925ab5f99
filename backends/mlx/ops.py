"""The rule of each op in mx. A rule is given once what stays, weights and params, and gives the function of each step.

That function takes the step's context and the values that are the op's inputs, in their order.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np

from llmrs.backends.mlx import attention
from llmrs.backends.mlx.attention import KV, Context
from llmrs.core.ir import RopeFrequencies

Array = mx.array
Run = Callable[..., Any]


def embed(table: Array) -> Run:
    return lambda c, tokens: table[tokens]


def linear(weight: Array, bias: Array | None = None) -> Run:
    turned = weight.T
    if weight.dtype == mx.float32:
        turned = mx.contiguous(turned)  # for a view, MLX's product on a CPU takes twice as long
        mx.eval(turned)
    return _product(turned, bias)


def _product(turned: Array, bias: Array | None) -> Run:
    if bias is None:
        return lambda c, x: x @ turned
    return lambda c, x: mx.addmm(bias, x, turned)


def merged_linear(
    weight: Array, bias: Array | None = None, *, split_sizes: list[int], linear: Callable[..., Run] = linear
) -> Run:
    run, cuts = linear(weight, bias), list(accumulate(split_sizes))[:-1]
    return lambda c, x: mx.split(run(c, x), cuts, axis=-1)


def mul_scalar(*, by: float) -> Run:
    return lambda c, x: x * by  # a Python number takes x's type


def rms_norm(weight: Array, *, eps: float, offset: float = 0.0) -> Run:
    """In as few ops as can be: MLX's own is a dozen of them on a CPU."""
    dtype, size = weight.dtype, weight.shape[0]
    wide = ((weight.astype(mx.float32) + offset) * size**0.5)[None]  # 1 + w would lose w's last bits in bf16
    least = mx.full((1, 1), size * eps)
    mx.eval(wide, least)

    def run(_: Context, x: Array) -> Array:
        return x * mx.rsqrt(mx.sum(mx.square(x), -1, True) + least) * wide  # both times sqrt(size)

    return run if dtype == mx.float32 else lambda c, x: run(c, x.astype(mx.float32)).astype(dtype)


def heads(*, size: int) -> Run:  # (T, H * d) -> (T, H, d)
    return lambda c, x: mx.unflatten(x, -1, (-1, size))


def rope(*, frequencies: RopeFrequencies) -> Run:
    half = len(frequencies.values)

    def run(c: Context, x: Array, positions: Array) -> Array:  # (T, H, d), (T,)
        cos, sin = c.turns(frequencies, positions)
        return (x * cos + mx.roll(x, half, -1) * sin).astype(x.dtype)

    return run


def write_kv() -> Run:
    return write


def write(c: Context, k: Array, v: Array, kv: KV) -> KV:  # (T, Hk, d) each
    kv.write(c.places(kv.heads), k, v)
    return kv


def attend(*, scale: float, window: int = 0) -> Run:
    return lambda c, q, kv: attention.attend(c, q, kv, scale, window)


def silu_and_mul() -> Run:
    return _silu_mul


def _silu_mul(_: Context, gate: Array, up: Array) -> Array:
    return gate * mx.sigmoid(gate) * up


def gelu_and_mul() -> Run:
    def run(c: Context, gate: Array, up: Array) -> Array:
        x = gate.astype(mx.float32)
        inner = (2 / mx.pi) ** 0.5 * (x + 0.044715 * x * x * x)
        return (0.5 * x * (1 + mx.tanh(inner))).astype(gate.dtype) * up

    return run


def moe(router: Array, *stacks: Array, top_k: int, norm_topk_prob: bool) -> Run:
    """Every token's experts at once: a matrix product that picks its matrices, (T, top_k) of them."""
    count, turned = router.shape[0], router.T
    gate, up, down = (w.reshape(count, -1, w.shape[1]).swapaxes(1, 2) for w in stacks)  # (E, K, N)

    def run(c: Context, x: Array) -> Array:
        p = mx.softmax((x @ turned).astype(mx.float32), axis=-1)
        chosen = mx.argsort(-p, axis=-1)[:, :top_k]
        weights = mx.take_along_axis(p, chosen, axis=-1)
        if norm_topk_prob:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        rows = mx.expand_dims(x, (1, 2))  # (T, 1, 1, D)
        g, u = (mx.gather_mm(rows, w, rhs_indices=chosen) for w in (gate, up))  # (T, top_k, 1, I)
        y = mx.gather_mm(_silu_mul(c, g, u), down, rhs_indices=chosen)[:, :, 0]
        return (y * weights[..., None].astype(x.dtype)).sum(axis=1)

    return run


def add() -> Run:
    return lambda c, x, y: x + y


def gather_logits_rows() -> Run:
    return lambda c, x: x if c.rows_are_all else x[c.rows]


def lm_head(weight: Array) -> Run:
    turned = weight.T
    return lambda c, x: (x @ turned).astype(mx.float32)


# Fused ops: fewer calls a layer; the arithmetic is that of their definitions.


def fused_add_rms_norm(
    weight: Array, *, eps: float, offset: float = 0.0, rms_norm: Callable[..., Run] = rms_norm
) -> Run:
    norm = rms_norm(weight, eps=eps, offset=offset)

    def run(c: Context, x: Array, y: Array) -> tuple[Array, Array]:
        total = x + y
        return total, norm(c, total)

    return run


def qk_norm_rope_write_kv(
    q_weight: Array, k_weight: Array, *, eps: float, frequencies: RopeFrequencies, offset: float = 0.0
) -> Run:
    q_norm, k_norm = (rms_norm(w, eps=eps, offset=offset) for w in (q_weight, k_weight))
    turn = rope(frequencies=frequencies)

    def run(c: Context, q: Array, positions: Array, k: Array, v: Array, kv: KV) -> tuple[Array, KV]:
        q, k = turn(c, q_norm(c, q), positions), turn(c, k_norm(c, k), positions)
        return q, write(c, k, v, kv)

    return run


def rope_write_kv(*, frequencies: RopeFrequencies) -> Run:
    turn = rope(frequencies=frequencies)

    def run(c: Context, q: Array, positions: Array, k: Array, v: Array, kv: KV) -> tuple[Array, KV]:
        return turn(c, q, positions), write(c, turn(c, k, positions), v, kv)

    return run


def gated_linear(
    product: Callable[[], Run],
    weight: Array,
    bias: Array | None = None,
    *,
    split_sizes: list[int],
    linear: Callable[..., Run] = linear,
) -> Run:
    merged, multiply = merged_linear(weight, bias, split_sizes=split_sizes, linear=linear), product()
    return lambda c, x: multiply(c, *merged(c, x))


def qkv_rope_write_kv(
    *weights: Array,
    split_sizes: list[int],
    size: int,
    frequencies: RopeFrequencies,
    eps: float | None = None,
    offset: float = 0.0,
    linear: Callable[..., Run] = linear,
    rope: Callable[..., Run] = rope,
    norm: Callable[[Array, float], Run] | None = None,
) -> Run:
    """With `eps` queries and keys are normalized, at once: the last two weights are their norms'."""
    heads = [n // size for n in split_sizes]
    if eps is None:
        project, normed = linear(*weights), None
    else:
        wide = [w.astype(mx.float32) + offset if offset else w for w in weights[-2:]]
        both = mx.concatenate([mx.broadcast_to(w, (n, size)) for w, n in zip(wide, heads, strict=False)])
        mx.eval(both)
        project, normed = linear(*weights[:-2]), (norm or _head_norm)(both, eps)
    turn = rope(frequencies=frequencies)

    def run(c: Context, x: Array, positions: Array, kv: KV) -> tuple[Array, KV]:
        qk, v = mx.split(mx.unflatten(project(c, x), -1, (-1, size)), [heads[0] + heads[1]], axis=1)
        qk = turn(c, normed(c, qk) if normed else qk, positions)
        q, k = mx.split(qk.astype(x.dtype), [heads[0]], axis=1)
        return q, write(c, k, v, kv)

    return run


def _head_norm(weight: Array, eps: float) -> Run:
    """As `rms_norm`, for x (T, H, d) and a weight (H, d); the result is float32."""
    size = weight.shape[1]
    wide, least = (weight.astype(mx.float32) * size**0.5)[None], mx.full((1, 1, 1), size * eps)
    mx.eval(wide, least)

    def run(_: Context, x: Array) -> Array:
        x = x if x.dtype == mx.float32 else x.astype(mx.float32)
        return x * mx.rsqrt(mx.sum(mx.square(x), -1, True) + least) * wide

    return run


# Where MLX's own fast ops are one kernel each; on the CPU they are many small steps.


def fast_linear(weight: Array, bias: Array | None = None) -> Run:
    return _product(weight.T, bias)  # a view


def fast_rms_norm(weight: Array, *, eps: float, offset: float = 0.0) -> Run:
    if not offset:
        return lambda c, x: mx.fast.rms_norm(x, weight, eps)
    wide = weight.astype(mx.float32) + offset
    return lambda c, x: mx.fast.rms_norm(x, wide, eps).astype(x.dtype)


def fast_rope(*, frequencies: RopeFrequencies) -> Run:
    periods = mx.array(1 / np.array(frequencies.values), mx.float32)
    size = 2 * len(frequencies.values)

    def run(c: Context, x: Array, positions: Array) -> Array:
        x = mx.expand_dims(x, 2)  # (T, H, 1, d): a batch of T sequences of one token
        x = mx.fast.rope(x, size, traditional=False, base=None, scale=1.0, offset=positions, freqs=periods)
        y = mx.squeeze(x, 2)
        return y if frequencies.scale == 1 else y * frequencies.scale

    return run


def fast_head_norm(weight: Array, eps: float) -> Run:
    return lambda c, x: mx.fast.rms_norm(x, None, eps) * weight


def fast_attend(*, scale: float, window: int = 0) -> Run:
    return lambda c, q, kv: attention.attend(c, q, kv, scale, window, attention.fast_singles)


FUSED = {
    f.__name__: f for f in (merged_linear, fused_add_rms_norm, qk_norm_rope_write_kv, rope_write_kv)
}  # of llmrs.backends.fusion
OWN: dict[str, Callable[..., Run]] = {  # of fusion.py here
    "merged_linear_silu_and_mul": partial(gated_linear, silu_and_mul),
    "merged_linear_gelu_and_mul": partial(gated_linear, gelu_and_mul),
    "qkv_rope_write_kv": qkv_rope_write_kv,
    "qkv_norm_rope_write_kv": qkv_rope_write_kv,
}
PLAIN = (
    embed,
    mul_scalar,
    linear,
    rms_norm,
    heads,
    rope,
    write_kv,
    attend,
    silu_and_mul,
    gelu_and_mul,
    moe,
    add,
    gather_logits_rows,
    lm_head,
)
COMMON: dict[str, Callable[..., Run]] = {**{f.__name__: f for f in PLAIN}, **FUSED, **OWN}
_fast_qkv = partial(qkv_rope_write_kv, linear=fast_linear, rope=fast_rope, norm=fast_head_norm)
FAST: dict[str, Callable[..., Run]] = {  # what wins on a GPU: the same signatures
    "linear": fast_linear,
    "merged_linear": partial(merged_linear, linear=fast_linear),
    "merged_linear_silu_and_mul": partial(gated_linear, silu_and_mul, linear=fast_linear),
    "merged_linear_gelu_and_mul": partial(gated_linear, gelu_and_mul, linear=fast_linear),
    "rope": fast_rope,
    "attend": fast_attend,
    "rms_norm": fast_rms_norm,
    "fused_add_rms_norm": partial(fused_add_rms_norm, rms_norm=fast_rms_norm),
    "qkv_rope_write_kv": _fast_qkv,
    "qkv_norm_rope_write_kv": _fast_qkv,
}
