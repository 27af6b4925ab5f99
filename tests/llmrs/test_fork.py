"""Engines and streams in a fork: those of the parent raise, and nothing hangs."""

import json
import os
import subprocess
import sys

import pytest
from gate import GUARD

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")

FORK = """
import asyncio, json, os, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads
from llmrs import Engine, EngineConfig, LlmrsError, SamplingParams
from llmrs.bench.roofline import Device

params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
endless = SamplingParams(temperature=0.0, max_tokens=4000, ignore_eos=True)

def told(use):
    try:
        return use()
    except LlmrsError as error:
        return [type(error).__name__, error.message, error.hint]

def own(backend):
    with Engine(EngineConfig("demo", backend=backend, device="cpu"), "f32") as engine:
        return engine.generate_sync(params, ["Hello"])[0].token_ids

async def read():
    return await astream.result()

async def start():
    return parent.stream_async(endless, "Hello")

backend, others = sys.argv[1], sys.argv[2:]
parent = Engine(EngineConfig("demo", backend=backend, device="cpu"), "f32")
finished, stream, waited = (parent.generate_stream(p, "Hello") for p in (params, endless, endless))
expected = parent.generate_sync(params, ["Hello"])[0].token_ids
assert finished.finished  # it began before, with as many tokens
loop = asyncio.new_event_loop()
astream = loop.run_until_complete(start())
reader = threading.Thread(target=lambda: list(waited), daemon=True)  # holds a lock of the stream while it waits
reader.start()
next(stream)
ours, theirs = os.pipe()
if (child := os.fork()) == 0:
    uses = {
        "generate": lambda: parent.generate_sync(params, ["x"]),
        "ask": lambda: Device.of(parent),
        "next": lambda: next(stream), "list": lambda: list(stream), "result": stream.result,
        "finished": lambda: list(finished), "waited": lambda: list(waited),
        "async": lambda: loop.run_until_complete(read()),
        "cancel": stream.cancel, "close stream": stream.close,
        "close": parent.close, "aclose": lambda: asyncio.run(parent.aclose()),
        **{name: lambda name=name: own(name) for name in others},
    }
    os.write(theirs, json.dumps({name: told(use) for name, use in uses.items()}).encode())
    stream = finished = waited = parent = None
    os._exit(0)
os.close(theirs)
with os.fdopen(ours) as file:
    found = json.loads(file.read())
assert os.waitpid(child, 0)[1] == 0
still = parent.generate_sync(params, ["Hello"])[0].token_ids == expected and bool(next(stream))
parent.close()
reader.join()
print(json.dumps({**found, "expected": expected, "still": still}))
"""


def fork(*arguments):
    done = subprocess.run([sys.executable, "-P", "-c", FORK, *arguments], capture_output=True, text=True, timeout=GUARD)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" or "EngineClosedError" in done.stderr  # of the reader
    return json.loads(done.stdout)


def check_whose_they_are(found):
    for name in ("generate", "ask", "next", "list", "result", "finished", "waited", "async"):
        kind, message, hint = found[name]
        assert kind == "EngineClosedError"
        assert "another process" in message
        assert hint
    assert [found[name] for name in ("cancel", "close stream", "close", "aclose")] == [None] * 4
    assert found["still"]


def test_a_fork_has_engines_of_its_own_but_not_its_parents():
    found = fork("torch", "torch", "reference")
    check_whose_they_are(found)
    assert found["torch"] == found["reference"] == found["expected"]


def test_mlx_does_not_survive_a_fork_and_says_so():
    """It would wait, holding the GIL, for threads of the parent."""
    pytest.importorskip("mlx.core")
    found = fork("mlx", "mlx", "torch")
    check_whose_they_are(found)
    kind, message, hint = found["mlx"]
    assert kind == "BackendError"
    assert "fork" in message
    assert "spawn" in hint
    assert found["torch"] == found["expected"]


def test_mlx_runs_in_a_fork_of_a_process_that_has_not_used_it():
    pytest.importorskip("mlx.core")
    found = fork("torch", "mlx")
    assert found["mlx"] == found["expected"]
