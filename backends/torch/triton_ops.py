"""The rules that take the place of the common ones where Triton kernels run: each calls one kernel.

Beside them the plain rules of `ops.py` stay: a graph without fused ops, on plain rules, is the definition of these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from llmrs.backends.torch.attn_metadata import Fields, Shape
from llmrs.backends.torch.cpu_linear import Linear
from llmrs.backends.torch.kernel_configs import Cuts, pool_type
from llmrs.backends.torch.kernels import embedding as embedding
from llmrs.backends.torch.kernels import gemm as few
from llmrs.backends.torch.kernels import paged_attention as paged
from llmrs.backends.torch.kernels import rms_norm as norm
from llmrs.backends.torch.kernels.act_and_mul import gated
from llmrs.backends.torch.kernels.gather import gather
from llmrs.backends.torch.kernels.gemm_tma import Tiles, loadable
from llmrs.backends.torch.kernels.matvec import matvec
from llmrs.backends.torch.kernels.prefill_attention_tma import fits, prompt_attention, prompt_tiling
from llmrs.backends.torch.kernels.qk_norm_rope_cache import qk_norm_rope_write_kv as turn_and_store
from llmrs.backends.torch.library import Library, Parts
from llmrs.backends.torch.lowering import Bind, Lowering, weights_of
from llmrs.backends.torch.ops import KV, OPS, bind_moe
from llmrs.core.ir import Equation, RopeFrequencies, Type

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

    shape: Shape
    fields: Fields
    last: Tensor  # int64 (slots,): the last token of each
    turns: Turns
    tile: int  # tokens of a prompt's tile
    cuts: Cuts
    library: tuple[Library, Parts] | None = None  # does the parts of prompts in the kernel's place
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
    cells = c.fields.cells.long()
    at = cells // kv.keys.shape[1], cells % kv.keys.shape[1]
    for cache, new in ((kv.keys, k), (kv.values, v)):
        cache[at] = new.to(cache.dtype)
    return kv


def rope_write_kv(
    c: KernelContext, q: Tensor, positions: Tensor, k: Tensor, v: Tensor, kv: KV, *, frequencies: RopeFrequencies
) -> tuple[Tensor, KV]:
    turns = c.turns.of(frequencies)
    return turn_and_store(q, k, v, None, positions, c.fields.cells, turns, kv.keys, kv.values), kv


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
    turns, cells = c.turns.of(frequencies), c.fields.cells
    return turn_and_store(q, k, v, norms, positions, cells, turns, kv.keys, kv.values, eps=eps, offset=offset), kv


def attend(c: KernelContext, q: Tensor, kv: KV, *, scale: float, window: int = 0) -> Tensor:
    """Single tokens in one launch, and parts of prompts in another, or by a library."""
    tokens, heads, size = q.shape
    group, shape, f = heads // kv.keys.shape[2], c.shape, c.fields
    y = torch.empty(tokens, heads * size, dtype=q.dtype, device=q.device)
    if shape.singles:
        cut = c.cuts.tiling(group, size, q.dtype, pool_type(kv.keys), prompt=False)
        paged.attention(
            q, kv.keys, kv.values, f.tables, f.singles, y, scale=scale, window=window, cut=cut, split=shape.split
        )
    if c.library:
        run, parts = c.library
        assert isinstance(kv.keys, Tensor), "a cache in fp8 is refused before"
        assert isinstance(kv.values, Tensor)
        k, v = gather(kv.keys, kv.values, parts.pieces, parts.keys, q.dtype)
        found = run.attend(q[parts.rows], k, v, parts, scale, window).flatten(1)
        if len(found) == tokens:
            return found
        y[parts.rows] = found
    elif (
        shape.chunks and c.copies and window == 0 and shape.long and fits(kv.keys, q.dtype) and fits(kv.values, q.dtype)
    ):
        cut = replace(prompt_tiling(group, size, kv.keys.shape[1]), tokens=c.tile)
        prompt_attention(q, kv.keys, kv.values, f.tables, f.chunks, y, scale=scale, cut=cut)
    elif shape.chunks:
        cut = replace(c.cuts.tiling(group, size, q.dtype, pool_type(kv.keys), prompt=True), tokens=c.tile)
        paged.attention(q, kv.keys, kv.values, f.tables, f.chunks, y, scale=scale, window=window, cut=cut)
    return y


def silu_and_mul(_: KernelContext, gate: Tensor, up: Tensor) -> Tensor:
    return gated(gate, up, gelu=False)


def gelu_and_mul(_: KernelContext, gate: Tensor, up: Tensor) -> Tensor:
    return gated(gate, up, gelu=True)


def gather_logits_rows(c: KernelContext, x: Tensor) -> Tensor:
    return x if c.shape.plain else x.index_select(0, c.fields.rows)


def lm_head(_: KernelContext, x: Tensor, matrix: Linear) -> Tensor:
    """Logits as the matrix product gives them: sampling widens what it reads."""
    return matrix(x)


@dataclass(frozen=True)
class Matrix:
    """y = x w^T (+ bias) for weight (N, K): our own kernel for one row, the library's matrix product for more."""

    weight: Tensor
    bias: Tensor | None = None
    cuts: Cuts | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            return matvec(x, self.weight, self.bias, self.cuts.rows(self.weight) if self.cuts else 0)
        return torch.nn.functional.linear(x, self.weight, self.bias)


