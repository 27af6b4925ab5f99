"""Tokenwise kernels: per-head RMSNorm + RoPE, residual add + RMSNorm, activation * up."""

import mlx.core as mx

from llmrs.backends.mlx.kernels.launch import FLOATS, Kernel, Kernels, Template, check, require

NORM_ROPE = Kernel(
    "norm_rope", ("qkv", "positions", "inv_freq", "q_weight", "k_weight", "eps", "offset", "rope_scale"),
    ("q", "k", "v"),
)  # fmt: skip
ADD_NORM = Kernel("fused_add_rms_norm", ("x", "residual", "weight", "eps", "offset"), ("residual_out", "out"))
ACT_AND_MUL = Kernel("act_and_mul", ("gate_up",), ("y",), exact=True)


def norm_rope(
    kernels: Kernels, qkv: mx.array, positions: mx.array, inv_freq: mx.array,
    weights: tuple[mx.array, mx.array] | None, *, kv_heads: int, eps: float = 0.0, offset: float = 0.0,
    rope_scale: float = 1.0, kv_dtype: mx.Dtype,
) -> tuple[mx.array, mx.array, mx.array]:  # fmt: skip
    """q (T, Hq, D), and k and v (T, Hk, D) in `kv_dtype`, which the caller scatters into the KV cache.

    qkv (T, Hq + 2 Hk, D) from one merged linear; positions int32 (T,); inv_freq float32 (D / 2,), radians per
    position; weights (D,) of q and k, None: no norm; rope_scale multiplies cos and sin.
    """
    require(NORM_ROPE, qkv.ndim == 3, "qkv has 3 dimensions")
    tokens, heads, size = qkv.shape
    query_heads = heads - 2 * kv_heads
    require(NORM_ROPE, tokens > 0 and query_heads > 0, f"{tokens} tokens, {query_heads} query heads")
    require(NORM_ROPE, size % 2 == 0 and size >= 16, f"head size {size} is odd or less than 16")
    check(NORM_ROPE, "qkv", qkv, (tokens, heads, size), FLOATS)
    check(NORM_ROPE, "positions", positions, (tokens,), (mx.int32,))
    check(NORM_ROPE, "inv_freq", inv_freq, (size // 2,), (mx.float32,))
    for name, weight in zip(("q_weight", "k_weight"), weights or (), strict=False):
        check(NORM_ROPE, name, weight, (size,), FLOATS)
    norm = weights is not None
    template: Template = {"T": qkv.dtype, "K": kv_dtype, "D": size, "HQ": query_heads, "HK": kv_heads, "NORM": norm}
    inputs = (qkv, positions, inv_freq, *(weights or (inv_freq, inv_freq)), eps, offset, rope_scale)
    shapes = [(tokens, query_heads, size), *[(tokens, kv_heads, size)] * 2]
    outputs = list(zip(shapes, (qkv.dtype, kv_dtype, kv_dtype), strict=True))
    q, k, v = kernels.run(NORM_ROPE, inputs, template, (32, heads, tokens), (32, min(heads, 8), 1), outputs)
    return q, k, v


def fused_add_rms_norm(
    kernels: Kernels, x: mx.array, residual: mx.array, weight: mx.array, *, eps: float, offset: float = 0.0
) -> tuple[mx.array, mx.array]:
    """x + residual and its RMSNorm, (T, N) each, from x and residual (T, N), weight (N,)."""
    require(ADD_NORM, x.ndim == 2 and x.size >= 8, "x is (T, N) of 8 elements or more")
    tokens, width = x.shape
    for name, array in (("x", x), ("residual", residual)):
        check(ADD_NORM, name, array, (tokens, width), (x.dtype,) if x.dtype in FLOATS else FLOATS)
    check(ADD_NORM, "weight", weight, (width,), FLOATS)
    simds = min(max(width // 128, 1), 32)  # 4 elements per thread, up to 1024 threads
    template: Template = {"T": x.dtype, "N": width, "SIMDS": simds}
    grid, threadgroup = (32 * simds, tokens, 1), (32 * simds, 1, 1)
    outputs = [((tokens, width), x.dtype)] * 2
    residual_out, out = kernels.run(ADD_NORM, (x, residual, weight, eps, offset), template, grid, threadgroup, outputs)
    return residual_out, out


def act_and_mul(kernels: Kernels, gate_up: mx.array, *, gelu: bool) -> mx.array:
    """act(gate) * up, (T, N), from gate_up (T, 2 N); act is SiLU or tanh GELU."""
    require(ACT_AND_MUL, gate_up.ndim == 2 and gate_up.shape[1] % 2 == 0, "gate_up is (T, 2 N)")
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    check(ACT_AND_MUL, "gate_up", gate_up, (tokens, 2 * width), FLOATS)
    template: Template = {"T": gate_up.dtype, "N": width, "GELU": gelu}
    grid, threadgroup = (width, tokens, 1), (min(width, 256), 1, 1)
    return kernels.run(ACT_AND_MUL, (gate_up,), template, grid, threadgroup, [((tokens, width), gate_up.dtype)])[0]
