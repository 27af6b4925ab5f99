"""The rule of each op in torch. A rule gets the step's context, the inputs and the params, and gives the results."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from llmrs.backends.torch import sdpa_attention
from llmrs.backends.torch.cpu_linear import Linear
from llmrs.backends.torch.kv_fp8 import QuantizedKV
from llmrs.backends.torch.lowering import Bind, Lowering, weights_of
from llmrs.backends.torch.quant_matrix import QuantMatrix, packed_rows, torch_view
from llmrs.backends.torch.sdpa_attention import AttnMetadata
from llmrs.core.ir import Equation, RopeFrequencies, Weight
from llmrs.quant.tensor import QuantTensor

Tensor = torch.Tensor


@dataclass(frozen=True)
class KV:
    """The KV cache of one layer: keys and values (blocks, block_size, Hk, d)."""

    keys: Tensor | QuantizedKV
    values: Tensor | QuantizedKV


def embed(_: AttnMetadata, tokens: Tensor, table: Callable[[Tensor], Tensor]) -> Tensor:
    return table(tokens)


def linear(_: AttnMetadata, x: Tensor, matrix: Linear) -> Tensor:
    return matrix(x)


def merged_linear(_: AttnMetadata, x: Tensor, matrix: Linear, *, split_sizes: list[int]) -> tuple[Tensor, ...]:
    return matrix(x).split(split_sizes, dim=-1)


def mul_scalar(_: AttnMetadata, x: Tensor, *, by: float) -> Tensor:
    return x * torch.tensor(by, dtype=x.dtype).item()


@dataclass(frozen=True)
class Norm:
    """A norm's weight (n,), and the same twice for one row on a CPU."""

    weight: Tensor
    twice: Tensor | None


def rms_norm(_: AttnMetadata, x: Tensor, norm: Norm, *, eps: float, offset: float = 0.0) -> Tensor:
    w = norm.weight
    if offset:  # 1 + w would lose w's last bits in bf16
        return torch.nn.functional.rms_norm(x.float(), w.shape, w.float() + offset, eps).to(x.dtype)
    if norm.twice is not None and len(x) == 1:
        # (x, -x) has the mean 0 and the mean square of x as variance; layer_norm is one op of torch's, rms_norm ten
        both = torch.nn.functional.layer_norm(torch.cat([x, -x], -1), norm.twice.shape, norm.twice, None, eps)
        return both[..., : x.shape[-1]]
    return torch.nn.functional.rms_norm(x, w.shape, w, eps)


