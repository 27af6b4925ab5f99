"""CUDA graphs: steps are captured once per shape and replayed. `GraphCache` decides what is captured when.

Without a GPU a captured graph is the function itself, so that tests run the same code.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch

from llmrs.backends.torch.attn_metadata import StepBuffers, StepShape

Run = Callable[[], torch.Tensor]
CAPTURE_AFTER = 4  # steps of a shape before it is captured although the graph of a larger shape holds it
CAPTURE_TIME_SHARE = 0.02  # of the time, at most, goes to such captures while requests run


class CapturedGraph:
    """A captured function: a call replays it. `result` is the tensor that it writes."""

    def __init__(self, replay: Callable[[], object], result: torch.Tensor) -> None:
        self.replay, self.result = replay, result

    def __call__(self) -> torch.Tensor:
        self.replay()
        return self.result


@dataclass
class CapturedStep:
    """One shape: its buffers, the graph of its forward pass, and of sampling without and with top-k, top-p, min-p."""

    buffers: StepBuffers
    times_seen: int = 0  # before it was captured
    forward: CapturedGraph | None = None
    sample: dict[bool, CapturedGraph] = field(default_factory=dict)

    def holds(self, shape: StepShape) -> bool:
        """Whether its graph can run a step of another shape."""
        own = self.buffers.shape
        return (
            self.forward is not None
            and own.num_tokens >= shape.num_tokens
            and own.num_seqs >= shape.num_seqs
            and own.num_decode_tiles >= shape.num_decode_tiles
            and own.num_prefill_tiles >= shape.num_prefill_tiles
            and own.is_decode_only == shape.is_decode_only
        )


class GraphCache:
    """The captured steps of a model by shape. Forward and sampling are two graphs, since a step may sample eagerly."""

    def __init__(
        self, device: torch.device, make_buffers: Callable[[StepShape], StepBuffers],
        forward: Callable[[StepBuffers], torch.Tensor],
        sample: Callable[[torch.Tensor, StepBuffers, bool], torch.Tensor], null_slot: int, pool_bytes: int = 0,
    ) -> None:  # fmt: skip
        """`forward` gives the logits of a step, `sample` its tokens (logits, buffers, with top-k, top-p or min-p).

        The KV of captured steps goes to `null_slot`; `pool_bytes` is the initial size of their memory pool.
        """
        self.make_buffers, self.run_forward, self.run_sample = make_buffers, forward, sample
        self.capturers = GraphCapturer(device, pool_bytes), GraphCapturer(device)  # forward, sampling
        self.null_slot = null_slot
        self.steps: dict[StepShape, CapturedStep] = {}
        self.uncaptured: list[StepShape] = []  # captured while no request runs, the last first
        self.next_capture = 0.0  # not before this time while requests run
        self.clock: Callable[[], float] = time.monotonic

    def find(self, shape: StepShape) -> CapturedStep:
        """The step that runs this shape now: its own graph, else that of a larger shape, else none (eager).

        A capture stalls all requests for as long as an eager step takes. So a shape that no graph holds is captured
        when it comes again, others in a small share of the time.
        """
        own = self.step(shape)
        if own.forward:
            return own
        own.times_seen += 1
        if own.times_seen == 1:
            self.uncaptured.append(shape)
        larger = [step for step in self.steps.values() if step.holds(shape)]
        begin = self.clock()
        due = own.times_seen >= CAPTURE_AFTER and begin >= self.next_capture if larger else own.times_seen > 1
        if due:
            self.capture(own)
            end = self.clock()
            self.next_capture = end + (end - begin) / CAPTURE_TIME_SHARE
            return own
        sizes = {id(step): (step.buffers.shape.num_tokens, step.buffers.shape.num_seqs) for step in larger}
        return min(larger, key=lambda step: sizes[id(step)], default=own)

    def step(self, shape: StepShape) -> CapturedStep:
        """The entry of a shape, captured or not."""
        if shape not in self.steps:
            self.steps[shape] = CapturedStep(self.make_buffers(shape))
        return self.steps[shape]

    def capture(self, step: CapturedStep) -> None:
        """Captures both graphs, of a step of padding only: on a CPU it runs."""
        step.buffers.fill_null(self.null_slot)
        step.forward = self.capturers[0].capture(lambda: self.run_forward(step.buffers))
        self.sampler(step, False)

    def sampler(self, step: CapturedStep, filtered: bool) -> CapturedGraph:
        """The sampling graph, which reads the logits of the forward graph. `filtered`: with top-k, top-p or min-p."""
        if filtered not in step.sample:
            assert step.forward is not None, "sampling is captured after the forward pass"
            logits = step.forward.result
            step.sample[filtered] = self.capturers[1].capture(lambda: self.run_sample(logits, step.buffers, filtered))
        return step.sample[filtered]

    def capture_all(self, shapes: Iterable[StepShape]) -> None:
        for shape in shapes:
            self.capture(self.step(shape))

    def capture_next(self) -> bool:
        """Captures one shape that came or is likely to; True: there are more."""
        while self.uncaptured:
            step = self.step(self.uncaptured.pop())
            if step.forward is None:
                self.capture(step)
                break
        return bool(self.uncaptured)


class GraphCapturer:
    """Captures functions of tensors that keep their addresses.

    All graphs of one capturer share a memory pool, results included: one runs at a time, and its result must be read
    before the next. Without a GPU the function itself runs and writes to the same result.
    """

    def __init__(self, device: torch.device, pool_bytes: int = 1) -> None:
        """`pool_bytes`: initial size of the pool, so that a large function captured late gets it in one piece."""
        self.device, self.used = device, False
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = torch.cuda.graph_pool_handle() if self.stream else None
        # a pool is freed with its last graph: this one keeps it alive as long as the capturer
        empty = partial(torch.zeros, max(pool_bytes, 1), dtype=torch.uint8, device=device)
        self.keepalive = self._captured(empty) if self.stream else None

    def capture(self, run: Run) -> CapturedGraph:
        """`run` must be repeatable, and its kernels loaded unless this is the capturer's first."""
        if self.stream is None:
            result = run()
            return CapturedGraph(lambda: result.copy_(run()), result)
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        if not self.used:
            with torch.cuda.stream(self.stream):
                run()  # cuBLAS allocates its workspace on this stream
            self.used = True
        graph, result = self._captured(run)
        current.wait_stream(self.stream)
        return CapturedGraph(graph.replay, result)

    def _captured(self, run: Run) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """A graph, and an alias of its result, whose memory goes back to the pool."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                result = run()
            finally:
                graph.capture_end()
        return graph, _alias_of(result)


@dataclass(frozen=True)
class _ExternalMemory:
    """GPU memory that torch does not own (CUDA array interface, version 3)."""

    address: int
    size: int

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.address, False), "version": 3}


def _alias_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor at the same address that does not own the memory. The tensor is contiguous."""
    assert tensor.is_contiguous(), tensor.stride()
    memory = torch.as_tensor(_ExternalMemory(tensor.data_ptr(), tensor.nbytes), device=tensor.device)
    return memory.view(tensor.dtype).view(tensor.shape)
