"""The kernels of a decode step, each against the roofline of its ops."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmrs.backends.base import Backend, KernelEvent
from llmrs.bench.op_costs import KernelStats, kernel_stats, op_costs
from llmrs.bench.roofline import Device, ModelCost
from llmrs.bench.sweep import decode_batch, device_busy, does_not_fit, profile, run_steps, time_step
from llmrs.core.errors import BackendError, ConfigError
from llmrs.core.ir import Graph
from llmrs.engine import Engine

STEPS = 5  # under the profiler


@dataclass(frozen=True)
class Profile:
    """A decode step of `batch` sequences of `context` tokens."""

    batch: int
    context: int
    seconds: float  # of a step without the profiler, host included
    busy: float  # seconds in which a kernel runs
    roofline_time: float
    kernels: list[KernelStats]


def check(engine: Engine, shapes: Sequence[tuple[int, int]]) -> None:
    """Raises BackendError for a backend without a profiler, ConfigError for a step that does not fit."""
    name, profiler = engine._worker.run_on_device_thread(lambda backend: (backend.name, backend.profiler()))
    if profiler is None:
        raise BackendError(f"backend {name} has no profiler for its device", "leave out --profile")
    for batch, context in shapes:
        if reason := does_not_fit(engine, batch, context):
            raise ConfigError(f"a step of {batch} x {context}: {reason}", "give smaller batches or contexts")


def profile_step(engine: Engine, device: Device, batch: int, context: int) -> Profile:
    """Profiles a step that passed `check`."""
    seconds, events, graph = engine._worker.run_on_device_thread(lambda backend: _profile(backend, batch, context))
    plan = engine.memory_plan
    costs = op_costs(graph, (plan.dtype, plan.kv_dtype), batch, context)
    roofline = ModelCost.of(engine.model.graph, plan.kv_dtype).decode_time(device, plan.dtype, batch, context)
    kernels = kernel_stats(events, STEPS, costs, device)
    return Profile(batch, context, seconds, device_busy(events) / STEPS, roofline, kernels)


def _profile(backend: Backend, num_seqs: int, context: int) -> tuple[float, list[KernelEvent], Graph]:
    """Seconds of a step, and the kernels of STEPS of them."""
    profiler = backend.profiler()
    assert profiler is not None
    batch = decode_batch(backend.block_size, num_seqs, context)
    seconds, _ = time_step(backend, batch)
    return seconds, profile(profiler, lambda: run_steps(backend, batch, STEPS)), backend.graph
