"""Streams and engines under asyncio: cancellation, readers, and an event loop that is never blocked."""

import asyncio
import gc
import pickle
import threading

import pytest
from gate import GREEDY, GUARD, LONG, Gate, Stop, engine_threads, settled

from llmrs import Engine, EngineClosedError, EngineConfig, LoadCancelledError, MemoryLimitError, RequestError
from llmrs.model import read_model


def run(main):
    """asyncio.run with a timeout."""

    async def guarded():
        async with asyncio.timeout(GUARD):
            return await main

    return asyncio.run(guarded())


async def reached(gate):
    assert await asyncio.to_thread(gate.reached.wait, GUARD)


def nothing_runs(engine, cancelled):
    stats = settled(engine)
    assert (stats["running"], stats["waiting"], stats["finished_cancelled"]) == (0, 0, cancelled)


# ---- cancellation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancel", "wait_for", "timeout", "group", "close"])
def test_a_task_that_ends_cancels_all_its_requests_though_its_exception_is_held(engine, how):
    prompts = ["a", "b", "c", "d"]

    async def fail(gate):
        await reached(gate)
        raise Stop

    async def ask(gate):
        if how == "cancel":
            task = asyncio.create_task(engine.generate_async(LONG, prompts))
            await reached(gate)
            task.cancel()
            return await asyncio.gather(task, return_exceptions=True)
        if how == "close":
            coroutine = engine.generate_async(LONG, prompts)
            coroutine.send(None)  # to where it waits
            coroutine.close()
            return coroutine
        try:
            if how == "wait_for":
                await asyncio.wait_for(engine.generate_async(LONG, prompts), 0)
            elif how == "timeout":
                async with asyncio.timeout(0):
                    await engine.generate_async(LONG, prompts)
            else:
                async with asyncio.TaskGroup() as group:
                    group.create_task(engine.generate_async(LONG, prompts))
                    group.create_task(fail(gate))
        except (TimeoutError, ExceptionGroup) as error:
            return error

    with Gate(engine) as gate:
        held = run(ask(gate))
    assert held is not None
    nothing_runs(engine, cancelled=0 if how == "wait_for" else 4)  # a timeout of 0 starts nothing


@pytest.mark.parametrize("end", ["break", "raise", "aclose"])
def test_an_async_with_block_ends_the_request_however_it_is_left(engine, end):
    async def read(gate):
        stream = engine.stream_async(LONG, "Hello")
        gate.open()
        try:
            async with stream as same:
                assert same is stream
                async for _ in stream:
                    if end == "break":
                        break
                    if end == "raise":
                        raise Stop
                    await stream.aclose()
        except Stop:
            assert end == "raise"
        await stream.aclose()
        return (await stream.result()).finish_reason

    with Gate(engine) as gate:
        assert run(read(gate)) == "cancelled"
    nothing_runs(engine, cancelled=1)


def test_a_stream_that_is_never_read_ends_when_it_is_dropped(engine):
    async def start():
        engine.stream_async(LONG, "Hello")

    with Gate(engine):
        run(start())
    nothing_runs(engine, cancelled=1)


def test_a_stream_whose_loop_is_closed_is_cancelled(engine):
    """No other loop may read it."""

    async def start(gate):
        await reached(gate)
        return engine.stream_async(LONG, "b")

    with Gate(engine) as gate:
        first = engine.generate_stream(LONG, "a")
        stream = run(start(gate))
    assert first.result().finish_reason == "length"
    nothing_runs(engine, cancelled=1)
    assert stream.output().finish_reason == "cancelled"


# ---- readers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("complete", [True, False])
def test_a_stream_read_in_another_loop_says_so(engine, complete):
    async def start():
        stream = engine.stream_async(GREEDY if complete else LONG, "Hello")
        await engine.generate_async(GREEDY, ["Hello"])  # later, and so it ends later
        return stream

    stream = run(start())
    assert stream.stream.finished or not complete
    for read in (stream.result, stream.__anext__):
        with pytest.raises(RequestError, match="another event loop"):
            run(read())


def test_a_stream_read_in_the_loop_of_another_thread_says_so(engine):
    async def main():
        stream = engine.stream_async(LONG, "Hello")
        with pytest.raises(RequestError, match="another event loop"):
            await asyncio.to_thread(run, stream.result())
        return await stream.result()

    assert run(main()).finish_reason == "length"


def test_an_async_stream_needs_a_loop(engine):
    with pytest.raises(RequestError, match="running event loop"):
        engine.stream_async(GREEDY, "Hello")
    nothing_runs(engine, cancelled=0)


def test_every_task_that_reads_a_stream_gets_the_end(engine):
    expected = engine.generate_sync(GREEDY, ["Hello"])[0].text

    async def read(stream):
        return [piece async for piece in stream]

    async def main(gate):
        stream = engine.stream_async(GREEDY, "Hello")
        tasks = [asyncio.create_task(read(stream)) for _ in range(3)]
        await asyncio.sleep(0)
        gate.open()
        pieces = [p for found in await asyncio.gather(*tasks) for p in found]
        again = await asyncio.gather(read(stream), stream.result(), stream.result())
        return pieces, again

    with Gate(engine) as gate:
        pieces, again = run(main(gate))
    assert sorted("".join(pieces)) == sorted(expected)
    assert again[0] == []
    assert again[1] == again[2]


