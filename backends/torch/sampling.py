"""Sampling on the device, as `llmrs.core.sampling` defines it.

top-k, top-p and min-p each keep the m likeliest tokens for some m: one pass finds the smallest m and the m-th logit,
the threshold. Of equal logits the lower ids stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmrs.backends.torch.sdpa_attention import on_device
from llmrs.core.batch import Batch, NewRequest
from llmrs.core.sampling import SamplingArrays

if TYPE_CHECKING:  # Triton is not installed on every system
    from llmrs.backends.torch.attn_metadata import StepBuffers
    from llmrs.backends.torch.cuda_graphs import CapturedStep

AS_INT32 = {0x7FEB352D: 0x7FEB352D, 0x846CA68B: 0x846CA68B - 2**32}  # as int32: torch has no uint32 arithmetic


class SlotState:
    """Per-slot state on the device."""

    def __init__(self, count: int, max_tokens: int, device: torch.device) -> None:
        self.device = device
        self.last_token = torch.zeros(count, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(count, max_tokens + 1, dtype=torch.int32, device=device)  # for penalties
        self.bias: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # token ids int64, biases

    def begin(self, begun: Sequence[NewRequest]) -> None:
        for b in begun:
            self.tokens[b.slot, : len(b.tokens)] = on_device(b.tokens, self.device)
            self.bias.pop(b.slot, None)
            if len(b.bias):
                self.bias[b.slot] = on_device(b.bias_ids.astype(np.int64), self.device), on_device(b.bias, self.device)

    def append(self, batch: Batch, tokens: torch.Tensor) -> None:
        """Records sampled tokens int64 (S,)."""
        kept = np.flatnonzero(batch.do_sample)
        slots = on_device(batch.req_slots[kept].astype(np.int64), self.device)
        new = tokens if len(kept) == len(tokens) else tokens[on_device(kept, self.device)]
        self.last_token[slots] = new
        if batch.sampling.needs_history().any():
            self.tokens[slots, on_device(batch.seq_lens[kept].astype(np.int64), self.device)] = new.to(torch.int32)


@dataclass(frozen=True)
class Logits:
    """A step between forward and sampling: logits (R, V), and the buffers and the CUDA graph that ran it, if any."""

    values: torch.Tensor
    buffers: "StepBuffers | None" = None
    graph: "CapturedStep | None" = None


def sample(logits: torch.Tensor, batch: Batch, slots: SlotState, mask: np.ndarray | None) -> torch.Tensor:
    """Token ids int64 (S,) from logits float32 (S, V)."""
    if needs_logits_processors(batch, slots, mask):
        logits = apply_logits_processors(logits, batch, slots, mask)
    tokens = logits.argmax(dim=-1)
    sampled = np.flatnonzero(batch.sampling.temperature > 0)
    if not len(sampled):
        return tokens
    if len(sampled) == len(tokens):
        return sample_gumbel(logits, batch.sampling)
    rows = on_device(sampled, logits.device)
    tokens[rows] = sample_gumbel(logits[rows], batch.sampling.take(sampled))
    return tokens


def needs_logits_processors(batch: Batch, slots: SlotState, mask: np.ndarray | None) -> bool:
    """Whether a sequence has a penalty, a bias, banned tokens or a mask."""
    return (
        batch.banned_ids is not None
        or mask is not None
        or bool(batch.sampling.needs_history().any())
        or not slots.bias.keys().isdisjoint(batch.req_slots.tolist())
    )


def apply_logits_processors(
    logits: torch.Tensor, batch: Batch, slots: SlotState, mask: np.ndarray | None
) -> torch.Tensor:
    """A float32 copy (S, V) with penalties, biases, banned tokens and the mask applied."""
    back = np.flatnonzero(batch.sampling.needs_history())
    biased = [s for s, slot in enumerate(batch.req_slots.tolist()) if slot in slots.bias]
    logits = logits.float().clone()
    if len(back):
        rows = on_device(back, logits.device)
        logits[rows] = _apply_penalties(logits[rows], batch, back, slots)
    for s in biased:
        at, values = slots.bias[int(batch.req_slots[s])]
        logits[s, at] += values
    if batch.banned_ids is not None:
        sequences, columns = np.nonzero(batch.banned_ids >= 0)
        ids = batch.banned_ids[sequences, columns].astype(np.int64)
        logits[on_device(sequences, logits.device), on_device(ids, logits.device)] = -torch.inf
    return logits if mask is None else logits.masked_fill(~_allowed(mask, logits), -torch.inf)


def _apply_penalties(logits: torch.Tensor, batch: Batch, rows: np.ndarray, slots: SlotState) -> torch.Tensor:
    """Logits (n, V) of the sequences `rows` after `llmrs.backends.reference.sampling.apply_penalties`."""
    device, (n, vocabulary) = logits.device, logits.shape
    longest = int(batch.seq_lens[rows].max())
    params = batch.sampling.take(rows)
    lengths, prompts = (on_device(a, device)[:, None] for a in (batch.seq_lens[rows], params.prompt_len))
    factor, presence, frequency = (
        on_device(a, device)[:, None]
        for a in (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    )
    tokens = slots.tokens[on_device(batch.req_slots[rows].astype(np.int64), device), :longest].long()
    at = torch.arange(longest, device=device)
    nothing = torch.full_like(tokens, vocabulary)  # a column of its own for positions that don't count
    counts = torch.zeros(2, n, vocabulary + 1, device=device)
    counts[0].scatter_(1, torch.where(at < lengths, tokens, nothing), 1.0)
    answer = torch.where((at >= prompts) & (at < lengths), tokens, nothing)
    counts[1].scatter_add_(1, answer, torch.ones_like(answer, dtype=torch.float32))
    seen, times = counts[:, :, :vocabulary]
    factor = torch.where(seen > 0, factor, 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - frequency * times - presence * (times > 0)


def _allowed(mask: np.ndarray, logits: torch.Tensor) -> torch.Tensor:
    """bool (S, V) from bits uint32 (S, W)."""
    words = on_device(mask.view(np.int32), logits.device)
    bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)) & 1
    return bits.flatten(1)[:, : logits.shape[1]].bool()


def logprobs(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Chosen, top ids, top of logits float32 (R, V) and tokens int64 (R,); see backends/reference/sampling.py."""
    likely = logits.log_softmax(dim=-1)
    chosen = likely.gather(1, tokens[:, None])[:, 0]
    if not count:
        return chosen, tokens.new_zeros(len(tokens), 0), chosen.new_zeros(len(tokens), 0)
    top = likely.sort(dim=-1, descending=True, stable=True)
    return chosen, top.indices[:, :count], top.values[:, :count]


