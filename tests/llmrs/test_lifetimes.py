"""Lifetimes of streams and engines: ends of a request, errors of its readers, release of an engine's memory."""

import copy
import gc
import pickle
import signal
import subprocess
import sys
import threading
import weakref

import pytest
from gate import GREEDY, GUARD, LONG, Gate, Stop, engine_threads, join, read_in_threads, settled

from llmrs import BackendError, Engine, EngineClosedError, RequestError, SamplingParams


def interrupt_main(step):
    if step == 5:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


needs_signals = pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="the system sends no signals to threads")


# ---- ends of a request ---------------------------------------------------------------------------------------------


@needs_signals
def test_ctrl_c_cancels_though_its_traceback_is_held(engine):
    """Interactive Python keeps the last exception in sys.last_exc, and with it all frames."""
    with Gate(engine, interrupt_main) as gate:
        gate.open()
        with pytest.raises(KeyboardInterrupt) as held:
            engine.generate_sync(LONG, ["a", "b", "c"])
    assert held.value.__traceback__ is not None
    stats = settled(engine)
    assert (stats["running"], stats["waiting"], stats["finished_cancelled"]) == (0, 0, 3)


@needs_signals
def test_ctrl_c_while_a_stream_waits_cancels_it(engine):
    with Gate(engine, interrupt_main) as gate:
        stream = engine.generate_stream(LONG, "a")
        gate.open()
        with pytest.raises(KeyboardInterrupt):
            stream.result()
    assert settled(engine)["running"] == 0
    assert stream.output().finish_reason == "cancelled"


@pytest.mark.parametrize("error", [KeyboardInterrupt, EngineClosedError("closed meanwhile")])
@pytest.mark.parametrize("call", ["generate_sync", "generate_streams", "generate_stream"])
def test_what_was_started_is_cancelled_where_not_all_can_be(engine, monkeypatch, call, error):
    submit, submitted = engine._worker.submit, []

    def failing(request, followers):
        if call == "generate_sync" and len(submitted) == 2:  # the third prompt
            raise error
        submitted.append(request)
        submit(request, followers)
        if call != "generate_sync":
            raise error  # Ctrl-C comes just after

    monkeypatch.setattr(engine._worker, "submit", failing)
    params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True, n=3 if call == "generate_streams" else 1)
    with Gate(engine), pytest.raises((KeyboardInterrupt, EngineClosedError)) as held:
        getattr(engine, call)(params, ["Hello"] * 3 if call == "generate_sync" else "Hello")
    stats = settled(engine)
    assert stats["running"] == stats["waiting"] == 0
    assert stats["finished_cancelled"] == (1 if call == "generate_stream" else 3)
    del held


@pytest.mark.parametrize("end", ["break", "raise", "close"])
def test_a_with_block_ends_the_request_however_it_is_left(engine, end):
    with Gate(engine) as gate:
        stream = engine.generate_stream(LONG, "Hello")
        gate.open()
        try:
            with stream as same:
                assert same is stream
                for _ in stream:
                    if end == "break":
                        break
                    if end == "raise":
                        raise Stop
                    stream.close()
        except Stop:
            assert end == "raise"
    assert settled(engine)["running"] == 0
    output = stream.result()  # the rest can still be read
    assert output.finish_reason == "cancelled"
    assert output.decoded_length < 400
    stream.close()


def test_a_finished_stream_stays_as_it_is(engine):
    with engine.generate_stream(GREEDY, "Hello") as stream:
        output = stream.result()
    assert output.finish_reason == "length"
    assert stream.result() == output
    assert list(stream) == []
    with pytest.raises(StopIteration):
        next(stream)
    stream.close()
    assert stream.output() == output


def test_what_progress_raises_cancels_and_comes_out(engine):
    def progress(done, total):
        raise Stop

    stream = engine.generate_stream(LONG, list(range(3, 100)), progress=progress)
    with pytest.raises(Stop) as held:
        next(stream)
    assert settled(engine)["finished_cancelled"] == 1
    assert held.value.__traceback__ is not None


def test_one_failure_of_several_cancels_the_others(engine):
    core = engine._worker.core
    core.scheduler.token_budget = 1  # one request a step
    launch = core.backend.launch

    def failing(batch):
        core.backend.launch = launch
        raise RuntimeError("the device caught fire")

    core.backend.launch = failing
    with pytest.raises(BackendError, match="caught fire"):
        engine.generate_sync(LONG, ["a", "b", "c"])
    stats = settled(engine)
    assert (stats["finished_error"], stats["finished_cancelled"], stats["running"]) == (1, 2, 0)


# ---- readers -------------------------------------------------------------------------------------------------------


def test_every_reader_of_a_stream_gets_the_end(engine):
    expected = engine.generate_sync(GREEDY, ["Hello"])[0].text
    with Gate(engine):
        stream = engine.generate_stream(GREEDY, "Hello")
        threads, found = read_in_threads(4, lambda: list(stream))
    join(threads)
    assert sum(len(pieces) for pieces in found) > 0
    assert sorted("".join("".join(pieces) for pieces in found)) == sorted(expected)


def test_close_ends_every_reader_with_an_error_of_its_own(engine):
    with Gate(engine) as gate:
        streams = [engine.generate_stream(LONG, "Hello"), *engine.generate_streams(LONG, "a")]
        threads, found = read_in_threads(2, streams[0].result)
        more, others = read_in_threads(1, streams[1].result)
        assert gate.reached.wait(GUARD)
        engine._worker.stop()
    join([*threads, *more])
    errors = [*found, *others]
    assert [type(e) for e in errors] == [EngineClosedError] * 3
    assert len({id(e) for e in errors}) == 3


