"""Ops implemented by Triton kernels. `ops.py` has the others, and the definitions of the fused ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from llmrs.backends.torch.attn_metadata import InputBuffers, StepShape
from llmrs.backends.torch.kernel_configs import ConfigKey, Device, attn_config
from llmrs.backends.torch.kernels import embedding, gemm
from llmrs.backends.torch.kernels import rms_norm as norms
from llmrs.backends.torch.kernels.act_and_mul import act_and_mul
from llmrs.backends.torch.kernels.gemm import GemvConfig
from llmrs.backends.torch.kernels.gemm_tma import TmaConfig, tma_compatible
from llmrs.backends.torch.kernels.paged_attention import AttnConfig, paged_attention
from llmrs.backends.torch.kernels.prefill_attention_tma import prefill_attention_tma, prefill_config
from llmrs.backends.torch.kernels.prefill_attention_tma import tma_compatible as cache_tma_compatible
from llmrs.backends.torch.kernels.qk_norm_rope_cache import qk_norm_rope_write_kv as qk_norm_rope_cache
from llmrs.backends.torch.kv_fp8 import unpack
from llmrs.backends.torch.lowering import Bind, Lowering, weights_of
from llmrs.backends.torch.ops import KV, OPS, bind_moe
from llmrs.backends.torch.quant_linear import Norm, quant_linear
from llmrs.backends.torch.quant_matrix import Matrix, QuantMatrix
from llmrs.backends.torch.triton_rows import TritonRows
from llmrs.core.ir import Equation, RopeFrequencies

Tensor = torch.Tensor


class CosSinCache:
    """RoPE's cos and sin of every position, float32 (2, positions, d / 2), made once per set of frequencies."""

    def __init__(self, positions: int, device: torch.device) -> None:
        self.positions, self.device = positions, device
        self.tables: dict[RopeFrequencies, Tensor] = {}

    def get(self, frequencies: RopeFrequencies) -> Tensor:
        if frequencies not in self.tables:
            values = torch.tensor(frequencies.values, dtype=torch.float32, device=self.device)
            angles = torch.arange(self.positions, dtype=torch.float32, device=self.device)[:, None] * values
            self.tables[frequencies] = torch.stack([angles.cos(), angles.sin()]) * frequencies.scale
        return self.tables[frequencies]


@dataclass(frozen=True)
class KernelContext:
    """A step, as ops see it."""

    shape: StepShape
    fields: InputBuffers
    last_tokens: Tensor  # int64 (slots,)
    cos_sin_cache: CosSinCache
    block_m_tokens: int  # query tokens of a prefill tile
    device: Device
    use_tma: bool = False  # for prefill attention, where the cache's layout allows it
    pdl: bool = False


@dataclass(frozen=True)
class Linear:
    """y = x w^T (+ bias), weight (N, K): our GEMV for M = 1, cuBLAS for more; quantized: quant_linear.py."""

    weight: Matrix
    bias: Tensor | None = None

    def __call__(self, x: Tensor, *, pdl: bool = False) -> Tensor:
        if isinstance(self.weight, QuantMatrix):
            return quant_linear(x, self.weight, self.bias, pdl=pdl)
        if len(x) == 1:
            return gemm.fused_linear(x, self.weight, self.bias, pdl=pdl)
        return torch.nn.functional.linear(x, self.weight, self.bias)


def embed(c: KernelContext, tokens: Tensor, table: Matrix) -> Tensor:
    if isinstance(table, QuantMatrix):
        (rows,) = table.segments
        if isinstance(rows, TritonRows):
            return rows.gather(tokens, table.dtype, c.last_tokens, pdl=c.pdl)
        known = c.last_tokens[(-1 - tokens).clamp(min=0)]
        return table.gather(torch.where(tokens < 0, known, tokens))
    return embedding.embed(tokens, c.last_tokens, table, pdl=c.pdl)


def linear(c: KernelContext, x: Tensor, matrix: Linear) -> Tensor:
    return matrix(x, pdl=c.pdl)


def merged_linear(c: KernelContext, x: Tensor, matrix: Linear, *, split_sizes: list[int]) -> tuple[Tensor, ...]:
    return matrix(x, pdl=c.pdl).split(split_sizes, dim=-1)


