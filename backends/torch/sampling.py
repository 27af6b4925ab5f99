"""Sampling on the device, as `llmrs.core.sampling` defines it.

top-k, top-p and min-p each keep the m likeliest tokens for some m, so one pass finds the smallest m and the value
of the m-th logit, and keeps what lies above it; of equal logits the lower ids stay.
"""

import numpy as np
import torch

from llmrs.backends.torch.attention import on_device
from llmrs.core.sampling import SamplingArrays

SIGNED = {0x7FEB352D: 0x7FEB352D, 0x846CA68B: 0x846CA68B - 2**32}  # torch has no uint32 arithmetic


def sample(logits: torch.Tensor, params: SamplingArrays) -> torch.Tensor:
    """Token ids int64 (S,) from logits float32 (S, V)."""
    tokens = logits.argmax(dim=-1)
    drawn = np.flatnonzero(params.temperature > 0)
    if not len(drawn):
        return tokens
    rows = on_device(drawn, logits.device)
    tokens[rows] = _draw(logits[rows], params.take(drawn))
    return tokens


def _draw(logits: torch.Tensor, params: SamplingArrays) -> torch.Tensor:
    device = logits.device
    logits = logits / on_device(params.temperature, device)[:, None]
    counts = _kept_counts(logits, params)
    if counts is not None:
        logits = _keep(logits, counts)
    keys = on_device(params.key.view(np.int32), device)
    return (logits + gumbel(keys, logits.shape[1])).argmax(dim=-1)


def _kept_counts(logits: torch.Tensor, params: SamplingArrays) -> torch.Tensor | None:
    """How many of the likeliest tokens each row keeps, int64 (S,); None when every row keeps all."""
    device, (_, vocabulary) = logits.device, logits.shape
    top_k = np.where(params.top_k > 0, np.minimum(params.top_k, vocabulary), vocabulary).astype(np.int64)
    if (top_k == vocabulary).all() and (params.top_p >= 1).all() and (params.min_p <= 0).all():
        return None
    widest = int(top_k.max())
    ranked = logits.topk(widest, dim=-1).values if widest < vocabulary else logits.sort(descending=True).values
    weights = torch.exp(ranked - ranked[:, :1])
    k, top_p, min_p = (on_device(a, device)[:, None] for a in (top_k, params.top_p, params.min_p))
    weights = torch.where(torch.arange(weights.shape[1], device=device) < k, weights, 0.0)
    before = weights.cumsum(dim=-1) - weights  # probability of what is likelier, unnormalized
    good = (before < top_p * weights.sum(dim=-1, keepdim=True)) & (weights >= min_p) & (weights > 0)
    return good.sum(dim=-1).clamp(min=1)


def _keep(logits: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Logits with -inf for all but each row's `counts` likeliest."""
    ranked = logits.topk(int(counts.max()), dim=-1).values
    edge = ranked.gather(1, counts[:, None] - 1)  # the last value that stays
    above, equal = logits > edge, logits == edge
    room = counts[:, None] - above.sum(dim=-1, keepdim=True)
    return logits.masked_fill(~(above | (equal & (equal.cumsum(dim=-1) <= room))), -torch.inf)


def gumbel(keys: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Noise float32 (S, V) for keys int32 (S,), the bits of the uint32 ones."""
    tokens = torch.arange(vocabulary, dtype=torch.int32, device=keys.device)
    h = _mix(_mix(tokens)[None, :] ^ keys[:, None])
    v = ((h.to(torch.int64) & 0xFFFFFFFF).to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-v.clamp(max=1 - 2.0**-24)))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """`llmrs.core.sampling.mix` on int32 that hold the bits of uint32."""
    x = x ^ _shift(x, 16)
    x = x * SIGNED[0x7FEB352D]
    x = x ^ _shift(x, 15)
    x = x * SIGNED[0x846CA68B]
    return x ^ _shift(x, 16)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & (2 ** (32 - bits) - 1)
