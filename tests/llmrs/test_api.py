"""The Python API: asyncio, progress and cancellation, statistics, n > 1, logprobs, failures."""

import asyncio
import json
import multiprocessing
import threading

import numpy as np
import pytest

from llmrs import (
    BackendError,
    Engine,
    EngineClosedError,
    EngineConfig,
    LlmrsError,
    LoadCancelledError,
    Message,
    RequestError,
    SamplingParams,
    TokenLogprob,
)
from llmrs.inputs import child_seed

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)


@pytest.fixture
def engine(folder):
    config = EngineConfig(str(folder), dtype="f32", device="cpu", block_size=4, max_num_batched_tokens=32)
    with Engine(config) as engine:
        yield engine


def threads():
    return [t for t in threading.enumerate() if t.name == "llmrs"]


def test_token_ids_in_every_form(engine):
    forms = [[5, 6, 7], (5, 6, 7), np.array([5, 6, 7]), [5, np.int32(6), 7]]
    first, *others = [o.token_ids for o in engine.generate_sync(GREEDY, forms)]
    assert others == [first] * 3
    for wrong in ([5, True], [5, 6.0], np.array([5.0])):
        with pytest.raises(RequestError, match="not in the vocabulary"):
            engine.generate_sync(GREEDY, [wrong])


def test_asyncio_gives_the_same_answers(engine):
    expected = engine.generate_sync(GREEDY, ["Hello", "a b c"])

    async def ask():
        async with asyncio.timeout(60):
            streamed = "".join([piece async for piece in engine.stream_async(GREEDY, "Hello")])
            return streamed, await engine.generate_async(GREEDY, ["Hello", "a b c"])

    streamed, outputs = asyncio.run(ask())
    assert streamed == expected[0].text
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]


def test_a_cancelled_task_cancels_its_request(engine):
    async def ask():
        stream = engine.stream_async(LONG, "Hello")
        task = asyncio.create_task(stream.result())
        await anext(aiter(stream))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return stream.stream

    stream = asyncio.run(ask())
    assert stream.result().finish_reason in ("cancelled", "length")  # and it ends


def test_a_loop_that_is_gone_does_not_hurt_the_engine(engine):
    async def ask():
        return engine.stream_async(LONG, "Hello")

    stream = asyncio.run(ask())
    assert engine.generate_sync(GREEDY, ["Hello"])[0].finish_reason == "length"
    stream.cancel()


def test_errors_reach_the_task(engine):
    async def ask():
        with pytest.raises(RequestError, match="empty"):
            engine.stream_async(GREEDY, [])
        stream = engine.stream_async(LONG, "Hello")
        engine.close()
        await stream.result()

    with pytest.raises(EngineClosedError):
        asyncio.run(ask())


def test_loading_reports_and_can_be_cancelled(folder):
    before = len(threads())
    seen = []
    Engine(EngineConfig(str(folder)), progress=lambda done, total: seen.append((done, total))).close()
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    with pytest.raises(LoadCancelledError):
        Engine(EngineConfig(str(folder)), progress=lambda done, total: False)

    def interrupted(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Engine(EngineConfig(str(folder)), progress=interrupted)
    assert len(threads()) == before


def test_loading_in_an_event_loop(folder):
    before, seen = len(threads()), []

    async def use():
        config = EngineConfig(str(folder), dtype="f32")
        async with await Engine.load_async(config, progress=lambda *both: seen.append(both)) as engine:
            (output,) = await engine.generate_async(GREEDY, ["Hello"])
        with pytest.raises(LoadCancelledError):
            await Engine.load_async(config, progress=lambda done, total: False)
        return output

    assert asyncio.run(use()).decoded_length == 12
    assert seen[-1][0] == seen[-1][1]
    assert len(threads()) == before


def test_a_cancelled_task_loads_no_more(folder):
    before = len(threads())

    async def give_up():
        started = asyncio.Event()
        loading = Engine.load_async(EngineConfig(str(folder)), progress=lambda *both: started.set())
        task = asyncio.create_task(loading)
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())  # and waits for its threads
    assert len(threads()) == before


