"""Decode steps alone, at any batch size and context: seconds against the roofline, on the engine's own KV blocks.

The batch is synthetic: random blocks with any content, and one token per sequence. No request may run meanwhile.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmrs.backends.base import Backend, KernelEvent, Profiler
from llmrs.bench.roofline import Device, ModelCost, Rates
from llmrs.core.batch import Batch
from llmrs.core.engine import AsyncOutput
from llmrs.core.errors import BackendError
from llmrs.core.sampling import SamplingArrays
from llmrs.engine import Engine
from llmrs.random_model import make_batch
from llmrs.trace import union_length

ROUNDS, ROUND_SECONDS, MIN_STEPS, MAX_STEPS = 3, 0.3, 3, 50


@dataclass(frozen=True)
class SweepPoint(Rates):
    """A decode step of `batch` sequences of `context` tokens; 0 seconds where `skipped` says why it was not run."""

    batch: int
    context: int
    seconds: float = 0.0
    roofline_time: float = 0.0
    idle: float | None = None  # fraction of the time without a running kernel; None: not measurable
    skipped: str = ""

    @property
    def tokens(self) -> int:  # type: ignore[override]
        return self.batch

    @property
    def roofline_tokens_per_second(self) -> float:
        return self.batch / self.roofline_time if self.roofline_time else 0.0


def sweep(engine: Engine, device: Device, batches: Sequence[int], contexts: Sequence[int]) -> Iterator[SweepPoint]:
    """Every batch size at every context."""
    plan = engine.memory_plan
    cost = ModelCost.of(engine.model.graph, plan.kv_dtype)
    for context in contexts:
        for batch in batches:
            yield _measure_point(engine, batch, context, cost.decode_time(device, plan.dtype, batch, context))


def _measure_point(engine: Engine, batch: int, context: int, roofline_time: float) -> SweepPoint:
    skipped = does_not_fit(engine, batch, context)
    if not skipped:
        try:
            seconds, idle = engine._worker.run_on_device_thread(lambda backend: measure_step(backend, batch, context))
            return SweepPoint(batch, context, seconds, roofline_time, idle)
        except BackendError as error:  # out of memory
            skipped = error.message.splitlines()[0]
    return SweepPoint(batch, context, skipped=skipped)


def does_not_fit(engine: Engine, batch: int, context: int) -> str:
    """Why a step can't run; empty if it can."""
    plan = engine.memory_plan
    if context > plan.max_model_len:
        return f"the context has at most {plan.max_model_len} tokens"
    blocks = batch * -(-context // plan.block_size)
    if blocks > plan.num_blocks:
        return f"needs {blocks} blocks of KV cache, and there are {plan.num_blocks}"
    return "" if batch <= plan.max_num_seqs else f"at most {plan.max_num_seqs} sequences run at once"


def decode_batch(block_size: int, num_seqs: int, context: int) -> Batch:
    """A decode step of sequences of `context` tokens, in the first blocks of the pool, shuffled."""
    sampling = SamplingArrays.zeros(num_seqs)
    sampling.temperature[:] = 0.6
    sampling.rng_key[:] = np.arange(num_seqs)
    width = -(-context // block_size)
    blocks = np.random.default_rng(0).permutation(num_seqs * width).astype(np.int32).reshape(num_seqs, width)
    ones = np.ones(num_seqs, np.int32)
    return make_batch(ones, context * ones, blocks, sampling=sampling)


def run_steps(backend: Backend, batch: Batch, count: int) -> None:
    """Launches a step `count` times, with as many in flight as the engine has."""
    outputs: deque[AsyncOutput] = deque()
    for _ in range(count):
        outputs.append(backend.launch(batch))
        if len(outputs) >= backend.max_in_flight:
            outputs.popleft().tokens()
    while outputs:
        outputs.popleft().tokens()


def measure_step(
    backend: Backend, num_seqs: int, context: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float | None]:
    """Seconds of a step in the fastest round, and the device's idle fraction."""
    batch = decode_batch(backend.block_size, num_seqs, context)
    seconds, steps = time_step(backend, batch, clock)
    profiler = backend.profiler()
    if profiler is None or not profiler.asynchronous:
        return seconds, None
    events = profile(profiler, lambda: run_steps(backend, batch, steps))
    return seconds, max(1 - device_busy(events) / (seconds * steps), 0.0)  # profiling slows the host, not the kernels


def run_idle_work(backend: Backend) -> None:
    """Runs the work that a backend defers to idle time, such as CUDA graph capture."""
    while backend.idle():
        pass


def time_step(backend: Backend, batch: Batch, clock: Callable[[], float] = time.perf_counter) -> tuple[float, int]:
    """Seconds of a step in the fastest round, and the steps of a round."""

    def time_round(steps: int) -> float:
        begin = clock()
        run_steps(backend, batch, steps)
        return clock() - begin

    time_round(MIN_STEPS)  # compiles, fills caches
    run_idle_work(backend)
    steps = min(max(round(ROUND_SECONDS * MIN_STEPS / max(time_round(MIN_STEPS), 1e-9)), MIN_STEPS), MAX_STEPS)
    return min(time_round(steps) for _ in range(ROUNDS)) / steps, steps


def profile(profiler: Profiler, run: Callable[[], object]) -> list[KernelEvent]:
    """The kernels of a run."""
    profiler.start()
    try:
        run()
    finally:
        events = profiler.stop()
    return events


def device_busy(events: Sequence[KernelEvent]) -> float:
    """Seconds in which a kernel ran."""
    return union_length((e.begin, e.end) for e in events)
