"""The rules that take the place of the common ones where Triton kernels run: each calls one kernel.

Beside them the plain rules of `ops.py` stay: a graph without fused ops, on plain rules, is the definition of these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from llmrs.backends.torch.attn_metadata import InputBuffers, StepShape
from llmrs.backends.torch.kernel_configs import ConfigKey, Device, attn_config, kv_cache_dtype
from llmrs.backends.torch.kernels import embedding as embedding
from llmrs.backends.torch.kernels import gemm as few
from llmrs.backends.torch.kernels import paged_attention as paged
from llmrs.backends.torch.kernels import rms_norm as norm
from llmrs.backends.torch.kernels.act_and_mul import gated
from llmrs.backends.torch.kernels.gemm_tma import Tiles, loadable
from llmrs.backends.torch.kernels.paged_attention import AttnConfig
from llmrs.backends.torch.kernels.prefill_attention_tma import fits, prefill_config, prompt_attention
from llmrs.backends.torch.kernels.qk_norm_rope_cache import qk_norm_rope_write_kv as turn_and_store
from llmrs.backends.torch.ops import KV, OPS
from llmrs.core.ir import RopeFrequencies

Tensor = torch.Tensor


class Turns:
    """Rope's cos and sin for every position, float32 (2, positions, d / 2), made once for each set of frequencies."""

    def __init__(self, positions: int, device: torch.device) -> None:
        self.positions, self.device = positions, device
        self.made: dict[RopeFrequencies, Tensor] = {}

    def of(self, frequencies: RopeFrequencies) -> Tensor:
        if frequencies not in self.made:
            values = torch.tensor(frequencies.values, dtype=torch.float32, device=self.device)
            angles = torch.arange(self.positions, dtype=torch.float32, device=self.device)[:, None] * values
            self.made[frequencies] = torch.stack([angles.cos(), angles.sin()]) * frequencies.scale
        return self.made[frequencies]


@dataclass(frozen=True)
class KernelContext:
    """What the rules need of a step."""

    shape: StepShape
    fields: InputBuffers
    last: Tensor  # int64 (slots,): the last token of each
    turns: Turns
    tile: int  # tokens of a prompt's tile
    device: Device
    copies: bool = False  # whether the kernel for them loads keys by the copy engine, where that is possible


def embed(c: KernelContext, tokens: Tensor, table: Tensor) -> Tensor:
    return embedding.embed(tokens, c.last, table)


