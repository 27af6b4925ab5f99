"""Runs workloads, all requests at once or with Poisson arrivals: rate, % of roofline, latencies, device idle time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from llmrs.backends.base import Profiler
from llmrs.bench.roofline import Device, Measurement, ModelCost
from llmrs.bench.sweep import device_busy, run_idle_work
from llmrs.bench.workloads import RequestSpec, RunResult, Workload, poisson_arrivals, run
from llmrs.core.errors import ConfigError
from llmrs.engine import Engine

FLUSH_EVERY_STEPS = 100


@dataclass(frozen=True)
class WorkloadResult(Measurement):
    """A workload's run. `tokens` are output tokens, or prompt tokens of `prefill`."""

    requests: int
    latencies: dict[str, dict[str, float]]
    idle: float | None = None  # fraction of the time without a running kernel; None: not measurable
    request_rate: float | None = None  # arrivals per second; None: all at once


def check(engine: Engine, workloads: Sequence[Workload]) -> None:
    """Raises ConfigError for a workload whose requests exceed the context."""
    context = engine.memory_plan.max_model_len
    for w in workloads:
        if w.max_len > context:
            problem = f"workload {w.name} needs {w.max_len} tokens, more than the context of {context}"
            raise ConfigError(problem, "lower --scale, or raise --max-model-len")


def measure(engine: Engine, device: Device, workloads: Sequence[Workload]) -> Iterator[WorkloadResult]:
    """Each workload after a warm-up run, and again under the profiler for the idle time."""
    check(engine, workloads)
    plan = engine.memory_plan
    cost = ModelCost.of(engine.model.graph, plan.kv_dtype)
    for w in workloads:
        specs = w.make_requests(engine.model.config.vocab_size)
        result = _run_warm(engine, specs)
        roofline = cost.workload_time(device, plan.dtype, [(len(s.prompt), s.output_len) for s in specs])
        tokens = sum(len(s.prompt) for s in specs) if w.is_prefill else result.tokens
        idle, latencies = device_idle(engine, specs, result.seconds), result.latencies()
        yield WorkloadResult(w.name, tokens, result.seconds, roofline, len(specs), latencies, idle)


def _run_warm(engine: Engine, specs: Sequence[RequestSpec], arrivals: Sequence[float] | None = None) -> RunResult:
    """The second of two runs."""
    run(engine, specs, arrivals)
    engine._worker.run_on_device_thread(run_idle_work)
    return run(engine, specs, arrivals)


class BusyMeter:
    """Adds up device time while an engine steps.

    A profiler's buffer is bounded and drops events silently: it is flushed every FLUSH_EVERY_STEPS.
    """

    def __init__(self, profiler: Profiler) -> None:
        self.profiler, self.steps, self.busy = profiler, 0, 0.0

    def stop(self) -> None:
        self.busy += device_busy(self.profiler.stop())

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """The core's trace hook, called around each phase of a step."""
        if name == "schedule":
            self.steps += 1
            if self.steps % FLUSH_EVERY_STEPS == 0:
                self.stop()
                self.profiler.start()
        yield


def device_idle(engine: Engine, specs: Sequence[RequestSpec], seconds: float) -> float | None:
    """The device's idle fraction of a run of `seconds`, with the kernel time of a profiled run of the same requests.

    The profiler slows down the host, not the kernels.
    """
    on_device = engine._worker.run_on_device_thread
    profiler = on_device(lambda backend: backend.profiler())
    if profiler is None or not profiler.asynchronous:
        return None
    core, meter = engine._worker.core, BusyMeter(profiler)
    before, core.span = core.span, meter.span
    on_device(lambda backend: profiler.start())
    try:
        run(engine, specs)
    finally:
        core.span = before
        on_device(lambda backend: meter.stop())
    return max(1 - meter.busy / seconds, 0.0)


def open_loop(
    engine: Engine, device: Device, w: Workload, shares: Sequence[float], closed: WorkloadResult | None = None
) -> Iterator[WorkloadResult]:
    """The workload with Poisson arrivals, at shares of the request rate of a closed-loop run (`closed`, or a new one).

    Each after a warm-up run of the same arrivals.
    """
    closed = closed or next(measure(engine, device, [w]))
    specs = w.make_requests(engine.model.config.vocab_size)
    for share in shares:
        rate = share * closed.requests / closed.seconds
        arrivals = poisson_arrivals(len(specs), rate)
        result = _run_warm(engine, specs, arrivals)
        roofline = max(closed.roofline_time, arrivals[-1])
        latencies, name = result.latencies(), f"{w.name} at {share:g}"
        yield WorkloadResult(name, result.tokens, result.seconds, roofline, len(specs), latencies, None, rate)
