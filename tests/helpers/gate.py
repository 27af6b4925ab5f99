"""Blocks an engine between two steps."""

import threading

from llmrs import LlmrsError, SamplingParams

GUARD = 120  # seconds until a hanging test fails
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)


class Stop(Exception):
    """Raised by a test's callback."""


class Gate:
    """Every step waits until `open()`; `reached` is set when the first one waits.

    `at_step` is called on the device thread with each step's number before it waits.
    """

    def __init__(self, engine, at_step=lambda number: None):
        self.reached, self.opened, self.steps, self.at_step = threading.Event(), threading.Event(), 0, at_step
        self.backend = engine._worker.core.backend
        self.launch, self.backend.launch = self.backend.launch, self._launch

    def _launch(self, batch):
        self.steps += 1
        self.at_step(self.steps)
        self.reached.set()
        assert self.opened.wait(GUARD)
        return self.launch(batch)

    def open(self):
        self.opened.set()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.open()


def settled(engine):
    """The statistics after all commands queued so far."""
    engine._worker.run_on_device_thread(lambda backend: None)
    return engine.stats()


def engine_threads():
    return [t for t in threading.enumerate() if t.name == "llmrs"]


def read_in_threads(count, read):
    """Runs `read()` in `count` threads; the threads, and their results or errors."""
    found = []

    def run():
        try:
            found.append(read())
        except LlmrsError as error:
            found.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for t in threads:
        t.start()
    return threads, found


def join(threads):
    for t in threads:
        t.join(GUARD)
    assert not any(t.is_alive() for t in threads), "a thread still waits"