def test_closing_tells_every_task_with_an_error_of_its_own(engine):
    async def main(gate):
        streams = [engine.stream_async(LONG, "Hello") for _ in range(2)]
        tasks = [asyncio.create_task(s.result()) for s in (*streams, streams[0])]
        await reached(gate)
        closing = asyncio.create_task(engine.aclose())
        await asyncio.sleep(0)
        gate.open()
        await closing
        return await asyncio.gather(*tasks, return_exceptions=True)

    with Gate(engine) as gate:
        errors = run(main(gate))
    assert [type(e) for e in errors] == [EngineClosedError] * 3
    assert len({id(e) for e in errors}) == 3


def test_async_streams_cannot_be_pickled(engine):
    async def main():
        with pytest.raises(RequestError, match="pickled"):
            pickle.dumps(engine.stream_async(GREEDY, "Hello"))

    run(main())


def test_a_stream_keeps_its_engine(config):
    before = len(engine_threads())
    gc.disable()

    async def main():
        return "".join([text async for text in Engine(config).stream_async(GREEDY, "Hello")])

    try:
        text = run(main())
        assert len(engine_threads()) == before
    finally:
        gc.enable()
    with Engine(config) as engine:
        assert engine.generate_sync(GREEDY, ["Hello"])[0].text == text


# ---- a free loop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("busy", [False, True])
def test_leaving_an_engine_leaves_the_loop_free(config, busy):
    """Only the loop lets the current step end, so it must keep running, also with a full thread pool."""
    before = len(engine_threads())

    async def main():
        loop, blocked = asyncio.get_running_loop(), threading.Event()
        async with await Engine.load_async(config) as engine:
            gate = Gate(engine)
            stream = engine.stream_async(LONG, "Hello")
            await reached(gate)
            if busy:
                waiting = [loop.run_in_executor(None, blocked.wait, GUARD) for _ in range(64)]
            loop.call_later(0.01, gate.open)
        threads = len(engine_threads()) if gate.opened.is_set() else None
        blocked.set()
        if busy:
            await asyncio.gather(*waiting)
        with pytest.raises(EngineClosedError):
            await stream.result()
        await engine.aclose()
        return threads

    assert run(main()) == before


def test_a_task_that_is_cancelled_while_it_closes_an_engine(config):
    async def main():
        engine = await Engine.load_async(config)
        with Gate(engine) as gate:
            stream = engine.stream_async(LONG, "Hello")
            await reached(gate)
            closing = asyncio.create_task(engine.aclose())
            await asyncio.sleep(0)
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
            gate.open()
            with pytest.raises(EngineClosedError):
                await stream.result()
        await engine.aclose()

    before = len(engine_threads())
    run(main())
    assert len(engine_threads()) == before


@pytest.mark.parametrize("name", ["progress", "on_memory_plan", "on_fit"])
@pytest.mark.parametrize("at", ["first", "last"])
@pytest.mark.parametrize("answer", [Stop, False])
def test_what_a_callback_raises_or_refuses_ends_the_loading(config, name, at, answer):
    before, called = len(engine_threads()), []

    def callback(*values):
        called.append(threading.current_thread())
        if at == "last" and name == "progress" and values[0] < values[1]:
            return None
        if answer is Stop:
            raise Stop
        return answer

    async def main():
        with pytest.raises(Stop if answer is Stop else LoadCancelledError):
            await Engine.load_async(config, **{name: callback})

    run(main())
    assert set(called) == {threading.main_thread()}
    assert len(engine_threads()) == before


def test_callbacks_of_a_loading_see_what_those_of_the_constructor_see(config):
    ours, theirs = [], []
    Engine(
        config, progress=lambda *both: ours.append(both), on_memory_plan=lambda plan: ours.append(plan.max_model_len)
    ).close()

    async def main():
        callbacks = {
            "progress": lambda *both: theirs.append(both),
            "on_memory_plan": lambda plan: theirs.append(plan.max_model_len),
        }
        async with await Engine.load_async(config, **callbacks):
            pass

    run(main())
    assert ours == theirs


def test_a_download_tells_its_progress_in_the_loop(config, monkeypatch):
    seen = []

    def read(config, on_download):
        on_download(1, 2)
        return read_model(config)

    monkeypatch.setattr("llmrs.engine.read_model", read)

    async def main():
        engine = await Engine.load_async(config, on_download=lambda *both: seen.append(both))
        await engine.aclose()

    run(main())
    assert seen == [(1, 2)]


def test_errors_of_loading_come_out(folder):
    async def main():
        with pytest.raises(MemoryLimitError):
            await Engine.load_async(EngineConfig(folder, memory_limit=1000))

    run(main())


@pytest.mark.parametrize("when", ["while it loads", "when it is loaded"])
def test_a_cancelled_loading_leaves_no_engine(config, monkeypatch, when):
    """Also if the thread is done when the task is cancelled, and although `made` holds the engine."""
    before, made = len(engine_threads()), []
    started, go, ready = threading.Event(), threading.Event(), threading.Event()

    class Held(Engine):
        def __init__(self, *args, **kwargs):
            if when == "while it loads":
                started.set()
                assert go.wait(GUARD)
            super().__init__(*args, **kwargs)
            made.append(self)
            ready.set()

    async def main():
        task = asyncio.create_task(Held.load_async(config))
        await asyncio.sleep(0)
        if when == "while it loads":
            assert await asyncio.to_thread(started.wait, GUARD)
        else:
            assert ready.wait(GUARD)  # blocks the loop, which can't take the engine yet
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()

    run(main())
    for engine in made:
        engine._worker._thread.join(GUARD)
        with pytest.raises(EngineClosedError):
            engine.generate_sync(GREEDY, ["Hello"])
    assert len(engine_threads()) == before
