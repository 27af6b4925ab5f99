"""Who runs in the next step.

A step is one ragged batch: a token for every running answer first, then parts of prompts up to the token budget,
so a long prompt stalls nobody. A request is admitted when blocks for all its tokens are free; an answer that needs
a block when none is left preempts the newest request, which keeps its tokens and is computed again later.
"""

import itertools
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from llmrs.core.batch import Batch, Slots
from llmrs.core.blocks import ROOT, BlockPool
from llmrs.core.request import Request


@dataclass(frozen=True)
class Step:
    """A launched batch and what is needed to commit it."""

    batch: Batch
    requests: list[Request]
    owner: np.ndarray  # int64 (S,): the admissions that held the slots when the step was launched


class Scheduler:
    """Owns the queue, the slots and the blocks. Used by one thread."""

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, pool: BlockPool) -> None:
        self.budget, self.pool = max_num_batched_tokens, pool
        self.slots = Slots(max_num_seqs, max_model_len, pool.blocks_for(max_model_len))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.free_slots = list(range(max_num_seqs))[::-1]
        self.by_slot: dict[int, Request] = {}
        self._order = np.zeros(0, np.int32)  # slots of `running`
        self._admissions = itertools.count()

    def submit(self, request: Request) -> None:
        request.tokens = np.array(request.prompt, np.int32)
        self.waiting.append(request)

    def schedule(self) -> Step | None:
        """The next step, or None when nothing can run before a launched one is committed."""
        # answers: one token each
        todo = self._todo()
        decodes = self._with_blocks(self._order[todo == 1])
        counts = [1] * len(decodes)
        slots, budget = decodes.tolist(), self.budget - len(decodes)

        # prompts: those begun, then those waiting
        begun = self._order[self._todo() > 1].tolist()
        while budget > 0 and (begun or self._can_admit()):
            slot = begun.pop(0) if begun else self._admit()
            count = min(budget, int(self.slots.length[slot] - self.slots.computed[slot]))
            slots.append(slot)
            counts.append(count)
            budget -= count
        if not slots:
            return None
        rows = np.array(slots, np.int32)
        owner = self.slots.owner[rows]
        batch = self.slots.batch(rows, np.array(counts, np.int32))
        return Step(batch, [self.by_slot[slot] for slot in slots], owner)

    def commit(self, step: Step, tokens: np.ndarray) -> list[tuple[Request, int]]:
        """Takes in a step's tokens int32 (S,); returns the new token of each request that got one.

        What a request that has ended or was preempted in the meantime is given is dropped.
        """
        s, slots = self.slots, step.batch.slots
        alive = s.owner[slots] == step.owner
        self._cache_full_blocks(step, alive)
        rows = np.flatnonzero(alive & step.batch.sampled)
        slots, tokens = slots[rows], tokens[rows]
        s.tokens[slots, s.length[slots]] = tokens
        s.length[slots] += 1
        s.pending[slots] -= 1
        stopped = (s.stops[slots] == tokens[:, None]).any(axis=1)
        full = s.length[slots] >= s.limit[slots]
        requests = [step.requests[row] for row in rows.tolist()]
        news = list(zip(requests, tokens.tolist(), strict=True))
        now = time.monotonic()
        for request, token in news:
            request.output.append(token)
            request.first_token = request.first_token or now
        for at in np.flatnonzero(stopped | full).tolist():
            self.finish(requests[at], "stop" if stopped[at] else "length")
        return news

    def finish(self, request: Request, reason: str, error: Exception | None = None) -> None:
        """Ends a request, waiting or running, and frees what it holds. A second call changes nothing."""
        if request.finish_reason is None:
            request.finish_reason, request.error, request.finished = reason, error, time.monotonic()
            if request.slot >= 0:
                self._leave(request)
            else:
                self.waiting.remove(request)

    def _todo(self) -> np.ndarray:
        """Tokens to be fed, (running,); 0 where the last token that may be sampled is already on its way."""
        s, order = self.slots, self._order
        known = s.length[order] + s.pending[order]
        return np.where(known < s.limit[order], known - s.computed[order], 0)

    def _with_blocks(self, decodes: np.ndarray) -> np.ndarray:
        """The slots among `decodes` that have a block for their next token, after preempting what must yield."""
        s = self.slots
        short = decodes[s.computed[decodes] >= s.block_count[decodes] * self.pool.size]
        for slot in short.tolist():
            while slot in self.by_slot and not self.pool.free:
                self._preempt(self.running[-1])
            if slot in self.by_slot:
                self._add_blocks(slot, self.pool.allocate(1))
        return decodes[s.owner[decodes] >= 0]

    def _can_admit(self) -> bool:
        """Whether blocks for all tokens of the first waiting request are free, and one to spare if others run."""
        if not self.waiting or not self.free_slots:
            return False
        tokens = self.waiting[0].tokens
        hit, _ = self.pool.match(tokens[:-1])
        needed = self.pool.blocks_for(len(tokens)) - len(hit) + self.pool.unused_among(hit)
        return needed + bool(self.running) <= self.pool.free

    def _admit(self) -> int:
        """Moves the first waiting request into a slot, with blocks for all its tokens."""
        s, request = self.slots, self.waiting.popleft()
        slot = request.slot = self.free_slots.pop()
        tokens = request.tokens
        hit, request.chain = self.pool.match(tokens[:-1])  # a hit never covers the last token: it must be fed
        self.pool.take(hit)
        s.tokens[slot, : len(tokens)] = tokens
        s.length[slot], s.limit[slot] = len(tokens), request.limit
        s.computed[slot] = len(hit) * self.pool.size
        s.hashed[slot], s.pending[slot], s.block_count[slot] = len(hit), 0, 0
        self._add_blocks(slot, hit + self.pool.allocate(self.pool.blocks_for(len(tokens)) - len(hit)))
        s.owner[slot] = next(self._admissions)
        self._write_params(slot, request)
        if not request.started:
            request.started, request.cached_tokens = time.monotonic(), int(s.computed[slot])
        self.by_slot[slot] = request
        self.running.append(request)
        self._order = np.append(self._order, np.int32(slot))
        return slot

    def _write_params(self, slot: int, request: Request) -> None:
        s, p = self.slots, request.params
        for name in ("temperature", "top_k", "top_p", "min_p"):
            getattr(s.sampling, name)[slot] = getattr(p, name)
        s.seed[slot] = request.seed & 0xFFFFFFFF, request.seed >> 32
        s.stops[slot] = -1
        s.stops[slot, : len(request.stops)] = request.stops

    def _add_blocks(self, slot: int, blocks: list[int]) -> None:
        s = self.slots
        count = s.block_count[slot]
        s.blocks[slot, count : count + len(blocks)] = blocks
        s.block_count[slot] += len(blocks)

    def _preempt(self, request: Request) -> None:
        """Takes a request's slot and blocks; a token of it that is on its way is dropped and drawn again."""
        request.tokens = self.slots.tokens[request.slot, : self.slots.length[request.slot]].copy()
        self._leave(request)
        self.waiting.appendleft(request)

    def _leave(self, request: Request) -> None:
        s, slot = self.slots, request.slot
        self.pool.release(s.blocks[slot, : s.block_count[slot]].tolist())
        s.owner[slot] = -1
        request.slot, request.chain = -1, ROOT
        self.free_slots.append(slot)
        del self.by_slot[slot]
        self.running.remove(request)
        self._order = self._order[self._order != slot]

    def _cache_full_blocks(self, step: Step, alive: np.ndarray) -> None:
        """Registers the blocks that this step filled; only now are their contents certain."""
        s, size = self.slots, self.pool.size
        full = step.batch.lengths // size
        for row in np.flatnonzero(alive & (full > s.hashed[step.batch.slots])).tolist():
            request, slot = step.requests[row], int(step.batch.slots[row])
            for n in range(s.hashed[slot], full[row]):
                tokens = s.tokens[slot, n * size : (n + 1) * size]
                request.chain = self.pool.register(int(s.blocks[slot, n]), request.chain, tokens)
            s.hashed[slot] = full[row]
