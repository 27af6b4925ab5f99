"""The contract between core and backends: the arrays of one step, and the slots that they are made from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmrs.core.request import Request
from llmrs.core.sampling import SamplingArrays, noise_keys

MAX_STOPS = 32  # token ids that end one request's answer


@dataclass(frozen=True)
class NewRequest:
    """A slot whose request begins in this step, where its sampling has biases or looks at the tokens so far.

    The device keeps them until the slot begins anew, and appends to a slot's tokens what it samples for it.
    """

    slot: int
    tokens: np.ndarray  # int32 (n,): all that are known, those in the KV cache already too
    bias_ids: np.ndarray  # int32 (b,): token ids
    bias: np.ndarray  # float32 (b,): added to their logits


@dataclass(frozen=True)
class Batch:
    """One step: T tokens of S sequences, each sequence's tokens in a row. All arrays belong to the backend.

    The device holds the last token of every slot, because the host may not have read it yet when it schedules:
    a negative entry in `tokens`, -1 - slot, stands for it. After the step the token sampled for sequence s becomes
    slots[s]'s last token where `sampled[s]`; elsewhere (a part of a prompt) it means nothing.
    Logits are computed for R rows: the last one of each sequence, from which its token is sampled, and those of
    prompts whose log probabilities are asked for.
    """

    input_ids: np.ndarray  # int32 (T,): token id, or -1 - slot
    positions: np.ndarray  # int32 (T,): position in its own sequence
    query_start_loc: np.ndarray  # int32 (S + 1,): sequence s has the tokens starts[s] .. starts[s + 1] - 1
    seq_lens: np.ndarray  # int32 (S,): tokens in the KV cache after this step
    block_tables: np.ndarray  # int32 (S, B): block of position p is blocks[s, p // block_size]; padded with 0
    req_slots: np.ndarray  # int32 (S,)
    do_sample: np.ndarray  # bool (S,)
    sampling: SamplingArrays  # (S,) each
    logits_indices: np.ndarray  # int32 (R,): starts[1:] - 1, then rows of prompts
    prompt_logprob_ids: np.ndarray  # int32 (R - S,): the prompt's token that follows each of the latter
    logprobs: int = -1  # how many likeliest tokens of each row are asked for; -1: no log probabilities at all
    banned_ids: np.ndarray | None = None  # int32 (S, MAX_STOPS): token ids that may not be sampled; padded with -1
    new_requests: Sequence[NewRequest] = field(default_factory=list)


class Slots:
    """Arrays with one row per running request, updated by difference from step to step.

    The scheduler writes them; `batch` reads them. `length` counts the tokens that the host knows, `pending` those
    that are sampled but not read yet, `computed` those whose KV is stored once the steps launched so far are done.
    """

    def __init__(self, count: int, max_tokens: int, max_blocks: int) -> None:
        self.tokens = np.zeros((count, max_tokens), np.int32)
        self.block_tables = np.zeros((count, max_blocks), np.int32)
        self.stop_ids = np.full((count, MAX_STOPS), -1, np.int32)
        (
            self.num_blocks,
            self.num_tokens,
            self.num_inflight,
            self.num_computed_tokens,
            self.max_tokens,
            self.num_cached_blocks,
        ) = np.zeros((6, count), np.int32)
        self.generation = np.full(count, -1, np.int64)  # number of the admission that holds the row, -1: nobody
        self.sampling = SamplingArrays.zeros(count)
        self._last_rows: tuple[bytes, SamplingArrays] | None = None  # slots of the last step, and their rows
        self.min_tokens = np.zeros(count, np.int32)  # length before which no stop is sampled
        self.logprobs, self.prompt_logprobs = np.full((2, count), -1, np.int32)
        self.needs_extras: set[int] = set()  # rows that use one of the latter three
        self.masked: set[int] = set()  # rows whose request has a mask
        self.biased: set[int] = set()  # rows for which the device may keep biases
        self.new_requests: list[NewRequest] = []  # of the next batch

    def write_params(self, slot: int, request: Request) -> None:
        """Fills a row with how its request is sampled."""
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
        """The step that feeds the next counts[s] >= 1 tokens of each slot; `computed` and `pending` move on."""
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
        sampling = self._sampling(slots, end)
        return Batch(
            tokens,
            positions,
            starts,
            end,
            blocks,
            slots,
            sampled,
            sampling,
            ends,
            targets,
            new_requests=begun,
            **special,
        )

    def _sampling(self, slots: np.ndarray, end: np.ndarray) -> SamplingArrays:
        """The rows of `slots`, which are those of the last step while the same requests run."""
        held = slots.tobytes()
        if self._last_rows is None or self._last_rows[0] != held:
            self._last_rows = held, self.sampling.take(slots)
        taken = self._last_rows[1]
        return SamplingArrays(**{**vars(taken), "rng_key": noise_keys(taken.rng_key, end)})

    def _with_prompt_rows(
        self, slots: np.ndarray, row: np.ndarray, positions: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows and targets: also the rows whose next token is the prompt's, where its log probabilities are wanted."""
        within = positions + 1 < self.sampling.prompt_len[slots][row]
        extra = np.flatnonzero(within & (self.prompt_logprobs[slots] >= 0)[row]).astype(np.int32)
        return np.concatenate([ends, extra]), self.tokens[slots[row[extra]], positions[extra] + 1]
