"""Sampling on the device, as `llmrs.core.sampling` defines it.

Rows without a parameter get its neutral value (a penalty of 1, a bias of 0), so one expression serves all rows. top-k,
top-p and min-p each keep the m likeliest tokens: one pass finds the smallest m and the m-th logit, and masks what is
below it. Ties keep the lower ids.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from llmrs.core.batch import Batch, NewRequest
from llmrs.core.sampling import SamplingArrays

NEG_INF = -mx.inf


class SlotState:
    """Per-request-slot state on the device."""

    def __init__(self, count: int, max_tokens: int) -> None:
        self.last_token = mx.zeros(count, mx.int32)
        self.tokens = mx.zeros((count, max_tokens + 1), mx.int32)  # for penalties
        self.bias: dict[int, tuple[mx.array, mx.array]] = {}  # slot -> token ids int32, biases

    def add_requests(self, requests: Sequence[NewRequest]) -> None:
        for r in requests:
            self.tokens[r.slot, : len(r.tokens)] = mx.array(r.tokens)
            self.bias.pop(r.slot, None)
            if len(r.bias):
                self.bias[r.slot] = mx.array(r.bias_ids), mx.array(r.bias)

    def append(self, batch: Batch, tokens: mx.array) -> None:
        """Stores the sampled tokens int32 (S,)."""
        sampled = np.flatnonzero(batch.do_sample)
        if not len(sampled):
            return
        slots = mx.array(batch.req_slots[sampled])
        new = tokens if len(sampled) == len(tokens) else tokens[mx.array(sampled.astype(np.int32))]
        self.last_token[slots] = new
        if batch.sampling.needs_history().any():
            self.tokens[slots, mx.array(batch.seq_lens[sampled])] = new


def apply_logits_processors(logits: mx.array, batch: Batch, slots: SlotState, mask: np.ndarray | None) -> mx.array:
    """Logits float32 (S, V) after penalties, biases, banned tokens and mask."""
    if batch.sampling.needs_history().any():
        logits = _apply_penalties(logits, batch, slots)
    for s, slot in enumerate(batch.req_slots.tolist() if slots.bias else ()):
        if slot in slots.bias:
            ids, values = slots.bias[slot]
            logits = logits.at[s, ids].add(values)
    if batch.banned_ids is not None:
        rows, columns = np.nonzero(batch.banned_ids >= 0)
        banned = mx.array(batch.banned_ids[rows, columns])
        logits = logits.at[mx.array(rows.astype(np.int32)), banned].minimum(NEG_INF)
    return logits if mask is None else mx.where(_allowed(mask, logits), logits, NEG_INF)


def _apply_penalties(logits: mx.array, batch: Batch, slots: SlotState) -> mx.array:
    """`llmrs.backends.reference.sampling.apply_penalties` of logits (S, V)."""
    n, vocabulary = logits.shape
    p = batch.sampling
    factor, presence, frequency, lengths, prompts = (
        _column(a)
        for a in (p.repetition_penalty, p.presence_penalty, p.frequency_penalty, batch.seq_lens, p.prompt_len)
    )
    tokens = slots.tokens[mx.array(batch.req_slots), : int(batch.seq_lens.max())]  # (S, max seq_len)
    index = mx.arange(tokens.shape[1])
    rows = mx.arange(n)[:, None]
    blank = mx.zeros((n, vocabulary + 1))  # the last column collects padding
    seen = blank.at[rows, mx.where(index < lengths, tokens, vocabulary)].add(1.0)[:, :vocabulary]
    output = mx.where((index >= prompts) & (index < lengths), tokens, vocabulary)
    counts = blank.at[rows, output].add(1.0)[:, :vocabulary]
    factor = mx.where(seen > 0, factor, 1.0)
    logits = mx.where(logits > 0, logits / factor, logits * factor)
    return logits - frequency * counts - presence * (counts > 0)


def _column(values: np.ndarray) -> mx.array:
    """(S, 1)"""
    return mx.array(values)[:, None]


def _allowed(mask: np.ndarray, logits: mx.array) -> mx.array:
    """Bits uint32 (S, W) -> bool (S, V)."""
    bits = mx.array(mask)[:, :, None] >> mx.arange(32, dtype=mx.uint32) & 1
    return bits.reshape(len(mask), -1)[:, : logits.shape[1]].astype(mx.bool_)


def logprobs(logits: mx.array, tokens: mx.array, count: int) -> tuple[mx.array, ...]:
    """The reference's `logprobs` of logits float32 (R, V), tokens (R,): chosen (R,), top ids, top (R, count)."""
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(log_p, tokens[:, None], axis=-1)[:, 0]
    ids = mx.argsort(-log_p, axis=-1)[:, :count] if count else mx.zeros((len(tokens), 0), mx.uint32)
    return chosen, ids, mx.take_along_axis(log_p, ids, axis=-1) if count else mx.zeros((len(tokens), 0))