class Norm(NamedTuple):
    """rms_norm before or after a linear map."""

    weight: Tensor  # (K,)
    params: dict[str, float]  # eps, and offset if any


class FusedLinear(NamedTuple):
    """The weights of `fused_linear`: prologue norm, matrix and bias, epilogue norm."""

    matrix: Matrix
    prologue: Norm | None
    epilogue: Norm | None


def fused_linear(
    c: KernelContext,
    x: Tensor,
    *rest: Any,  # the residual, if any; FusedLinear
    split_sizes: Sequence[int] = (),
    activation: str = "",
) -> Tensor | tuple[Tensor, ...]:
    """See fusion.py. `cut_of` chooses: one kernel; a GEMM with the activation, and a norm that also reduces its split-K
    partial sums; or cuBLAS's GEMM between kernels for the rest."""
    *residual, (matrix, before, after) = rest
    sizes = () if activation or len(split_sizes) < 2 else split_sizes
    weight, bias, device = matrix.weight, matrix.bias, c.cuts.device
    cut = few.cut_of(len(x), weight, bool(activation), after is not None and bias is None, device.shared)
    if isinstance(cut, few.Cut):
        norm, how = (before.weight, before.params) if before else (None, {})
        y = few.product(x, weight, bias, residual[0] if residual else None, norm, gate=activation, cut=cut, **how)
        return (y, rms_norm(c, y, after.weight, **after.params)) if after else _split(y, sizes)
    x = rms_norm(c, x, before.weight, **before.params) if before else x
    if isinstance(cut, Tiles) and loadable(x):
        y = few.product(x, weight, bias, gate=activation, cut=cut)
    else:
        y = matrix(x)
        y = TRITON[activation](c, *y.chunk(2, dim=-1)) if activation else y
    if after:
        return fused_add_rms_norm(c, residual[0], y, after.weight, **after.params)
    return residual[0] + y if residual else _split(y, sizes)


def _split(y: Tensor, sizes: Sequence[int]) -> Tensor | tuple[Tensor, ...]:
    return y.split(sizes, dim=-1) if sizes else y


def can_fuse_norm(matrix: Type, dtype: torch.dtype) -> bool:
    """Whether the norm of one row may be part of the call of a matrix of this type."""
    return few.normed(torch.empty(matrix.sizes, dtype=dtype, device="meta"))


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
            fused_linear,
        )
    },
}
FUSED = frozenset({"merged_linear", "qk_norm_rope_write_kv", "rope_write_kv"})  # within a layer


def bind_tensors(lowering: Lowering, e: Equation) -> Tensor | tuple[Tensor, ...]:
    tensors = tuple(map(lowering.tensor, weights_of(e)))
    return tensors if len(tensors) > 1 else tensors[0]


def bind_fused_linear(lowering: Lowering, e: Equation) -> FusedLinear:
    weights, first, last = list(weights_of(e)), e.body[0], e.body[-1]
    prologue = Norm(lowering.tensor(weights.pop(0)), first.params) if first.op == "rms_norm" else None
    epilogue = Norm(lowering.tensor(weights.pop()), last.params) if last.op == "rms_norm" else None
    matrix = lowering.linear(*weights)
    assert isinstance(matrix, Matrix)
    return FusedLinear(matrix, prologue, epilogue)


BIND: dict[str, Bind] = {
    "embed": bind_tensors,
    "rms_norm": bind_tensors,
    "fused_add_rms_norm": bind_tensors,
    "qk_norm_rope_write_kv": bind_tensors,
    "moe": bind_moe,
    "fused_linear": bind_fused_linear,
}
