"""The scheduler and the engine's core on a fake backend: right tokens under every kind of pressure."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from fake import FakeBackend, next_token

from llmrs.core.blocks import BlockPool
from llmrs.core.engine import EngineCore
from llmrs.core.errors import BackendError, ConfigError
from llmrs.core.options import BUILT_IN, SamplingParams
from llmrs.core.request import PRIORITY_SECONDS, Request
from llmrs.worker import submit_group

VOCABULARY = 50


def make_core(blocks=40, block_size=4, max_in_flight=1, max_model_len=64, cache=True, **config):
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 16, **config}
    backend = FakeBackend(blocks, block_size, sizes["max_num_seqs"], VOCABULARY, max_in_flight)
    pool = BlockPool(blocks, block_size, cache)
    return EngineCore(backend, pool, vocab_size=VOCABULARY, max_model_len=max_model_len, **sizes)


def make_request(prompt, max_tokens=10, stops=()):
    return Request(prompt, SamplingParams(max_tokens=max_tokens).over(BUILT_IN), 0, stops)


def expected(prompt, count, stops=()):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, VOCABULARY))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


def run(core, requests):
    for r in requests:
        core.submit(r)
    while not core.idle:
        core.step()


def random_prompts(count, longest, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


@pytest.mark.parametrize("max_in_flight", [1, 2])
@pytest.mark.parametrize("blocks", [16, 22, 200])  # 16 blocks hold one full context: constant preemption
@pytest.mark.parametrize("budget", [4, 7, 64])
@pytest.mark.parametrize("cache", [True, False])
def test_answers_do_not_depend_on_batching(max_in_flight, blocks, budget, cache):
    core = make_core(blocks, max_in_flight=max_in_flight, max_num_batched_tokens=budget, cache=cache)
    prompts = random_prompts(12, 40)
    requests = [make_request(p, max_tokens=20) for p in prompts]
    run(core, requests)
    assert [r.output for r in requests] == [expected(p, min(20, 64 - len(p))) for p in prompts]
    assert {r.finish_reason for r in requests} == {"length"}
    assert core.scheduler.pool.num_free == blocks


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_stops_end_an_answer_and_are_part_of_it(max_in_flight):
    core = make_core(max_in_flight=max_in_flight)
    answer = expected([1, 2, 3], 10)
    request = make_request([1, 2, 3], stops=[answer[4], 49])
    run(core, [request])
    assert request.output == answer[: answer.index(answer[4]) + 1]
    assert request.finish_reason == "stop"


def test_a_long_prompt_stalls_no_decoding():
    core = make_core(200, max_num_batched_tokens=8, max_model_len=200)
    short = make_request([1, 2], max_tokens=60)
    core.submit(short)
    core.step()
    core.submit(make_request(random_prompts(1, 1)[0] * 64, max_tokens=2))
    before = len(short.output)
    for n in range(1, 9):
        core.step()
        assert len(short.output) == before + n
    assert max(len(b.input_ids) for b in core.backend.steps) == 8


def test_steps_hold_decodes_first_and_keep_the_budget():
    core = make_core(max_num_batched_tokens=6)
    run(core, [make_request(p) for p in random_prompts(9, 30)])
    for batch in core.backend.steps:
        counts = np.diff(batch.query_start_loc)
        assert counts.sum() <= 6
        assert all(a <= b or a > 1 for a, b in pairwise(counts.tolist()))  # ones come first


def test_admission_waits_for_memory_and_keeps_the_order():
    core = make_core(blocks=16, max_num_seqs=4)
    requests = [make_request(p, max_tokens=4) for p in ([1] * 30, [2] * 30, [3])]
    for r in requests:
        core.submit(r)
    core.step()
    assert [r.slot >= 0 for r in requests] == [True, False, False]  # the third would fit, but is not next
    run(core, [])
    assert [r.started for r in requests] == sorted(r.started for r in requests)


def test_the_prefix_cache_saves_prefill_and_never_the_last_token():
    core = make_core()
    prompt = list(range(20))
    first, second, longer = make_request(prompt), make_request(prompt), make_request([*prompt, 7, 8])
    for r in (first, second, longer):
        run(core, [r])
    assert (first.cached_tokens, second.cached_tokens, longer.cached_tokens) == (0, 16, 20)
    assert first.output == second.output
    assert longer.output == expected([*prompt, 7, 8], 10)


def test_answers_are_cached_for_the_next_turn():
    core = make_core()
    first = make_request(list(range(10)))
    run(core, [first])
    turn = make_request([*first.prompt, *first.output, 3])
    run(core, [turn])
    assert turn.cached_tokens == 16  # of 10 + 10 + 1 tokens; the last answered token was never fed


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_cancel_frees_everything_at_any_moment(max_in_flight):
    for steps in range(8):
        core = make_core(max_in_flight=max_in_flight)
        requests = [make_request(p, max_tokens=12) for p in ([1] * 30, [2], [3] * 5)]
        for r in requests:
            core.submit(r)
        for _ in range(steps):
            core.step()
        core.cancel(requests[0])
        core.cancel(requests[0])
        run(core, [])
        assert requests[0].finish_reason == "cancelled"
        assert [r.output for r in requests[1:]] == [expected(r.prompt, 12) for r in requests[1:]]
        assert core.scheduler.pool.num_free == 40


def test_a_failing_step_ends_its_requests_with_the_cause_and_the_engine_goes_on():
    core = make_core(max_num_seqs=2, max_num_batched_tokens=4)
    requests = [make_request([n]) for n in range(3)]
    core.backend.fail_at = 3
    run(core, requests)
    assert [r.finish_reason for r in requests] == ["error", "error", "length"]
    assert isinstance(requests[0].error, BackendError)
    assert "caught fire" in str(requests[0].error)
    assert core.scheduler.pool.num_free == 40
    assert requests[2].output == expected([2], 10)


def test_a_budget_below_the_number_of_sequences_is_refused():
    with pytest.raises(ConfigError, match="max_num_batched_tokens 3"):
        make_core(max_num_batched_tokens=3)


def test_priority_goes_before_arrival_and_waiting_makes_up_for_it():
    core = make_core(max_num_seqs=1)
    first, urgent, later = (make_request([n]) for n in range(3))
    urgent.params = replace(urgent.params, priority=-1)
    later.params = replace(later.params, priority=1)
    old = make_request([9])
    old.params, old.arrival = replace(old.params, priority=1), old.arrival - 3 * PRIORITY_SECONDS
    for r in (first, later, old, urgent):
        core.submit(r)
    run(core, [])
    assert [r.prompt for r in sorted((first, urgent, later, old), key=lambda r: r.started)] == [[9], [1], [0], [2]]


def test_the_last_in_rank_yields_when_blocks_run_out():
    core = make_core(blocks=8, max_num_seqs=2, max_model_len=32)
    low, high = make_request([1] * 8, max_tokens=24), make_request([2] * 8, max_tokens=24)
    low.params = replace(low.params, priority=5)
    core.submit(low)
    core.step()
    run(core, [high])
    assert core.scheduler.stats["preemptions"] > 0
    assert high.finished < low.finished  # though it came later
    assert [low.output, high.output] == [expected([1] * 8, 24), expected([2] * 8, 24)]


def test_followers_wait_for_the_prompt_and_find_it_in_the_cache():
    core = make_core(max_num_seqs=4, max_num_batched_tokens=8)
    first = make_request(list(range(20)))
    followers = [Request(first.prompt, first.params, 0) for _ in range(2)]
    submit_group(core, first, followers)
    core.step()
    assert [r.slot >= 0 for r in (first, *followers)] == [True, False, False]
    run(core, [])
    assert [r.cached_tokens for r in (first, *followers)] == [0, 16, 16]
    assert {tuple(r.output) for r in (first, *followers)} == {tuple(first.output)}


def test_followers_of_a_request_that_was_cancelled_go_on():
    core = make_core()
    first = make_request(list(range(20)))
    followers = [Request(first.prompt, first.params, 0) for _ in range(3)]
    submit_group(core, first, followers)
    core.cancel(followers[1])
    core.cancel(first)
    run(core, [])
    assert [r.finish_reason for r in (first, *followers)] == ["cancelled", "length", "cancelled", "length"]
    assert core.scheduler.pool.num_free == 40
