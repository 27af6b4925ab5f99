"""The contract between core and backends: the arrays of one step, and the slots that they are built from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmrs.core.request import Request
from llmrs.core.sampling import SamplingArrays, noise_keys

MAX_STOPS = 32  # stop token ids of one request


@dataclass(frozen=True)
class NewRequest:
    """Sampling state of a request that starts in this step, if it has biases or penalties.

    The device keeps it until the slot's next request, and appends each sampled token.
    """

    slot: int
    tokens: np.ndarray  # int32 (n,): all known tokens, those in the KV cache included
    bias_ids: np.ndarray  # int32 (b,): token ids
    bias: np.ndarray  # float32 (b,): added to their logits


@dataclass(frozen=True)
class Batch:
    """One step: T tokens of S sequences, each sequence's tokens contiguous. The backend owns all arrays.

    The device holds the last token of every slot, since the host may not have read it when it schedules: a negative
    entry of `input_ids`, -1 - slot, stands for it. After the step the token sampled for sequence s becomes the last
    token of req_slots[s] if do_sample[s]; otherwise (a prefill chunk with more to come) it is discarded.
    R rows get logits: the last of each sequence, which its token is sampled from, and those of prompt tokens whose log
    probabilities are requested.
    """

    input_ids: np.ndarray  # int32 (T,): token id, or -1 - slot
    positions: np.ndarray  # int32 (T,): position in its sequence
    query_start_loc: np.ndarray  # int32 (S + 1,): sequence s has rows query_start_loc[s] .. [s + 1] - 1
    seq_lens: np.ndarray  # int32 (S,): tokens in the KV cache after this step
    block_tables: np.ndarray  # int32 (S, B): position p is in block block_tables[s, p // block_size]; padded with 0
    req_slots: np.ndarray  # int32 (S,)
    do_sample: np.ndarray  # bool (S,)
    sampling: SamplingArrays  # (S,) each
    logits_indices: np.ndarray  # int32 (R,): query_start_loc[1:] - 1, then prompt rows
    prompt_logprob_ids: np.ndarray  # int32 (R - S,): the prompt token after each prompt row
    logprobs: int = -1  # likeliest tokens to return per row; -1: no log probabilities
    banned_ids: np.ndarray | None = None  # int32 (S, MAX_STOPS): not to be sampled (min_tokens); padded with -1
    new_requests: Sequence[NewRequest] = field(default_factory=list)


class Slots:
    """Arrays with one row per running request, updated incrementally. The scheduler writes them, `batch` reads them.

    `num_tokens` counts tokens known to the host, `num_inflight` those sampled but not read yet, `num_computed_tokens`
    those whose KV is stored once all launched steps are done.
    """

    def __init__(self, count: int, max_tokens: int, max_blocks: int) -> None:
        self.tokens = np.zeros((count, max_tokens), np.int32)
        self.block_tables = np.zeros((count, max_blocks), np.int32)
        self.stop_ids = np.full((count, MAX_STOPS), -1, np.int32)
        self.num_blocks, self.num_tokens, self.num_inflight = np.zeros((3, count), np.int32)
        self.num_computed_tokens, self.max_tokens, self.num_cached_blocks = np.zeros((3, count), np.int32)
        self.generation = np.full(count, -1, np.int64)  # admission that holds the row; -1: free
        self.sampling = SamplingArrays.zeros(count)
        self._last_rows: tuple[bytes, SamplingArrays] | None = None  # of the last step: slots, sampling
        self.min_tokens = np.zeros(count, np.int32)  # tokens before which no stop token is sampled
        self.logprobs, self.prompt_logprobs = np.full((2, count), -1, np.int32)
        self.needs_extras: set[int] = set()  # rows that use one of the last three
        self.masked: set[int] = set()  # rows whose request has a token mask
        self.biased: set[int] = set()  # rows that the device may hold biases of
        self.new_requests: list[NewRequest] = []  # of the next batch

    def write_params(self, slot: int, request: Request) -> None:
        """Writes a request's sampling parameters to its row."""
        p = request.params
        self.sampling.write(slot, p, len(request.prompt), request.seed)
        self._last_rows = None
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(request.stops)] = request.stops
        self.min_tokens[slot] = len(request.prompt) + p.min_tokens
        self.logprobs[slot] = -1 if p.logprobs is None else p.logprobs
        self.prompt_logprobs[slot] = -1 if p.prompt_logprobs is None else p.prompt_logprobs
        used = p.min_tokens or p.logprobs is not None or p.prompt_logprobs is not None
        (self.needs_extras.add if used else self.needs_extras.discard)(slot)
        (self.masked.add if request.mask else self.masked.discard)(slot)
        bias = p.logit_bias or {}
        if bias or slot in self.biased or self.sampling.needs_history(slot):
            values = np.array(list(bias.values()), np.float32)
            self.new_requests.append(NewRequest(slot, request.tokens, np.array(list(bias), np.int32), values))
        if bias:
            self.biased.add(slot)

    def batch(self, slots: np.ndarray, counts: np.ndarray) -> Batch:
        """The step of the next counts[s] >= 1 tokens of each slot; advances num_computed_tokens and num_inflight."""
        begin = self.num_computed_tokens[slots]
        end = begin + counts
        known = self.num_tokens[slots]
        sampled = end == known + self.num_inflight[slots]
        starts = np.zeros(len(slots) + 1, np.int32)
        counts.cumsum(out=starts[1:])
        ends, targets = starts[1:] - 1, np.zeros(0, np.int32)
        row = ends if len(slots) == starts[-1] else np.arange(len(slots), dtype=np.int32).repeat(counts)
        positions = np.arange(starts[-1], dtype=np.int32) - (starts[:-1] - begin)[row]
        of = slots[row]
        tokens = np.where(positions < known[row], self.tokens[of, positions], -1 - of)
        self.num_computed_tokens[slots] = end
        self.num_inflight[slots] += sampled
        special: dict[str, Any] = {}
        if self.needs_extras and not self.needs_extras.isdisjoint(slots.tolist()):
            ends, targets = self._with_prompt_rows(slots, row, positions, ends)
            early = end < self.min_tokens[slots]
            banned = np.where(early[:, None], self.stop_ids[slots], np.int32(-1)) if early.any() else None
            asked = np.where(sampled, self.logprobs[slots], -1)
            special = {"banned_ids": banned, "logprobs": int(max(asked.max(), self.prompt_logprobs[slots].max()))}
        begun, self.new_requests = self.new_requests, []
        blocks = self.block_tables[slots, : int(self.num_blocks[slots].max())]
        return Batch(
            tokens, positions, starts, end, blocks, slots, sampled, self._sampling(slots, end), ends, targets,
            new_requests=begun, **special,
        )  # fmt: skip

    def _sampling(self, slots: np.ndarray, end: np.ndarray) -> SamplingArrays:
        """Sampling arrays of `slots`; reused while the same requests run."""
        held = slots.tobytes()
        if self._last_rows is None or self._last_rows[0] != held:
            self._last_rows = held, self.sampling.take(slots)
        taken = self._last_rows[1]
        return SamplingArrays(**{**vars(taken), "rng_key": noise_keys(taken.rng_key, end)})

    def _with_prompt_rows(
        self, slots: np.ndarray, row: np.ndarray, positions: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits rows with those of prompt tokens whose log probabilities are requested, and the tokens after them."""
        within = positions + 1 < self.sampling.prompt_len[slots][row]
        extra = np.flatnonzero(within & (self.prompt_logprobs[slots] >= 0)[row]).astype(np.int32)
        return np.concatenate([ends, extra]), self.tokens[slots[row[extra]], positions[extra] + 1]