def sample(logits: mx.array, params: SamplingArrays) -> mx.array:
    """`llmrs.backends.reference.sampling.sample`: token ids int32 (S,) from processed logits float32 (S, V)."""
    greedy, random = mx.argmax(logits, axis=-1), params.temperature > 0
    if not random.any():
        return greedy.astype(mx.int32)
    drawn = _sample_gumbel(logits, params)
    return (drawn if random.all() else mx.where(mx.array(random), drawn, greedy)).astype(mx.int32)


def _sample_gumbel(logits: mx.array, params: SamplingArrays) -> mx.array:
    """Token ids (S,); undefined for greedy rows."""
    temperature = np.where(params.temperature > 0, params.temperature, np.float32(1))
    logits = _filter_logits(logits / _column(temperature), params)
    return mx.argmax(logits + gumbel(mx.array(params.rng_key), logits.shape[1]), axis=-1)


def _filter_logits(logits: mx.array, params: SamplingArrays) -> mx.array:
    """Logits (S, V) with -inf for all that top-k, top-p and min-p drop."""
    vocabulary = logits.shape[1]
    top_k = np.where(params.top_k > 0, np.minimum(params.top_k, vocabulary), vocabulary).astype(np.int32)
    if (top_k == vocabulary).all() and (params.top_p >= 1).all() and (params.min_p <= 0).all():
        return logits
    count = int(top_k.max())
    ranked = -mx.sort(-(logits if count == vocabulary else mx.topk(logits, count, axis=-1)), axis=-1)
    weights = mx.exp(ranked - ranked[:, :1])
    weights = mx.where(mx.arange(weights.shape[1]) < _column(top_k), weights, 0.0)
    before = mx.cumsum(weights, axis=-1) - weights  # unnormalized mass of likelier tokens
    in_top_p = before < _column(params.top_p) * weights.sum(axis=-1, keepdims=True)
    kept = in_top_p & (weights >= _column(params.min_p)) & (weights > 0)
    counts = mx.maximum(kept.sum(axis=-1, keepdims=True), 1)  # kept tokens of each row, (S, 1)
    threshold = mx.take_along_axis(ranked, counts - 1, axis=-1)  # the smallest kept logit, (S, 1)
    above, equal = logits > threshold, logits == threshold
    ties_kept = counts - above.sum(axis=-1, keepdims=True)
    return mx.where(above | (equal & (mx.cumsum(equal.astype(mx.int32), axis=-1) <= ties_kept)), logits, NEG_INF)


def gumbel(keys: mx.array, vocabulary: int) -> mx.array:
    """`llmrs.backends.reference.sampling.gumbel` of all token ids: float32 (S, V) from keys uint32 (S,)."""
    h = _mix(_mix(mx.arange(vocabulary, dtype=mx.uint32)) ^ keys[:, None])
    v = (h.astype(mx.float32) + 0.5) * 2.0**-32
    return -mx.log(-mx.log1p(-mx.minimum(v, 1 - 2.0**-24)))


def _mix(x: mx.array) -> mx.array:
    """`llmrs.core.sampling.hash32`"""
    x = x ^ x >> 16
    x = x * mx.array(0x7FEB352D, mx.uint32)
    x = x ^ x >> 15
    x = x * mx.array(0x846CA68B, mx.uint32)
    return x ^ x >> 16