def test_errors_are_not_shared_and_gather_no_frames(engine):
    def fail(step):
        if step == 5:
            raise RuntimeError("the device caught fire")

    with Gate(engine, fail):
        streams = [engine.generate_stream(LONG, "Hello") for _ in range(2)]  # run together from step 2 on
    seen = []
    for stream in (*streams, streams[0]):
        with pytest.raises(BackendError, match="caught fire") as caught:
            stream.result()
        seen.append(caught.value)
    assert len({id(e) for e in seen}) == 3
    assert {type(e.__cause__) for e in seen} == {RuntimeError}
    lengths = [len(pytest.ExceptionInfo.from_exception(e).traceback) for e in seen]
    assert lengths[0] == lengths[2]


def test_close_from_a_progress_callback(engine):
    stream = engine.generate_stream(LONG, "Hello", progress=lambda done, total: engine.close())
    with pytest.raises(EngineClosedError):
        stream.result()


@needs_signals
def test_close_from_a_signal_handler(config):
    """The handler runs in the thread that waits for an answer."""
    engine = Engine(config)
    before = signal.signal(signal.SIGUSR1, lambda *_: engine.close())
    try:
        with Gate(engine, lambda n: n == 3 and signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)) as g:
            g.open()
            with pytest.raises(EngineClosedError):
                engine.generate_sync(LONG, ["a", "b"])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not engine_threads()


def test_a_command_is_refused_where_the_thread_may_have_ended_without_it(engine):
    """A signal handler may close the engine between the check and the command."""
    put = engine._worker._commands.put

    class Closing:
        def __getattr__(self, name):
            return getattr(commands, name)

        def put(self, command):
            engine._worker._commands = commands
            engine.close()
            put(command)

    commands, engine._worker._commands = engine._worker._commands, Closing()
    with pytest.raises(EngineClosedError):
        engine.generate_stream(LONG, "Hello")


def test_both_who_close_wait_for_the_end(engine):
    with Gate(engine) as gate:
        engine.generate_streams(LONG, "Hello")
        assert gate.reached.wait(GUARD)
        threads, found = read_in_threads(2, lambda: (engine.close(), engine._worker._thread.is_alive())[1])
    join(threads)
    assert found == [False, False]


# ---- lifetime of an engine ----------------------------------------------------------------------------------------


@pytest.fixture
def no_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_stream_keeps_its_engine_until_it_is_read(config, no_gc):
    with Engine(config) as engine:
        expected = engine.generate_sync(GREEDY, ["Hello"])[0].text
    before, stream = len(engine_threads()), Engine(config).generate_stream(GREEDY, "Hello")
    assert len(engine_threads()) == before + 1
    assert "".join(stream) == expected
    assert len(engine_threads()) == before
    assert stream.output().finish_reason == "length"


@pytest.mark.parametrize("end", ["drop", "close", "break"])
def test_the_last_stream_that_goes_closes_the_engine(config, no_gc, end):
    before, engine = len(engine_threads()), Engine(config)
    streams = engine.generate_streams(SamplingParams(max_tokens=400, n=2), "Hello")
    alive = weakref.ref(engine)
    del engine
    assert alive() is not None
    if end == "break":
        for _ in streams.pop():
            break
    elif end == "close":
        streams[0].close()
        streams[1].close()
    assert alive() is None or end != "close"
    streams.clear()
    assert alive() is None
    assert len(engine_threads()) == before


@pytest.mark.parametrize("use", ["nothing", "answers", "an error", "a failed step"])
def test_the_last_reference_closes_the_engine(config, no_gc, use):
    """By reference counting alone: a cycle would hold device memory until a collection."""
    before, engine = len(engine_threads()), Engine(config)
    if use == "answers":
        engine.generate_sync(GREEDY, ["Hello", "a"])
        kept = engine.generate_stream(GREEDY, "Hello")
        kept.result()
    elif use == "an error":
        with pytest.raises(RequestError):
            engine.generate_sync(GREEDY, [[]])
    elif use == "a failed step":
        engine._worker.core.backend.launch = lambda batch: 1 / 0
        with pytest.raises(BackendError):
            engine.generate_sync(GREEDY, ["Hello"])
    alive = weakref.ref(engine)
    del engine
    assert alive() is None
    assert len(engine_threads()) == before


def test_streams_cannot_be_pickled_or_copied(engine):
    stream = engine.generate_stream(GREEDY, "Hello")
    for take in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(RequestError, match="pickled"):
            take(stream)
    output = stream.result()
    assert pickle.loads(pickle.dumps(output)) == output


EXIT = """
import sys, threading
from llmrs import Engine, EngineClosedError, EngineConfig, SamplingParams
engine = Engine(EngineConfig("demo", device="cpu"))
stream = engine.generate_stream(SamplingParams(max_tokens=4000, ignore_eos=True), "Hello")
next(stream)
def read():
    try:
        list(stream)
    except EngineClosedError:
        print("told", flush=True)
reader = threading.Thread(target=read, daemon=True)
reader.start()
sys.exit(3)
"""


def test_the_interpreter_ends_while_requests_run():
    ended = subprocess.run([sys.executable, "-P", "-c", EXIT], capture_output=True, text=True, timeout=GUARD)
    assert (ended.returncode, ended.stderr) == (3, "")
    assert ended.stdout in ("told\n", "")  # the reader may not run again
