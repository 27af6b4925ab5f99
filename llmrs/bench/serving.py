"""Runs workloads: time, rate, percent of the ceiling, latencies and idle share; also with arrivals over time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from llmrs.backends.base import Profiler
from llmrs.bench.roofline import Device, Rated, Work
from llmrs.bench.sweep import busy, settle
from llmrs.bench.workloads import Asked, Outcome, Workload, arrivals, run
from llmrs.core.errors import ConfigError
from llmrs.engine import Engine

PIECE = 100  # steps
Latencies = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Measured(Rated):
    """A workload that was run. `tokens` are new ones, of `prefill` those of the prompts."""

    name: str
    requests: int
    tokens: int
    seconds: float
    floor: float  # the least seconds that the ceilings of the device allow
    latencies: Latencies
    idle: float | None = None  # share of the time in which the device does nothing; None: can't be measured
    rate_of_requests: float | None = None  # per second, where they came over time


def check(engine: Engine, workloads: Sequence[Workload]) -> None:
    """Raises ConfigError for a workload whose requests do not fit into the context."""
    for w in workloads:
        if w.longest > engine.fit.length:
            raise ConfigError(
                f"workload {w.name} needs {w.longest} tokens, more than the context of {engine.fit.length}",
                "lower --scale, or raise --max-model-len",
            )


def measure(engine: Engine, device: Device, workloads: Sequence[Workload]) -> Iterator[Measured]:
    """Each workload after one run of it to warm up, and once more for the idle share where that can be measured."""
    check(engine, workloads)
    for w in workloads:
        asked = w.requests_of(engine.model.config.vocab_size)
        run(engine, asked)
        engine._worker.ask(settle)
        outcome = run(engine, asked)
        yield summary(engine, device, w, asked, outcome, idle(engine, asked, outcome.seconds))


def summary(
    engine: Engine, device: Device, w: Workload, asked: Sequence[Asked], outcome: Outcome, idle: float | None
) -> Measured:
    work = Work.of(engine.model.graph, engine.fit.kv_dtype)
    floor = work.answers(device, engine.fit.dtype, [(len(a.prompt), a.new) for a in asked])
    tokens = sum(len(a.prompt) for a in asked) if w.counts_prompts else outcome.tokens
    return Measured(w.name, len(asked), tokens, outcome.seconds, floor, outcome.latencies(), idle)


class Meter:
    """Adds up the time in which the device does something, while an engine steps.

    A profiler holds only so much, and silently drops the rest: it is emptied every PIECE steps.
    """

    def __init__(self, profiler: Profiler) -> None:
        self.profiler, self.steps, self.busy = profiler, 0, 0.0

    def start(self) -> None:
        self.profiler.start()

    def stop(self) -> None:
        self.busy += busy(self.profiler.stop())

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """For the core, which calls it around each part of a step."""
        if name == "schedule":
            self.steps += 1
            if self.steps % PIECE == 0:
                self.stop()
                self.start()
        yield


def idle(engine: Engine, asked: Sequence[Asked], seconds: float) -> float | None:
    """The device's idle share of a run that took `seconds`, from a run of the same requests under a profiler.

    A profiler slows the host down: what is taken from that run is only what kernels took. Kernels that overlap count
    once.
    """
    profiler = engine._worker.ask(lambda backend: backend.profiler())
    if profiler is None or not profiler.asynchronous:
        return None
    core, meter = engine._worker.core, Meter(profiler)
    before, core.span = core.span, meter.span
    engine._worker.ask(lambda backend: meter.start())
    try:
        run(engine, asked)
    finally:
        core.span = before
        engine._worker.ask(lambda backend: meter.stop())
    return max(1 - meter.busy / seconds, 0.0)


def over_time(
    engine: Engine, device: Device, w: Workload, shares: Sequence[float], closed: Measured | None = None
) -> Iterator[Measured]:
    """The workload's requests in a Poisson process, at shares of the rate at which they are answered all at once.

    Each after one run of the same arrivals to warm up. `closed` is the run of all at once, where there was one.
    """
    closed = closed or next(measure(engine, device, [w]))
    asked = w.requests_of(engine.model.config.vocab_size)
    for share in shares:
        rate = share * closed.requests / closed.seconds
        due = arrivals(len(asked), rate)
        run(engine, asked, due)
        engine._worker.ask(settle)
        outcome = run(engine, asked, due)
        yield Measured(
            f"{w.name} at {share:g}", len(asked), outcome.tokens, outcome.seconds, max(closed.floor, due[-1]),
            outcome.latencies(), None, rate,
        )  # fmt: skip
