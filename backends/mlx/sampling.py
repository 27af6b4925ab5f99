"""Sampling on the device, as `llmrs.core.sampling` defines it.

Arrays are never changed: what does not apply to a row is neutral for it (a penalty of 1, a bias of 0), so one
expression serves all rows. top-k, top-p and min-p each keep the m likeliest tokens for some m, so one pass finds the
smallest m and the value of the m-th logit, and keeps what lies above it; of equal logits the lower ids stay.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from llmrs.core.batch import Batch, NewRequest
from llmrs.core.sampling import SamplingArrays

NOTHING = -mx.inf


class SlotState:
    """What the device keeps for each slot."""

    def __init__(self, count: int, max_tokens: int) -> None:
        self.last_token = mx.zeros(count, mx.int32)
        self.tokens = mx.zeros((count, max_tokens + 1), mx.int32)  # where sampling looks back
        self.bias: dict[int, tuple[mx.array, mx.array]] = {}  # token ids int32, what is added to their logits

    def begin(self, begun: Sequence[NewRequest]) -> None:
        for b in begun:
            self.tokens[b.slot, : len(b.tokens)] = mx.array(b.tokens)
            self.bias.pop(b.slot, None)
            if len(b.bias):
                self.bias[b.slot] = mx.array(b.bias_ids), mx.array(b.bias)

    def append(self, batch: Batch, tokens: mx.array) -> None:
        """Keeps the tokens int32 (S,) that were sampled."""
        kept = np.flatnonzero(batch.do_sample)
        if not len(kept):
            return
        slots = mx.array(batch.req_slots[kept])
        new = tokens if len(kept) == len(tokens) else tokens[mx.array(kept.astype(np.int32))]
        self.last_token[slots] = new
        if batch.sampling.needs_history().any():
            self.tokens[slots, mx.array(batch.seq_lens[kept])] = new


def adjusted(logits: mx.array, batch: Batch, slots: SlotState, mask: np.ndarray | None) -> mx.array:
    """Logits float32 (S, V) after penalties, biases, and what must not be sampled."""
    if batch.sampling.needs_history().any():
        logits = _penalized(logits, batch, slots)
    for s, slot in enumerate(batch.req_slots.tolist() if slots.bias else ()):
        if slot in slots.bias:
            ids, values = slots.bias[slot]
            logits = logits.at[s, ids].add(values)
    if batch.banned_ids is not None:
        sequences, at = np.nonzero(batch.banned_ids >= 0)
        rows, columns = mx.array(sequences.astype(np.int32)), mx.array(batch.banned_ids[sequences, at])
        logits = logits.at[rows, columns].minimum(NOTHING)
    return logits if mask is None else mx.where(_allowed(mask, logits), logits, NOTHING)


def _penalized(logits: mx.array, batch: Batch, slots: SlotState) -> mx.array:
    """Logits (S, V) after `llmrs.backends.reference.sampling.apply_penalties`."""
    n, vocabulary = logits.shape
    p = batch.sampling
    factor, presence, frequency, lengths, prompts = (
        _column(a)
        for a in (p.repetition_penalty, p.presence_penalty, p.frequency_penalty, batch.seq_lens, p.prompt_len)
    )
    tokens = slots.tokens[mx.array(batch.req_slots), : int(batch.seq_lens.max())]  # (S, longest)
    at = mx.arange(tokens.shape[1])
    rows = mx.arange(n)[:, None]
    blank = mx.zeros((n, vocabulary + 1))  # with a column for what does not count
    seen = blank.at[rows, mx.where(at < lengths, tokens, vocabulary)].add(1.0)[:, :vocabulary]
    answer = mx.where((at >= prompts) & (at < lengths), tokens, vocabulary)
    times = blank.at[rows, answer].add(1.0)[:, :vocabulary]
    factor = mx.where(seen > 0, factor, 1.0)
    logits = mx.where(logits > 0, logits / factor, logits * factor)
    return logits - frequency * times - presence * (times > 0)


def _column(values: np.ndarray) -> mx.array:
    """(S, 1)"""
    return mx.array(values)[:, None]


def _allowed(mask: np.ndarray, logits: mx.array) -> mx.array:
    """bool (S, V) from bits uint32 (S, W)."""
    bits = mx.array(mask)[:, :, None] >> mx.arange(32, dtype=mx.uint32) & 1
    return bits.reshape(len(mask), -1)[:, : logits.shape[1]].astype(mx.bool_)


def logprobs(logits: mx.array, tokens: mx.array, count: int) -> tuple[mx.array, ...]:
    """`llmrs.backends.reference.sampling.logprobs` of logits float32 (R, V) and tokens (R,): chosen, top ids, top."""
    likely = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(likely, tokens[:, None], axis=-1)[:, 0]
    ids = mx.argsort(-likely, axis=-1)[:, :count] if count else mx.zeros((len(tokens), 0), mx.uint32)
    return chosen, ids, mx.take_along_axis(likely, ids, axis=-1) if count else mx.zeros((len(tokens), 0))


def draw(logits: mx.array, params: SamplingArrays) -> mx.array:
    """`llmrs.backends.reference.sampling.sample`: token ids int32 (S,) from adjusted logits float32 (S, V)."""
    likeliest, warm = mx.argmax(logits, axis=-1), params.temperature > 0
    if not warm.any():
        return likeliest.astype(mx.int32)
    drawn = _drawn(logits, params)
    return (drawn if warm.all() else mx.where(mx.array(warm), drawn, likeliest)).astype(mx.int32)


def _drawn(logits: mx.array, params: SamplingArrays) -> mx.array:
    """Token ids (S,); those of greedy rows mean nothing."""
    temperature = np.where(params.temperature > 0, params.temperature, np.float32(1))
    logits = logits / _column(temperature)
    kept = _kept(logits, params)
    if kept is not None:
        logits = _keep(logits, *kept)
    return mx.argmax(logits + gumbel(mx.array(params.rng_key), logits.shape[1]), axis=-1)


def _kept(logits: mx.array, params: SamplingArrays) -> tuple[mx.array, mx.array] | None:
    """How many of the likeliest tokens each row keeps, and the value of the last, (S, 1); None: all of every row."""
    vocabulary = logits.shape[1]
    top_k = np.where(params.top_k > 0, np.minimum(params.top_k, vocabulary), vocabulary).astype(np.int32)
    if (top_k == vocabulary).all() and (params.top_p >= 1).all() and (params.min_p <= 0).all():
        return None
    ranked = _likeliest(logits, int(top_k.max()))
    weights = mx.exp(ranked - ranked[:, :1])
    weights = mx.where(mx.arange(weights.shape[1]) < _column(top_k), weights, 0.0)
    before = mx.cumsum(weights, axis=-1) - weights  # probability of what is likelier, unnormalized
    enough = before < _column(params.top_p) * weights.sum(axis=-1, keepdims=True)
    good = enough & (weights >= _column(params.min_p)) & (weights > 0)
    counts = mx.maximum(good.sum(axis=-1, keepdims=True), 1)
    return counts, mx.take_along_axis(ranked, counts - 1, axis=-1)


def _likeliest(logits: mx.array, count: int) -> mx.array:
    """The `count` largest, in order."""
    found = logits if count == logits.shape[1] else mx.topk(logits, count, axis=-1)
    return -mx.sort(-found, axis=-1)


def _keep(logits: mx.array, counts: mx.array, edge: mx.array) -> mx.array:
    """Logits with -inf for all but each row's `counts` likeliest, of which `edge` is the last."""
    above, equal = logits > edge, logits == edge
    room = counts - above.sum(axis=-1, keepdims=True)
    return mx.where(above | (equal & (mx.cumsum(equal.astype(mx.int32), axis=-1) <= room)), logits, NOTHING)


def gumbel(keys: mx.array, vocabulary: int) -> mx.array:
    """Noise float32 (S, V) for keys uint32 (S,), `llmrs.backends.reference.sampling.gumbel` of all token ids."""
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
