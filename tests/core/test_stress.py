"""The core under stress: random arrivals, cancels, failures and preemptions over a pool that is far too small.

After every step the bookkeeping must add up, and every answer is compared with the one that the fake model gives
alone. `make stress` runs it a hundred times as long.
"""

import os
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest
from fake import FakeBackend, first_permitted, next_token
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from llmrs.core.blocks import BlockPool
from llmrs.core.engine import EngineCore
from llmrs.core.errors import BackendError
from llmrs.core.options import BUILT_IN, SamplingParams
from llmrs.core.request import Request
from llmrs.worker import submit_group

TIMES = int(os.environ.get("LLMRS_STRESS", "1"))
VOCABULARY, BLOCKS, SLOTS, LENGTH = 10, 12, 4, 24
EOS = (7, 8)


class Asked(Request):
    """A request with the answer that it must get."""

    even_only = False  # a mask of even tokens after odd ones
    ends_at_text: int | None = None  # a token that completes a stop string: the façade cancels from on_update

    def __repr__(self):
        return f"<request {self.id}>"

    def expected(self) -> list[int]:
        tokens, count = list(self.prompt), min(self.params.max_tokens, LENGTH - len(self.prompt))
        for n in range(count):
            banned = EOS if n < self.params.min_tokens else ()
            allowed = self.allowed(tokens[len(self.prompt) :])
            drawn = next_token(tokens, VOCABULARY)
            tokens.append(first_permitted(drawn, VOCABULARY, lambda t, b=banned, a=allowed: t not in b and t in a))
            if tokens[-1] in EOS or tokens[-1] == self.ends_at_text:
                break
        return tokens[len(self.prompt) :]

    def allowed(self, output):
        return set(range(0, VOCABULARY, 2)) if self.even_only and sum(output) % 2 == 0 else set(range(VOCABULARY))

    def bits(self, output):
        """The mask, which depends on all tokens so far, the last one too."""
        return np.array([sum(1 << t for t in self.allowed(output))], np.uint32)


class Machine(RuleBasedStateMachine):
    max_in_flight = 1
    counted: ClassVar = Counter()  # of all examples

    def __init__(self):
        super().__init__()
        self.backend = FakeBackend(BLOCKS, 2, SLOTS, VOCABULARY, self.max_in_flight)
        self.core = EngineCore(
            self.backend,
            BlockPool(BLOCKS, 2),
            vocab_size=VOCABULARY,
            max_model_len=LENGTH,
            max_num_seqs=SLOTS,
            max_num_batched_tokens=9,
        )
        self.requests: list[Asked] = []

    def ask(self, prompt, count, minimum, priority, masked=False, text=None):
        params = SamplingParams(max_tokens=count, min_tokens=minimum, priority=priority).over(BUILT_IN)
        request = Asked(prompt, params, 0, EOS)
        request.even_only, request.ends_at_text = masked, text
        request.mask = request.bits if masked else None
        request.on_update = self.update
        request.seen = []
        self.requests.append(request)
        return request

    def update(self, request, tokens):
        """As the façade's sink: collects what it is told, and stops at a text."""
        request.seen += tokens
        if tokens and tokens[-1] == request.ends_at_text:
            request.finish_reason = "stop" if request.finish_reason == "length" else request.finish_reason
            self.core.cancel(request, "stop")

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        count=st.integers(1, 12),
        minimum=st.sampled_from([0, 0, 4]),
        priority=st.sampled_from([0, 0, 0, -1, 3]),
        masked=st.sampled_from([False, False, True]),
        text=st.sampled_from([None, None, 3]),
    )
    def submit(self, **options):
        self.core.submit(self.ask(**options))

    @rule(prompt=st.lists(st.integers(0, 1), min_size=4, max_size=9), count=st.integers(1, 6), n=st.integers(2, 4))
    def submit_several_answers(self, prompt, count, n):
        first, *followers = (self.ask(prompt, count, 0, 0) for _ in range(n))
        submit_group(self.core, first, followers)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data):
        self.core.cancel(data.draw(st.sampled_from(self.requests)))

    @precondition(lambda self: not self.core.idle)
    @rule()
    def fail(self):
        """The device fails in the next step."""
        self.backend.fail_at = len(self.backend.steps) + 1

    @rule(count=st.integers(1, 12))
    def step(self, count):
        for _ in range(count):
            self.core.step()
            self.counted["steps"] += 1
            self.books_add_up()

    @invariant()
    def books_add_up(self):
        scheduler = self.core.scheduler
        s, pool = scheduler.slots, scheduler.pool
        held = np.zeros(pool.count, int)
        for request in scheduler.running:
            slot = request.slot
            assert scheduler.by_slot[slot] is request
            table = s.block_tables[slot, : s.num_blocks[slot]]
            assert len(table) >= pool.blocks_for(int(s.num_computed_tokens[slot]))
            assert len(set(table.tolist())) == len(table)  # no block twice in one sequence
            assert 0 <= s.num_computed_tokens[slot] <= s.num_tokens[slot] + s.num_inflight[slot] <= s.max_tokens[slot]
            assert s.tokens[slot, : s.num_tokens[slot]].tolist() == [*request.prompt, *request.output]
            np.add.at(held, table, 1)
        assert pool.ref_counts == held.tolist()
        assert len(scheduler.free_slots) + len(scheduler.running) == SLOTS
        assert set(pool.free_queue) == set(np.flatnonzero(held == 0).tolist())
        assert {pool.cached_blocks[k][0] for k in pool.block_keys.values()} == set(pool.block_keys)
        assert [r.sort_key for r in scheduler.waiting] == sorted(r.sort_key for r in scheduler.waiting)
        assert all(r.slot < 0 and r.finish_reason is None for r in scheduler.waiting)
        assert (s.generation >= 0).sum() == len(scheduler.running)

    def teardown(self):
        while not self.core.idle:
            self.step(1)
        stats = self.core.scheduler.stats
        self.counted["preemptions"] += stats["preemptions"]
        self.counted["hits"] += stats["prefix_hits"]
        for r in self.requests:
            full = r.expected()
            assert r.output == r.seen, "every token is told, once"
            if r.finish_reason in ("cancelled", "error"):
                assert r.output == full[: len(r.output)]
                assert (r.finish_reason == "error") == isinstance(r.error, BackendError)
            else:
                assert r.output == full
                assert (r.finish_reason == "stop") == (full[-1] in EOS or full[-1] == r.ends_at_text)
        assert self.core.scheduler.pool.num_free == BLOCKS
        assert sum(v for k, v in stats.items() if k.startswith("finished")) == len(self.requests)


class PipelinedMachine(Machine):
    max_in_flight = 2


@pytest.mark.parametrize("machine", [Machine, PipelinedMachine])
def test_random_requests_over_a_small_pool(machine):
    machine.counted = Counter()
    for _ in range(TIMES):  # each of its own, since one remembers all that it has tried
        options = settings(
            max_examples=130,
            stateful_step_count=50,
            deadline=None,
            derandomize=TIMES == 1,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        run_state_machine_as_test(machine, settings=options)
    assert machine.counted["steps"] >= 10_000 * TIMES
    assert machine.counted["preemptions"] > 100 * TIMES  # it met what it is there for
    assert machine.counted["hits"] > 1000 * TIMES