def fused_add_rms_norm(
    c: AttnMetadata, x: Tensor, y: Tensor, norm: Norm, *, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    total = x + y
    return total, rms_norm(c, total, norm, eps=eps, offset=offset)


def heads(_: AttnMetadata, x: Tensor, *, size: int) -> Tensor:  # (T, H * d) -> (T, H, d)
    return x.view(*x.shape[:-1], -1, size)


def rope(c: AttnMetadata, x: Tensor, positions: Tensor, *, frequencies: RopeFrequencies) -> Tensor:  # (T, H, d), (T,)
    return _rotated(x, *cos_sin(c, positions, frequencies)).to(x.dtype)


def qk_norm_rope_write_kv(
    c: AttnMetadata, q: Tensor, positions: Tensor, k: Tensor, v: Tensor, kv: KV, norms: Tensor, *, eps: float,
    frequencies: RopeFrequencies, offset: float = 0.0,
) -> tuple[Tensor, KV]:  # fmt: skip
    """All heads of q and k at once; `norms` (H + Hk, d) hold the offset already."""
    x = _joined(q, k)  # (T, H + Hk, d)
    normal = torch.nn.functional.rms_norm(x.float() if offset else x, x.shape[-1:], None, eps) * norms
    x = _rotated(normal, *cos_sin(c, positions, frequencies)).to(q.dtype)
    return x[:, : q.shape[1]], write_kv(c, x[:, q.shape[1] :], v, kv)


def rope_write_kv(
    c: AttnMetadata, q: Tensor, positions: Tensor, k: Tensor, v: Tensor, kv: KV, *, frequencies: RopeFrequencies
) -> tuple[Tensor, KV]:
    q, k = (rope(c, x, positions, frequencies=frequencies) for x in (q, k))
    return q, write_kv(c, k, v, kv)


def _joined(q: Tensor, k: Tensor) -> Tensor:
    """Heads side by side: without a copy where they are parts of one merged linear map, as they mostly are."""
    (tokens, count, size), more = q.shape, k.shape[1]
    alike = q.stride()[tokens == 1 :] == k.stride()[tokens == 1 :]  # of one token the first means nothing
    if alike and k.data_ptr() == q.data_ptr() + count * size * q.element_size():
        return q.as_strided((tokens, count + more, size), q.stride())
    return torch.cat([q, k], dim=1)


def cos_sin(c: AttnMetadata, positions: Tensor, frequencies: RopeFrequencies) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (T, 1, d/2); once for all layers of a step."""
    if frequencies not in c.cos_sin:
        c.cos_sin[frequencies] = cos_sin_of(positions, frequencies)
    return c.cos_sin[frequencies]


def cos_sin_of(positions: Tensor, frequencies: RopeFrequencies) -> tuple[Tensor, Tensor]:
    angles = positions[:, None].float() * _on_device(frequencies, positions.device)
    cos, sin = (f(angles)[:, None, :] * frequencies.scale for f in (torch.cos, torch.sin))
    return cos, sin


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """float32 from x (T, H, d)."""
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    (a, b), (left, right) = x.float().chunk(2, dim=-1), y.chunk(2, dim=-1)
    torch.mul(a, cos, out=left).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=right).addcmul_(a, sin)
    return y


@cache
def _on_device(frequencies: RopeFrequencies, device: torch.device) -> Tensor:
    return torch.tensor(frequencies.values, dtype=torch.float32, device=device)


def write_kv(c: AttnMetadata, k: Tensor, v: Tensor, kv: KV) -> KV:  # (T, Hk, d) each
    for cache_, new in ((kv.keys, k), (kv.values, v)):
        cache_.flatten(0, 1)[c.slot_mapping] = new.to(cache_.dtype)
    return kv


def attend(c: AttnMetadata, q: Tensor, kv: KV, *, scale: float, window: int = 0) -> Tensor:
    return sdpa_attention.attend(c, q, kv.keys, kv.values, scale, window)


def silu_and_mul(_: AttnMetadata, gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def gelu_and_mul(_: AttnMetadata, gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


@dataclass(frozen=True)
class Experts:
    """The weights of a mixture of experts: the router, and gate, up and down of each expert."""

    router: Tensor  # (E, D)
    each: list[tuple[Linear, Linear, Linear]]


def moe(c: AttnMetadata, x: Tensor, experts: Experts, *, top_k: int, norm_topk_prob: bool) -> Tensor:
    """Expert by expert, each with the rows of the tokens that chose it."""
    p = torch.nn.functional.linear(x, experts.router).softmax(dim=-1, dtype=torch.float32)
    weights, chosen = p.topk(top_k, dim=-1)  # (T, top_k)
    if norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    y = torch.zeros_like(x)
    for e in chosen.unique().tolist():
        rows, places = (chosen == e).nonzero(as_tuple=True)
        gate, up, down = experts.each[e]
        h = silu_and_mul(c, gate(x[rows]), up(x[rows]))
        y.index_add_(0, rows, down(h) * weights[rows, places, None].to(x.dtype))
    return y


def add(_: AttnMetadata, x: Tensor, y: Tensor) -> Tensor:
    return x + y


def gather_logits_rows(c: AttnMetadata, x: Tensor) -> Tensor:
    return x[c.logits_indices]


def lm_head(_: AttnMetadata, x: Tensor, matrix: Linear) -> Tensor:
    return matrix(x).float()


OPS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (
        embed, mul_scalar, linear, merged_linear, rms_norm, fused_add_rms_norm, heads, rope, qk_norm_rope_write_kv,
        rope_write_kv, write_kv, attend, silu_and_mul, gelu_and_mul, moe, add, gather_logits_rows, lm_head,
    )
}  # fmt: skip
FUSED = frozenset({"merged_linear", "qk_norm_rope_write_kv", "rope_write_kv"})


# How weights are bound: what an op takes after its values, for ops that do not take a linear map.


def bind_embed(lowering: Lowering, e: Equation) -> Callable[[Tensor], Tensor]:
    """Rows of the table. On the CPU they are read from the file, so that a packed head needs no second copy."""
    (weight,) = weights_of(e)
    if lowering.device.type == "cpu" and len(weight.segments) == 1:
        stored, dtype = lowering.table(weight.segments[0].tensor), lowering.dtype
        if not isinstance(stored, QuantTensor):
            rows = torch_view(stored)
            return lambda tokens: rows[tokens].to(dtype)
        if not lowering.keep_quantized:
            return lambda tokens: packed_rows(stored.rows(tokens.numpy()), lowering.device).unpack(dtype)
    table = lowering.matrix(weight)
    return table.gather if isinstance(table, QuantMatrix) else lambda tokens: table[tokens]


def bind_rms_norm(lowering: Lowering, e: Equation) -> Norm:
    weight = lowering.tensor(*weights_of(e))
    half_on_cpu = weight.device.type == "cpu" and weight.dtype != torch.float32
    return Norm(weight, torch.cat([weight, weight]) if half_on_cpu else None)


def bind_qk_norm(lowering: Lowering, e: Equation) -> Tensor:
    """The norms' weights for each head, (H + Hk, d); in float32 where something is added to them."""
    heads = [o.type.sizes[0] for o in (e.inputs[0], e.inputs[3])]  # of q and k
    norms = [lowering.tensor(w).expand(n, -1) for w, n in zip(weights_of(e), heads, strict=True)]
    offset = e.params.get("offset", 0.0)
    return torch.cat(norms).float() + offset if offset else torch.cat(norms)


def bind_moe(lowering: Lowering, e: Equation) -> Experts:
    """Each expert's matrices by themselves; a segment holds one expert, or several."""
    router, *stacks = weights_of(e)
    count = router.type.sizes[0]
    split = [
        [m for s in w.segments for m in lowering.matrix(Weight((s,), w.columns)).split(w.type.sizes[0] // count)]
        for w in stacks
    ]
    make = lowering.make_linear
    experts = [(make(g), make(u), make(d)) for g, u, d in zip(*split, strict=True)]
    return Experts(lowering.tensor(router), experts)


BIND: dict[str, Bind] = {
    "embed": bind_embed, **dict.fromkeys(("rms_norm", "fused_add_rms_norm"), bind_rms_norm),
    "qk_norm_rope_write_kv": bind_qk_norm, "moe": bind_moe,
}  # fmt: skip
