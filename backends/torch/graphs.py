"""Steps that are recorded once and run again: which shapes there are, and CUDA graphs of them.

A step of single tokens runs in the next larger of DECODE, a mixed one in the next larger of MIXED tokens and ROWS
sequences; a larger one is launched call by call, which takes the host as long as the device takes for 8,192 tokens of a
small model. Each graph is recorded when a step first needs it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from llmrs.backends.torch.step import Shape, StepInputs, splits

Run = Callable[[], torch.Tensor]

DECODE = (1, 2, 4, *range(8, 257, 8), *range(288, 513, 32))
MIXED = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 5120, 6144, 7168, 8192)
ROWS = (4, 16, 64, 128, 256, 512)
COPIES = 3  # of a step's array on the host: two steps may be under way while the third is written


def bucket(exact: Shape, tile: int, programs: float) -> Shape | None:
    """The shape in which a step runs; None: none is large enough. `tile` is the tokens of a prompt's tile,
    `programs` those of attention that fill the device, for each KV head."""
    if exact.plain:
        n = decode_bucket(exact.tokens)
        return Shape(n, n, n, 0, exact.split) if n else None
    tokens, rows = _next(MIXED, exact.tokens), _next(ROWS, exact.sequences)
    if not tokens or not rows:
        return None
    singles = rows if exact.singles else 0
    return Shape(tokens, rows, singles, tokens // tile + rows, splits(singles, programs))  # last tiles are not full


def decode_bucket(tokens: int) -> int | None:
    """Tokens of the graph that runs a step of so many single ones."""
    return _next(DECODE, tokens)


def _next(sizes: tuple[int, ...], n: int) -> int | None:
    return next((size for size in sizes if size >= n), None)


@dataclass
class Recorded:
    """One shape: its arrays, its forward part, and its sampling part without and with top-k, top-p, min-p."""

    inputs: StepInputs
    forward: Run | None = None
    sample: dict[bool, Run] = field(default_factory=dict)


class Recorder:
    """Records functions of tensors that stay where they are.

    All recorded functions of one recorder share one pool of memory, results included: one at a time runs, and its
    result must be read before the next. Without a GPU the function itself runs, to the same place.
    """

    def __init__(self, device: torch.device, room: int = 1) -> None:
        """`room`: bytes that the pool begins with, so that a large function that comes late finds them in one piece."""
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = torch.cuda.graph_pool_handle() if self.stream else None
        # a pool ends with its last graph, and can't begin again: this one stays as long as the recorder
        empty = partial(torch.zeros, max(room, 1), dtype=torch.uint8, device=device)
        self.first = self._captured(empty) if self.stream else None

    def record(self, run: Run) -> Run:
        """A function that runs `run` again, and gives the tensor that it gave. `run` must bear to be run twice."""
        if self.stream is None:
            place = run()
            return lambda: place.copy_(run())
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            run()  # compiles kernels, and lets libraries take their workspaces
        graph, result = self._captured(run)
        current.wait_stream(self.stream)

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

    def _captured(self, run: Run) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """A graph, and the place of its result, whose memory goes back to the pool."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                result = run()
            finally:
                graph.capture_end()
        return graph, _place_of(result)


@dataclass(frozen=True)
class _Memory:
    """Memory of a GPU as others describe it to torch, which then does not keep it (CUDA array interface, version 3)."""

    address: int
    size: int

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.address, False), "version": 3}


def _place_of(tensor: torch.Tensor) -> torch.Tensor:
    """The same place as a tensor that does not own it. The tensor is contiguous."""
    assert tensor.is_contiguous(), tensor.stride()
    memory = torch.as_tensor(_Memory(tensor.data_ptr(), tensor.nbytes), device=tensor.device)
    return memory.view(tensor.dtype).view(tensor.shape)
