"""Runs workloads: time, rate, percent of the ceiling, latencies and idle share; also with arrivals over time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmrs.bench_steps import idle_share
from llmrs.core.errors import ConfigError
from llmrs.engine import Engine
from llmrs.speed import Device, Work
from llmrs.workloads import Asked, Outcome, Workload, arrivals, run

Latencies = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Measured:
    """A workload that was run. `tokens` are new ones, of `prefill` those of the prompts."""

    name: str
    requests: int
    tokens: int
    seconds: float
    floor: float  # the least seconds that the ceilings of the device allow
    latencies: Latencies
    idle: float | None = None  # share of the time in which the device does nothing; None: can't be measured
    rate_of_requests: float | None = None  # per second, where they came over time

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def share(self) -> float:
        """Of the ceiling that was reached."""
        return self.floor / self.seconds


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
        asked = w.requests_of(engine.model.config.vocabulary)
        run(engine, asked)
        outcome = run(engine, asked)
        yield summary(engine, device, w, asked, outcome, idle(engine, asked, outcome.seconds))


def summary(
    engine: Engine, device: Device, w: Workload, asked: Sequence[Asked], outcome: Outcome, idle: float | None
) -> Measured:
    work = Work.of(engine.model.graph, engine.fit.kv_dtype)
    floor = work.answers(device, engine.fit.dtype, [(len(a.prompt), a.new) for a in asked])
    tokens = sum(len(a.prompt) for a in asked) if w.counts_prompts else outcome.tokens
    return Measured(w.name, len(asked), tokens, outcome.seconds, floor, outcome.latencies(), idle)


def idle(engine: Engine, asked: Sequence[Asked], seconds: float) -> float | None:
    """The device's idle share of a run that took `seconds`, from a run of the same requests under a profiler."""
    profiler = engine._worker.ask(lambda backend: backend.profiler())
    if profiler is None or not profiler.asynchronous:
        return None
    engine._worker.ask(lambda backend: profiler.start())
    try:
        run(engine, asked)
    finally:
        ran = engine._worker.ask(lambda backend: profiler.stop())
    return idle_share(ran, seconds)


def over_time(
    engine: Engine, device: Device, w: Workload, shares: Sequence[float], closed: Measured | None = None
) -> Iterator[Measured]:
    """The workload's requests in a Poisson process, at shares of the rate at which they are answered all at once.

    Each after one run of the same arrivals to warm up. `closed` is the run of all at once, where there was one.
    """
    closed = closed or next(measure(engine, device, [w]))
    asked = w.requests_of(engine.model.config.vocabulary)
    for share in shares:
        rate = share * closed.requests / closed.seconds
        due = arrivals(len(asked), rate)
        run(engine, asked, due)
        outcome = run(engine, asked, due)
        yield Measured(
            f"{w.name} at {share:g}", len(asked), outcome.tokens, outcome.seconds, max(closed.floor, due[-1]),
            outcome.latencies(), None, rate,
        )  # fmt: skip