def sample_gumbel(logits: torch.Tensor, params: SamplingArrays) -> torch.Tensor:
    """Token ids int64 (S,) from adjusted logits float32 (S, V); no temperature is 0."""
    device = logits.device
    logits = logits / on_device(params.temperature, device)[:, None]
    counts = _num_kept(logits, params)
    if counts is not None:
        logits = _mask_below(logits, counts)
    keys = on_device(params.rng_key.view(np.int32), device)
    return (logits + gumbel(keys, logits.shape[1])).argmax(dim=-1)


def _num_kept(logits: torch.Tensor, params: SamplingArrays) -> torch.Tensor | None:
    """How many of the likeliest tokens each row keeps, int64 (S,); None: all rows keep all."""
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


def _mask_below(logits: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Logits with -inf for all but each row's `counts` likeliest tokens."""
    ranked = logits.topk(int(counts.max()), dim=-1).values
    threshold = ranked.gather(1, counts[:, None] - 1)
    above, equal = logits > threshold, logits == threshold
    ties_kept = counts[:, None] - above.sum(dim=-1, keepdim=True)
    return logits.masked_fill(~(above | (equal & (equal.cumsum(dim=-1) <= ties_kept))), -torch.inf)


def gumbel(keys: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Noise float32 (S, V) for keys int32 (S,), the bits of uint32."""
    tokens = torch.arange(vocabulary, dtype=torch.int32, device=keys.device)
    h = _hash32(_hash32(tokens)[None, :] ^ keys[:, None])
    v = ((h.to(torch.int64) & 0xFFFFFFFF).to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-v.clamp(max=1 - 2.0**-24)))


def _hash32(x: torch.Tensor) -> torch.Tensor:
    """`llmrs.core.sampling.hash32` on int32 that hold the bits of uint32."""
    x = x ^ _shift(x, 16)
    x = x * AS_INT32[0x7FEB352D]
    x = x ^ _shift(x, 15)
    x = x * AS_INT32[0x846CA68B]
    return x ^ _shift(x, 16)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & (2 ** (32 - bits) - 1)
