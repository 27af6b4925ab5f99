"""Where a decode step goes, kernel by kernel, each against the floor of what it computes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from llmrs.backends.base import Backend, KernelEvent
from llmrs.bench.op_costs import Kernel, costs, kernels
from llmrs.bench.roofline import Device, Work
from llmrs.bench.sweep import busy, decode_batch, profiled, run_steps, timed, too_large
from llmrs.core.errors import BackendError, ConfigError
from llmrs.engine import Engine

STEPS = 5  # under the profiler


@dataclass(frozen=True)
class Profile:
    """A decode step of `batch` sequences of `context` tokens."""

    batch: int
    context: int
    seconds: float  # of a step without the profiler, host included
    busy: float  # of them something runs on the device
    floor: float
    kernels: list[Kernel]


def check(engine: Engine, shapes: Sequence[tuple[int, int]]) -> None:
    """Raises BackendError where the backend can't say what runs, ConfigError for a step that does not fit."""
    name, profiler = engine._worker.ask(lambda backend: (backend.name, backend.profiler()))
    if profiler is None:
        raise BackendError(f"backend {name} does not say what runs on its device", "leave out --profile")
    for batch, context in shapes:
        if reason := too_large(engine, batch, context):
            raise ConfigError(f"a step of {batch} x {context}: {reason}", "give smaller batches or contexts")


def profile_step(engine: Engine, device: Device, batch: int, context: int) -> Profile:
    """A step that `check` found to be possible."""
    seconds, ran = engine._worker.ask(lambda backend: recorded(backend, batch, context))
    fit, graph = engine.fit, engine._worker.ask(lambda backend: backend.graph)
    found = costs(graph, (fit.dtype, fit.kv_dtype), batch, context)
    floor = Work.of(engine.model.graph, fit.kv_dtype).decode(device, fit.dtype, batch, context)
    return Profile(batch, context, seconds, busy(ran) / STEPS, floor, kernels(ran, STEPS, found, device))


def recorded(backend: Backend, count: int, context: int) -> tuple[float, Sequence[KernelEvent]]:
    """Seconds of a step, and what ran in STEPS of them."""
    profiler = backend.profiler()
    assert profiler is not None, "check says so"
    batch = decode_batch(backend.block_size, count, context)
    seconds, _ = timed(backend, batch, time.perf_counter)
    return seconds, profiled(profiler, lambda: run_steps(backend, batch, STEPS))
