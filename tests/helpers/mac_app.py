"""Helpers of the tests of the chat app for Macs."""

import asyncio
import threading

from measure import ROOT

from llmrs import Engine, SamplingParams

APP = ROOT / "examples" / "mac_app"
SUM = "What is 7 + 5?"
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=4000, ignore_eos=True)


def engine_threads():
    return [t for t in threading.enumerate() if t.name == "llmrs"]


def ignore(*_):
    """A callback without effect."""


async def until(condition, *tasks):
    """Yields to other tasks until the condition holds; fails if one of `tasks` ends before."""
    while not condition() and not any(t.done() for t in tasks):
        await asyncio.sleep(0.001)
    assert condition()


class Gate:
    """Blocks a controller's Engine after its first weights, until `open` or the end of the block."""

    def __init__(self, monkeypatch, module):
        self.reached, self.opened, self.steps = threading.Event(), threading.Event(), 0
        monkeypatch.setattr(module, "Engine", self.engine)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.open()

    def engine(self, config, *, progress, on_memory_plan):
        def stop(done, total):
            self.steps += 1
            progress(done, total)
            self.reached.set()
            self.opened.wait()
            return progress(done, total)

        return Engine(config, progress=stop, on_memory_plan=on_memory_plan)

    def open(self):
        self.opened.set()