def rms_norm(c: KernelContext, x: Tensor, w: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    return norms.rms_norm(x.flatten(0, -2), w, eps=eps, offset=offset, pdl=c.pdl).view(x.shape)


def fused_add_rms_norm(
    c: KernelContext, residual: Tensor, x: Tensor, w: Tensor, *, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    return norms.fused_add_rms_norm(residual, x, w, eps=eps, offset=offset, pdl=c.pdl)


def rope(c: KernelContext, x: Tensor, positions: Tensor, *, frequencies: RopeFrequencies) -> Tensor:  # (T, H, d), (T,)
    cos, sin = c.cos_sin_cache.get(frequencies)[:, positions.long(), None]  # (T, 1, d/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def write_kv(c: KernelContext, k: Tensor, v: Tensor, kv: KV) -> KV:
    slots = c.fields.slot_mapping.long()
    at = slots // kv.keys.shape[1], slots % kv.keys.shape[1]
    for cache, new in ((kv.keys, k), (kv.values, v)):
        cache[at] = new.to(cache.dtype)
    return kv


def qk_norm_rope_write_kv(
    c: KernelContext, q: Tensor, positions: Tensor, k: Tensor, v: Tensor, kv: KV,
    norms: tuple[Tensor, Tensor] | None = None, *, frequencies: RopeFrequencies, eps: float = 0.0, offset: float = 0.0,
) -> tuple[Tensor, KV]:  # fmt: skip
    table, slots = c.cos_sin_cache.get(frequencies), c.fields.slot_mapping
    return qk_norm_rope_cache(
        q, k, v, norms, positions, slots, table, kv.keys, kv.values, eps=eps, offset=offset, pdl=c.pdl
    ), kv


def attend(c: KernelContext, q: Tensor, kv: KV, *, scale: float, window: int = 0) -> Tensor:
    """Decode tokens in one launch, prefill chunks in another."""
    tokens, heads, head_dim = q.shape
    block_size, kv_heads = kv.keys.shape[1:3]
    group, shape, f = heads // kv_heads, c.shape, c.fields
    out = torch.empty(tokens, heads * head_dim, dtype=q.dtype, device=q.device)

    def config(prefill: bool) -> AttnConfig:
        return attn_config(ConfigKey(prefill, group, head_dim, q.dtype, unpack(kv.keys)[0].dtype), c.device)

    if shape.num_decode_tiles:
        paged_attention(
            q, kv.keys, kv.values, f.block_tables, f.decode_tiles, out,
            scale=scale, window=window, config=config(False), num_splits=shape.num_kv_splits, pdl=c.pdl,
        )  # fmt: skip
    if not shape.num_prefill_tiles:
        return out
    tables, tiles = f.block_tables, f.prefill_tiles
    use_tma = c.use_tma and window == 0 and shape.is_long_prefill
    if use_tma and cache_tma_compatible(kv.keys, q.dtype) and cache_tma_compatible(kv.values, q.dtype):
        tma = replace(prefill_config(group, head_dim, block_size), q_tokens=c.block_m_tokens)
        prefill_attention_tma(q, kv.keys, kv.values, tables, tiles, out, scale=scale, config=tma, pdl=c.pdl)
    else:
        paged = replace(config(True), q_tokens=c.block_m_tokens)
        paged_attention(q, kv.keys, kv.values, tables, tiles, out, scale=scale, window=window, config=paged, pdl=c.pdl)
    return out


def silu_and_mul(c: KernelContext, gate: Tensor, up: Tensor) -> Tensor:
    return act_and_mul(gate, up, gelu=False, pdl=c.pdl)


def gelu_and_mul(c: KernelContext, gate: Tensor, up: Tensor) -> Tensor:
    return act_and_mul(gate, up, gelu=True, pdl=c.pdl)


def gather_logits_rows(c: KernelContext, x: Tensor) -> Tensor:
    return x if c.shape.is_decode_only else x.index_select(0, c.fields.logits_indices)


class FusedLinear(NamedTuple):
    """The weights of `fused_linear`: prologue norm, matrix and bias, epilogue norm."""

    matrix: Linear
    prologue: Norm | None
    epilogue: Norm | None


def fused_linear(
    c: KernelContext,
    x: Tensor,
    *rest: Any,  # the residual, if any; FusedLinear
    split_sizes: Sequence[int] = (),
    activation: str = "",
) -> Tensor | tuple[Tensor, ...]:
    """See fusion.py. `select_gemm` chooses: one kernel; a GEMM with the activation, and a norm that reduces its split-K
    partial sums; or cuBLAS between kernels for the rest."""
    *residual, (matrix, prologue, epilogue) = rest
    sizes = () if activation or len(split_sizes) < 2 else split_sizes
    weight, bias = matrix.weight, matrix.bias
    if isinstance(weight, QuantMatrix):
        first = residual[0] if residual and not epilogue else None
        y = quant_linear(
            x, weight, bias, first, prologue, activation, splittable=epilogue is not None and bool(residual), pdl=c.pdl
        )
        if epilogue and residual:
            return fused_add_rms_norm(c, residual[0], y, epilogue.weight, **epilogue.params)
        return (y, rms_norm(c, y, epilogue.weight, **epilogue.params)) if epilogue else _split(y, sizes)
    reducible = epilogue is not None and bias is None
    config = gemm.select_gemm(len(x), weight, bool(activation), reducible, c.device.smem_bytes)
    if prologue and not (isinstance(config, GemvConfig) and gemm.can_fuse_norm(weight)):
        x, prologue = rms_norm(c, x, prologue.weight, **prologue.params), None
    if config and not isinstance(config, TmaConfig):
        norm_weight, how = (prologue.weight, prologue.params) if prologue else (None, {})
        added = residual[0] if residual else None
        y = gemm.fused_linear(x, weight, bias, added, norm_weight, act=activation, config=config, pdl=c.pdl, **how)
        return (y, rms_norm(c, y, epilogue.weight, **epilogue.params)) if epilogue else _split(y, sizes)
    if config and tma_compatible(x):
        y = gemm.fused_linear(x, weight, bias, act=activation, config=config, pdl=c.pdl)
    else:
        y = matrix(x, pdl=c.pdl)
        y = TRITON[activation](c, *y.chunk(2, dim=-1)) if activation else y
    if epilogue:
        return fused_add_rms_norm(c, residual[0], y, epilogue.weight, **epilogue.params)
    return residual[0] + y if residual else _split(y, sizes)


def _split(y: Tensor, sizes: Sequence[int]) -> Tensor | tuple[Tensor, ...]:
    return y.split(sizes, dim=-1) if sizes else y


TRITON: dict[str, Callable[..., Any]] = {
    **OPS,
    **{f.__name__: f for f in (
        embed, linear, merged_linear, rms_norm, fused_add_rms_norm, rope, write_kv, qk_norm_rope_write_kv, attend,
        silu_and_mul, gelu_and_mul, gather_logits_rows, fused_linear,
    )},
    "lm_head": linear,  # logits in the model's dtype: sampling widens them as it reads
    "rope_write_kv": qk_norm_rope_write_kv,
}  # fmt: skip
FUSED = frozenset({"merged_linear", "qk_norm_rope_write_kv", "rope_write_kv"})  # within a layer

LINEAR = ("linear", "merged_linear", "lm_head")
# The ops whose time a profile shows under a kernel's name; () for a second kernel of the same op
KERNEL_OPS: dict[str, tuple[str, ...]] = {
    "gemv_kernel": LINEAR, "gemm_small_m_kernel": LINEAR, "gemm_tma_kernel": LINEAR,
    "fused_add_rms_norm_kernel": ("rms_norm", "fused_add_rms_norm"), "embed_kernel": ("embed",),
    "act_and_mul_kernel": ("silu_and_mul", "gelu_and_mul"),
    "qk_norm_rope_write_kv_kernel": ("qk_norm_rope_write_kv", "rope_write_kv"),
    "paged_attention_kernel": ("attend",), "prefill_attention_tma_kernel": ("attend",), "combine_splits_kernel": (),
    "sample_gumbel_kernel": ("sample",), "find_thresholds_kernel": (), "reduce_argmax_kernel": (),
}  # fmt: skip


def bind_tensors(lowering: Lowering, e: Equation) -> Tensor | tuple[Tensor, ...]:
    tensors = tuple(map(lowering.tensor, weights_of(e)))
    return tensors if len(tensors) > 1 else tensors[0]


def bind_table(lowering: Lowering, e: Equation) -> Matrix:
    (table,) = weights_of(e)
    return lowering.matrix(table)


def bind_fused_linear(lowering: Lowering, e: Equation) -> FusedLinear:
    weights, first, last = list(weights_of(e)), e.body[0], e.body[-1]
    prologue = Norm(lowering.tensor(weights.pop(0)), first.params) if first.op == "rms_norm" else None
    epilogue = Norm(lowering.tensor(weights.pop()), last.params) if last.op == "rms_norm" else None
    matrix = lowering.linear(*weights)
    assert isinstance(matrix, Linear)
    return FusedLinear(matrix, prologue, epilogue)


BIND: dict[str, Bind] = {
    **dict.fromkeys(("rms_norm", "fused_add_rms_norm", "qk_norm_rope_write_kv"), bind_tensors),
    "embed": bind_table, "moe": bind_moe, "fused_linear": bind_fused_linear,
}  # fmt: skip