def test_prefill_reports_and_can_be_cancelled(engine):
    prompt = list(range(3, 3 + 150))
    seen = []
    engine.generate_stream(GREEDY, prompt, progress=lambda done, total: seen.append((done, total))).result()
    assert seen[:5] == [(32, 150), (64, 150), (96, 150), (128, 150), (150, 150)]
    stream = engine.generate_stream(LONG, prompt[1:], progress=lambda done, total: False)
    output = stream.result()
    assert output.finish_reason in ("cancelled", "length")
    assert engine.generate_sync(GREEDY, ["Hello"])[0].finish_reason == "length"


def test_statistics(engine):
    assert engine.stats()["kv_blocks_used"] == 0
    prompt = list(range(3, 24))
    engine.generate_sync(GREEDY, [prompt])
    engine.generate_sync(GREEDY, [prompt])
    stats = engine.stats()
    assert stats["generated_tokens"] == 24
    assert stats["prefix_queries"] == 42
    assert stats["prefix_hits"] == 20
    assert stats["prompt_tokens"] == 22
    assert stats["finished_length"] == 2
    assert stats["running"] == stats["waiting"] == stats["kv_blocks_used"] == 0


def test_several_answers_compute_the_prompt_once(engine):
    prompt = list(range(3, 44))
    params = SamplingParams(temperature=1.0, max_tokens=8, n=4, seed=5, ignore_eos=True)
    outputs = engine.generate_sync(params, [prompt])
    assert [o.index for o in outputs] == [0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in outputs}) == 4
    assert engine.stats()["prompt_tokens"] == 41 + 3  # the prompt, and its last token for each other request
    one = SamplingParams(temperature=1.0, max_tokens=8, seed=5, ignore_eos=True)
    assert engine.generate_sync(one, [prompt])[0].token_ids == outputs[0].token_ids
    seeded = SamplingParams(temperature=1.0, max_tokens=8, seed=child_seed(5, 2), ignore_eos=True)
    assert engine.generate_sync(seeded, [prompt])[0].token_ids == outputs[2].token_ids
    with pytest.raises(RequestError, match="n is 4"):
        engine.generate_stream(params, prompt)


def test_seeds_of_children_differ():
    seeds = {child_seed(seed, n) for seed in (0, 1, 2**32, 2**64 - 1) for n in range(16)}
    assert len(seeds) == 64
    assert all(0 <= s < 2**64 for s in seeds)