def rms_norm(_: KernelContext, x: Tensor, w: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    return norm.rms_norm(x.flatten(0, -2), w, eps=eps, offset=offset).view(x.shape)


def fused_add_rms_norm(
    _: KernelContext, x: Tensor, y: Tensor, w: Tensor, *, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    return norm.fused_add_rms_norm(x, y, w, eps=eps, offset=offset)


def rope(c: KernelContext, x: Tensor, positions: Tensor, *, frequencies: RopeFrequencies) -> Tensor:  # (T, H, d), (T,)
    cos, sin = c.turns.of(frequencies)[:, positions.long(), None]  # (T, 1, d/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def write_kv(c: KernelContext, k: Tensor, v: Tensor, kv: KV) -> KV:
    cells = c.fields.slot_mapping.long()
    at = cells // kv.keys.shape[1], cells % kv.keys.shape[1]
    for cache, new in ((kv.keys, k), (kv.values, v)):
        cache[at] = new.to(cache.dtype)
    return kv


def rope_write_kv(
    c: KernelContext, q: Tensor, positions: Tensor, k: Tensor, v: Tensor, kv: KV, *, frequencies: RopeFrequencies
) -> tuple[Tensor, KV]:
    turns = c.turns.of(frequencies)
    return turn_and_store(q, k, v, None, positions, c.fields.slot_mapping, turns, kv.keys, kv.values), kv


def qk_norm_rope_write_kv(
    c: KernelContext,
    q: Tensor,
    positions: Tensor,
    k: Tensor,
    v: Tensor,
    kv: KV,
    norms: tuple[Tensor, Tensor],
    *,
    frequencies: RopeFrequencies,
    eps: float,
    offset: float = 0.0,
) -> tuple[Tensor, KV]:
    turns, cells = c.turns.of(frequencies), c.fields.slot_mapping
    return turn_and_store(q, k, v, norms, positions, cells, turns, kv.keys, kv.values, eps=eps, offset=offset), kv


def attend(c: KernelContext, q: Tensor, kv: KV, *, scale: float, window: int = 0) -> Tensor:
    """Decode tokens in one launch, prefill chunks in another."""
    tokens, heads, size = q.shape
    block_size, kv_heads = kv.keys.shape[1:3]
    group, shape, f = heads // kv_heads, c.shape, c.fields
    y = torch.empty(tokens, heads * size, dtype=q.dtype, device=q.device)

    def config(prefill: bool) -> AttnConfig:
        return attn_config(ConfigKey(prefill, group, size, q.dtype, kv_cache_dtype(kv.keys)), c.device)

    if shape.num_decode_tiles:
        paged.attention(
            q, kv.keys, kv.values, f.block_tables, f.decode_tiles, y,
            scale=scale, window=window, config=config(False), split=shape.num_kv_splits,
        )  # fmt: skip
    if not shape.num_prefill_tiles:
        return y
    if c.copies and window == 0 and shape.is_long_prefill and fits(kv.keys, q.dtype) and fits(kv.values, q.dtype):
        tma = replace(prefill_config(group, size, block_size), q_tokens=c.tile)
        prompt_attention(q, kv.keys, kv.values, f.block_tables, f.prefill_tiles, y, scale=scale, config=tma)
    else:
        how = replace(config(True), q_tokens=c.tile)
        paged.attention(
            q, kv.keys, kv.values, f.block_tables, f.prefill_tiles, y, scale=scale, window=window, config=how
        )
    return y


def silu_and_mul(_: KernelContext, gate: Tensor, up: Tensor) -> Tensor:
    return gated(gate, up, gelu=False)


def gelu_and_mul(_: KernelContext, gate: Tensor, up: Tensor) -> Tensor:
    return gated(gate, up, gelu=True)


def gather_logits_rows(c: KernelContext, x: Tensor) -> Tensor:
    return x if c.shape.is_decode_only else x.index_select(0, c.fields.logits_indices)


def lm_head(_: KernelContext, x: Tensor, matrix: "Linear") -> Tensor:
    """Logits as the matrix product gives them: sampling widens what it reads."""
    return matrix(x)


@dataclass(frozen=True)
class Linear:
    """y = x w^T (+ bias), weight (N, K): our GEMV for M = 1, cuBLAS for more."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            return few.product(x, self.weight, self.bias)
        return torch.nn.functional.linear(x, self.weight, self.bias)


def rows(
    c: KernelContext,
    x: Tensor,
    *rest: Any,  # what is added, if anything; and the matrix with the norms before and after it
    sizes: Sequence[int] = (),
    gate: str = "",
) -> Tensor | tuple[Tensor, ...]:
    """fusing.py's op, by as few launches as `cut_of` finds best: all in one, or a product with the gate and a norm that
    adds up its ranges; else the library's product, and what stands around it by itself."""
    *more, (matrix, before, after) = rest
    weight, bias = matrix.weight, matrix.bias
    cut = few.cut_of(len(x), weight, bool(gate), after is not None and bias is None, c.device.smem_bytes)
    if isinstance(cut, few.Cut):
        norm, how = (before.weight, before.params) if before else (None, {})
        y = few.product(x, weight, bias, more[0] if more else None, norm, gate=gate, cut=cut, **how)
        return (y, rms_norm(c, y, after.weight, **after.params)) if after else _split(y, sizes)
    x = rms_norm(c, x, before.weight, **before.params) if before else x
    if isinstance(cut, Tiles) and loadable(x):
        y = few.product(x, weight, bias, gate=gate, cut=cut)
    else:
        y = matrix(x)
        y = TRITON[gate](c, *y.chunk(2, dim=-1)) if gate else y
    if after:
        return fused_add_rms_norm(c, more[0], y, after.weight, **after.params)
    return more[0] + y if more else _split(y, sizes)


def _split(y: Tensor, sizes: Sequence[int]) -> Tensor | tuple[Tensor, ...]:
    return y.split(sizes, dim=-1) if sizes else y


TRITON: dict[str, Callable[..., Any]] = {
    **OPS,
    **{
        f.__name__: f
        for f in (
            embed,
            rms_norm,
            fused_add_rms_norm,
            rope,
            write_kv,
            rope_write_kv,
            qk_norm_rope_write_kv,
            attend,
            silu_and_mul,
            gelu_and_mul,
            gather_logits_rows,
            lm_head,
        )
    },
}
FUSED = frozenset({"merged_linear", "fused_add_rms_norm", "qk_norm_rope_write_kv", "rope_write_kv"})
