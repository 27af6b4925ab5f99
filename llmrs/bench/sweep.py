"""Decode steps by themselves, at any batch and context: what a step takes, beside its floor, on the pool's own blocks.

The batch is made up: random blocks, whatever they hold, and a token for each sequence. Nothing else may run meanwhile.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmrs.backends.base import Backend, KernelEvent, Profiler
from llmrs.bench.roofline import Device, Work
from llmrs.core.batch import Batch
from llmrs.core.engine import AsyncOutput
from llmrs.core.errors import BackendError
from llmrs.core.sampling import SamplingArrays
from llmrs.engine import Engine

ROUNDS, ENOUGH, FEWEST, MOST = 3, 0.3, 3, 50  # rounds of steps, the seconds of one, and how many steps it has


@dataclass(frozen=True)
class Cell:
    """A step of `batch` sequences of `context` tokens. `skipped` says why it was not run; then there are no seconds."""

    batch: int
    context: int
    seconds: float = 0.0
    floor: float = 0.0
    idle: float | None = None  # share of the time in which the device does nothing; None: can't be measured
    skipped: str = ""

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.batch / self.seconds if self.seconds else 0.0

    @property
    def ceiling(self) -> float:
        """Tokens per second that the device's ceilings allow."""
        return self.batch / self.floor if self.floor else 0.0

    @property
    def share(self) -> float:
        return self.floor / self.seconds if self.seconds else 0.0


def grid(engine: Engine, device: Device, batches: Sequence[int], contexts: Sequence[int]) -> Iterator[Cell]:
    """Every batch at every context; what does not fit comes with the reason."""
    work = Work.of(engine.model.graph, engine.fit.kv_dtype)
    for context in contexts:
        for batch in batches:
            if reason := too_large(engine, batch, context):
                yield Cell(batch, context, skipped=reason)
                continue
            yield _cell(engine, work.decode(device, engine.fit.dtype, batch, context), batch, context)


def _cell(engine: Engine, floor: float, batch: int, context: int) -> Cell:
    """A step that the device has no memory for is left out like one that the cache is too small for."""
    try:
        seconds, idle = engine._worker.ask(lambda backend: measured(backend, batch, context))
    except BackendError as error:
        return Cell(batch, context, skipped=error.message.splitlines()[0])
    return Cell(batch, context, seconds, floor, idle)


def too_large(engine: Engine, batch: int, context: int) -> str:
    """Why a step can't be run here; empty: it can."""
    fit = engine.fit
    if context > fit.length:
        return f"the context has at most {fit.length} tokens"
    needed = batch * -(-context // fit.block_size)
    if needed > fit.blocks:
        return f"needs {needed} blocks of KV cache, and there are {fit.blocks}"
    return "" if batch <= fit.sequences else f"at most {fit.sequences} sequences run at once"


def decode_batch(block_size: int, count: int, context: int) -> Batch:
    """A step of one token for each of `count` sequences of `context` tokens, in the first blocks of the pool, mixed."""
    sampling = SamplingArrays.zeros(count)
    sampling.temperature[:] = 0.6
    sampling.rng_key[:] = np.arange(count)
    lengths, width = np.full(count, context, np.int32), -(-context // block_size)
    return Batch(
        input_ids=np.zeros(count, np.int32),
        positions=lengths - 1,
        query_start_loc=np.arange(count + 1, dtype=np.int32),
        seq_lens=lengths,
        block_tables=np.random.default_rng(0).permutation(count * width).astype(np.int32).reshape(count, width),
        req_slots=np.arange(count, dtype=np.int32),
        do_sample=np.ones(count, bool),
        sampling=sampling,
        logits_indices=np.arange(count, dtype=np.int32),
        prompt_logprob_ids=np.zeros(0, np.int32),
    )


def run_steps(backend: Backend, batch: Batch, count: int) -> None:
    """Runs a step again and again, as far ahead as the engine does."""
    outputs: deque[AsyncOutput] = deque()
    for _ in range(count):
        outputs.append(backend.launch(batch))
        if len(outputs) >= backend.max_in_flight:
            outputs.popleft().tokens()
    while outputs:
        outputs.popleft().tokens()


def measured(
    backend: Backend, count: int, context: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float | None]:
    """Seconds of a step, host and device together, of the fastest round; and the device's idle share."""
    batch = decode_batch(backend.block_size, count, context)
    seconds, steps = timed(backend, batch, clock)
    profiler = backend.profiler()
    if profiler is None or not profiler.asynchronous:
        return seconds, None
    ran = profiled(profiler, lambda: run_steps(backend, batch, steps))
    return seconds, max(1 - busy(ran) / (seconds * steps), 0.0)  # the profiler slows the host, but not the kernels


def settle(backend: Backend) -> None:
    """Has the backend do what it would do while no request runs."""
    while backend.idle():
        pass


def timed(backend: Backend, batch: Batch, clock: Callable[[], float]) -> tuple[float, int]:
    """Seconds of a step in the fastest round, and the steps of a round."""

    def lasts(steps: int) -> float:
        begin = clock()
        run_steps(backend, batch, steps)
        return clock() - begin

    lasts(FEWEST)  # compiles, fills caches
    settle(backend)
    steps = min(max(round(ENOUGH * FEWEST / max(lasts(FEWEST), 1e-9)), FEWEST), MOST)
    return min(lasts(steps) for _ in range(ROUNDS)) / steps, steps


def profiled(profiler: Profiler, run: Callable[[], object]) -> list[KernelEvent]:
    """What ran on the device during a run."""
    profiler.start()
    try:
        run()
    finally:
        found = profiler.stop()
    return found


def busy(ran: Sequence[KernelEvent]) -> float:
    """Seconds in which something ran, of a list in order of the beginnings; what overlaps counts once."""
    total, reached = 0.0, float("-inf")
    for r in ran:
        total += max(r.end - max(r.begin, reached), 0.0)
        reached = max(reached, r.end)
    return total