def test_log_probabilities(engine):
    params = SamplingParams(temperature=0.0, max_tokens=5, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    (output,) = engine.generate_sync(params, ["Hello there"])
    assert [p.token_id for p in output.logprobs] == output.token_ids
    for p in output.logprobs:
        assert isinstance(p, TokenLogprob)
        assert p.top[0] == (p.token_id, p.logprob)  # greedy
        assert p.top[1][1] <= p.top[0][1] < 0
    assert output.prompt_logprobs[0] is None
    ids = engine.model.tokenizer.encode("Hello there")
    assert [p.token_id for p in output.prompt_logprobs[1:]] == ids[1:]
    (plain,) = engine.generate_sync(GREEDY, ["Hello there"])
    assert plain.logprobs is plain.prompt_logprobs is None


def test_prompt_log_probabilities_are_those_of_the_answer(engine):
    """Sampled tokens fed as a prompt get the same logprobs, over many steps and from the prefix cache."""
    params = SamplingParams(temperature=0.0, max_tokens=140, logprobs=0, ignore_eos=True)
    (answer,) = engine.generate_sync(params, [[5, 6, 7]])
    whole = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    (fed,) = engine.generate_sync(whole, [[5, 6, 7, *answer.token_ids]])
    assert fed.cached_tokens == 0
    ours, theirs = ([p.logprob for p in ps] for ps in (fed.prompt_logprobs[3:], answer.logprobs))
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_allowed_tokens_and_biases(engine):
    only = SamplingParams(temperature=1.0, max_tokens=20, allowed_token_ids=[40, 50], seed=1)
    (output,) = engine.generate_sync(only, ["Hello"])
    assert set(output.token_ids) == {40, 50}
    (output,) = engine.generate_sync(SamplingParams(temperature=0.0, max_tokens=4, logit_bias={44: 100}), ["Hello"])
    assert output.token_ids == [44] * 4
    for bad in ({"allowed_token_ids": []}, {"allowed_token_ids": [10**6]}, {"logit_bias": {10**6: 1.0}}):
        with pytest.raises(RequestError):
            engine.generate_sync(SamplingParams(**bad), ["Hello"])
    with pytest.raises(RequestError, match="min_tokens"):
        engine.generate_sync(SamplingParams(allowed_token_ids=[2], min_tokens=2), ["Hello"])


def test_stops_wait_for_min_tokens(engine):
    bias = {2: 50.0}  # the end of sequence
    params = SamplingParams(temperature=0.0, max_tokens=30, logit_bias=bias)
    assert engine.generate_sync(params, ["Hello"])[0].decoded_length == 1
    params = SamplingParams(temperature=0.0, max_tokens=30, logit_bias=bias, min_tokens=7)
    assert engine.generate_sync(params, ["Hello"])[0].decoded_length == 8
    (plain,) = engine.generate_sync(GREEDY, ["Hello"])
    stop = plain.text[:1]
    params = SamplingParams(temperature=0.0, max_tokens=12, stop=[stop], min_tokens=12)
    assert engine.generate_sync(params, ["Hello"])[0].text == plain.text


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(engine, max_in_flight):
    core, launch = engine._worker.core, engine._worker.core.backend.launch
    core.backend.max_in_flight = max_in_flight

    def failing(batch):
        core.backend.launch = launch
        raise RuntimeError("the device caught fire")

    stream = engine.generate_stream(LONG, "Hello")
    next(stream)
    core.backend.launch = failing
    with pytest.raises(BackendError, match="caught fire") as caught:
        list(stream)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert stream.output().finish_reason == "error"
    assert engine.generate_sync(GREEDY, ["Hello"])[0].finish_reason == "length"


def test_a_bug_of_the_engine_ends_every_stream(engine):
    class Bug(BaseException):
        pass

    def failing(batch):
        raise Bug

    engine._worker.core.backend.launch = failing
    hook, threading.excepthook = threading.excepthook, lambda args: None
    try:
        with pytest.raises(EngineClosedError, match="Bug"):
            list(engine.generate_stream(LONG, "Hello"))
        with pytest.raises(LlmrsError):
            engine.generate_sync(GREEDY, ["Hello"])
    finally:
        engine.close()
        threading.excepthook = hook


def in_child(engine, connection):
    try:
        engine.generate_sync(GREEDY, ["Hello"])
    except EngineClosedError as error:
        connection.send(error.message)
    engine.close()  # touches nothing of the parent's
    connection.close()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_is_refused_clearly(engine):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=in_child, args=(engine, theirs))
    child.start()
    assert ours.poll(60)
    assert "another process" in ours.recv()
    child.join(60)
    assert child.exitcode == 0
    assert engine.generate_sync(GREEDY, ["Hello"])[0].finish_reason == "length"


def test_a_trace_shows_where_steps_spend_their_time(engine, tmp_path):
    trace = engine.start_trace()
    engine.generate_sync(GREEDY, ["Hello"])
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [e["name"] for e in events]
    assert {"schedule", "launch", "wait", "commit"} <= set(names)
    assert names.count("launch") == names.count("wait") == 12
    assert all(e["ph"] == "X" and e["dur"] >= 0 and e["ts"] >= 0 for e in events)


def test_the_second_turn_of_a_chat_computes_only_what_is_new():
    """With the demo model's template, all full blocks of the first turn hit the prefix cache."""
    with Engine(EngineConfig("demo", device="cpu", block_size=4)) as engine:
        talk = [Message("user", "What is llmrs?")]
        first = engine.generate_stream(GREEDY, engine.apply_chat_template(talk)).result()
        before = engine.stats()["prompt_tokens"]
        talk += [Message("assistant", first.text), Message("user", "What is 7 + 5?")]
        prompt = engine.apply_chat_template(talk)
        second = engine.generate_stream(GREEDY, prompt).result()
        old = first.prompt_length + first.decoded_length - 1  # the last token was never fed
        assert second.cached_tokens == old // 4 * 4
        assert engine.stats()["prompt_tokens"] - before == len(prompt.token_ids) - old // 4 * 4
