"""The scheduler: which requests run in the next step, with how many tokens.

A step is one ragged batch: first a decode token of every running request, then prefill chunks up to the token budget,
so that a long prompt stalls no decoding. Requests are ordered by arrival and priority. The first is admitted when
blocks for all its tokens are free. A decode that finds no free block preempts the last request, which keeps its tokens
and is recomputed later.
"""

import bisect
import itertools
import time
from collections import Counter
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from llmrs.core.batch import Batch, Slots
from llmrs.core.blocks import ROOT, BlockPool
from llmrs.core.request import Request, TokenLogprobs
from llmrs.core.sampling import Logprobs

MAX_PROMPT_LOGPROB_ROWS = 128  # rows of a step whose logits are kept for the log probabilities of prompts
sort_key = attrgetter("sort_key")


@dataclass(frozen=True)
class Step:
    """A launched batch and what is needed to commit it."""

    batch: Batch
    requests: list[Request]
    generation: np.ndarray  # int64 (S,): admissions that held the slots at launch


class Scheduler:
    """Owns the queue, the slots and the blocks. Used by one thread."""

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, pool: BlockPool) -> None:
        self.token_budget, self.pool = max_num_batched_tokens, pool
        self.slots = Slots(max_num_seqs, max_model_len, pool.blocks_for(max_model_len))
        self.stats: Counter[str] = Counter()  # since the start; finished_* by reason
        self.waiting: list[Request] = []  # by sort_key
        self.running: list[Request] = []  # in order of admission
        self.free_slots = list(range(max_num_seqs))[::-1]
        self.by_slot: dict[int, Request] = {}
        self._running_slots = np.zeros(0, np.int32)  # slots of `running`
        self._admissions = itertools.count()

    def submit(self, request: Request) -> None:
        request.tokens = np.array(request.prompt, np.int32)
        if request.params.prompt_logprobs is not None:
            request.prompt_logprobs = [None] * len(request.prompt)
        self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        bisect.insort(self.waiting, request, key=sort_key)

    def schedule(self) -> Step | None:
        """The next step; None if nothing can run before a launched step is committed."""
        # decode: one token each
        new_tokens, running = self._num_new_tokens(), self._running_slots
        decodes = self._allocate_decode_blocks(running[new_tokens == 1])
        counts = [1] * len(decodes)
        slots, budget = decodes.tolist(), self.token_budget - len(decodes)

        # prefill: partial prefills first, then waiting requests
        partial_prefills = [slot for slot in running[new_tokens > 1].tolist() if slot in self.by_slot]
        prompt_rows = MAX_PROMPT_LOGPROB_ROWS
        while budget > 0 and (partial_prefills or self._can_admit()):
            slot = partial_prefills.pop(0) if partial_prefills else self._admit()
            count = min(budget, int(self.slots.num_tokens[slot] - self.slots.num_computed_tokens[slot]))
            if self.slots.prompt_logprobs[slot] >= 0:
                count = min(count, prompt_rows)
                prompt_rows -= count
            if count:
                slots.append(slot)
                counts.append(count)
                budget -= count
        if not slots:
            return None
        self.stats["steps"] += 1
        self.stats["prompt_tokens"] += sum(counts) - len(decodes)
        req_slots = np.array(slots, np.int32)
        generation = self.slots.generation[req_slots]
        batch = self.slots.batch(req_slots, np.array(counts, np.int32))
        return Step(batch, [self.by_slot[slot] for slot in slots], generation)

    def commit(
        self, step: Step, tokens: np.ndarray, logprobs: Logprobs | None = None
    ) -> list[tuple[Request, list[int]]]:
        """Records a step's tokens int32 (S,); returns the requests that advanced, with their new token or none.

        Tokens of requests that ended or were preempted since the launch are discarded.
        """
        s, slots = self.slots, step.batch.req_slots
        alive = s.generation[slots] == step.generation
        self._cache_full_blocks(step, alive)
        if logprobs is not None:
            self._record(step, alive, tokens, logprobs)
        updates: list[tuple[Request, list[int]]] = []
        for row in (alive & ~step.batch.do_sample).nonzero()[0].tolist():
            request = step.requests[row]
            request.computed_tokens = min(int(step.batch.seq_lens[row]), len(request.prompt))
            updates.append((request, []))
        rows = (alive & step.batch.do_sample).nonzero()[0]
        slots, tokens = slots[rows], tokens[rows]
        s.tokens[slots, s.num_tokens[slots]] = tokens
        s.num_tokens[slots] += 1
        s.num_inflight[slots] -= 1
        self.stats["generated_tokens"] += len(rows)
        stopped = (s.stop_ids[slots] == tokens[:, None]).any(axis=1)
        hit_limit = s.num_tokens[slots] >= s.max_tokens[slots]
        requests = [step.requests[row] for row in rows.tolist()]
        for request, token in zip(requests, tokens.tolist(), strict=True):
            request.output.append(token)
            updates.append((request, [token]))
            if not request.first_token:
                request.first_token, request.computed_tokens = time.monotonic(), len(request.prompt)
        for at in (stopped | hit_limit).nonzero()[0].tolist():
            self.finish(requests[at], "stop" if stopped[at] else "length")
        return updates

    def finish(self, request: Request, reason: str, error: Exception | None = None) -> None:
        """Ends a request, waiting or running, and frees its slot and blocks. A second call changes nothing."""
        if request.finish_reason is None:
            request.finish_reason, request.error, request.finished = reason, error, time.monotonic()
            self.stats[f"finished_{reason}"] += 1
            if request.slot >= 0:
                self._free(request)
            elif request in self.waiting:  # else it was never submitted
                self.waiting.remove(request)

    def _record(self, step: Step, alive: np.ndarray, tokens: np.ndarray, logprobs: Logprobs) -> None:
        """Stores the requested log probabilities of sampled tokens, and of prompt tokens by position."""
        b, s = step.batch, self.slots

        def entry(row: int, token: int, count: int) -> TokenLogprobs:
            ids, top = logprobs.top_ids[row, :count].tolist(), logprobs.top[row, :count].tolist()
            return token, float(logprobs.chosen[row]), ids, top

        for row in np.flatnonzero(alive & b.do_sample & (s.logprobs[b.req_slots] >= 0)).tolist():
            step.requests[row].logprobs.append(entry(row, int(tokens[row]), int(s.logprobs[b.req_slots[row]])))
        for n, (row, target) in enumerate(
            zip(b.logits_indices[len(b.req_slots) :].tolist(), b.prompt_logprob_ids.tolist(), strict=True)
        ):
            at = int(np.searchsorted(b.query_start_loc, row, side="right")) - 1
            if alive[at]:
                likely = entry(len(b.req_slots) + n, target, int(s.prompt_logprobs[b.req_slots[at]]))
                step.requests[at].prompt_logprobs[int(b.positions[row]) + 1] = likely

    def _num_new_tokens(self) -> np.ndarray:
        """Tokens to compute, (running,); 0 where the last allowed token is already in flight."""
        s, slots = self.slots, self._running_slots
        known = s.num_tokens[slots] + s.num_inflight[slots]
        return np.where(known < s.max_tokens[slots], known - s.num_computed_tokens[slots], 0)

    def _allocate_decode_blocks(self, decodes: np.ndarray) -> np.ndarray:
        """The slots of `decodes` that have a block for their next token, after preemption."""
        s = self.slots
        full = decodes[s.num_computed_tokens[decodes] >= s.num_blocks[decodes] * self.pool.size]
        for slot in full.tolist():
            while slot in self.by_slot and not self.pool.num_free:
                self._preempt(max(self.running, key=sort_key))
            if slot in self.by_slot:
                self._add_blocks(slot, self.pool.allocate(1))
        return decodes[s.generation[decodes] >= 0]

    def _can_admit(self) -> bool:
        """Whether blocks for all tokens of the first waiting request are free, plus one if others run."""
        if not self.waiting or not self.free_slots:
            return False
        hit, _ = self._cached(self.waiting[0])
        needed = self.pool.blocks_for(len(self.waiting[0].tokens)) - len(hit) + self.pool.num_free_among(hit)
        return needed + bool(self.running) <= self.pool.num_free

    def _cached(self, request: Request) -> tuple[list[int], int]:
        """Cached blocks of its prefix, and the last one's id. The last token is always computed, for its logits."""
        return self.pool.match_prefix(request.tokens[: 0 if request.prompt_logprobs else -1])

    def _admit(self) -> int:
        """Moves the first waiting request into a slot, with blocks for all its tokens."""
        s, request = self.slots, self.waiting.pop(0)
        slot = request.slot = self.free_slots.pop()
        tokens = request.tokens
        hit, request.last_block_id = self._cached(request)
        self.pool.touch(hit)
        s.tokens[slot, : len(tokens)] = tokens
        s.num_tokens[slot], s.max_tokens[slot] = len(tokens), request.max_total_tokens
        s.num_computed_tokens[slot] = len(hit) * self.pool.size
        s.num_cached_blocks[slot], s.num_inflight[slot], s.num_blocks[slot] = len(hit), 0, 0
        self._add_blocks(slot, hit + self.pool.allocate(self.pool.blocks_for(len(tokens)) - len(hit)))
        s.generation[slot] = next(self._admissions)
        s.write_params(slot, request)
        if not request.started:
            request.started = time.monotonic()
            request.cached_tokens = request.computed_tokens = int(s.num_computed_tokens[slot])
            self.stats["prefix_queries"] += len(tokens)
            self.stats["prefix_hits"] += request.cached_tokens
        self.by_slot[slot] = request
        self.running.append(request)
        self._running_slots = np.append(self._running_slots, np.int32(slot))
        return slot

    def _add_blocks(self, slot: int, blocks: list[int]) -> None:
        s = self.slots
        count = s.num_blocks[slot]
        s.block_tables[slot, count : count + len(blocks)] = blocks
        s.num_blocks[slot] += len(blocks)

    def _preempt(self, request: Request) -> None:
        """Takes a request's slot and blocks. Its token in flight is discarded and sampled again."""
        request.tokens = self.slots.tokens[request.slot, : self.slots.num_tokens[request.slot]].copy()
        self._free(request)
        self._enqueue(request)
        self.stats["preemptions"] += 1

    def _free(self, request: Request) -> None:
        s, slot = self.slots, request.slot
        self.pool.release(s.block_tables[slot, : s.num_blocks[slot]].tolist())
        s.generation[slot] = -1
        request.slot, request.last_block_id = -1, ROOT
        self.free_slots.append(slot)
        del self.by_slot[slot]
        self.running.remove(request)
        self._running_slots = self._running_slots[self._running_slots != slot]

    def _cache_full_blocks(self, step: Step, alive: np.ndarray) -> None:
        """Caches the blocks that this step filled: their contents are certain only now."""
        s, size = self.slots, self.pool.size
        full_blocks = step.batch.seq_lens // size
        for row in (alive & (full_blocks > s.num_cached_blocks[step.batch.req_slots])).nonzero()[0].tolist():
            request, slot = step.requests[row], int(step.batch.req_slots[row])
            for n in range(s.num_cached_blocks[slot], full_blocks[row]):
                tokens = s.tokens[slot, n * size : (n + 1) * size]
                request.last_block_id = self.pool.cache_block(
                    int(s.block_tables[slot, n]), request.last_block_id, tokens
                )
            s.num_cached_blocks[slot] = full_blocks[row]
