"""Steps that are captured as CUDA graphs and replayed: which shapes there are, and the graphs.

A decode step runs in the next larger of DECODE, a mixed one in the next larger of MIXED tokens and ROWS sequences; a
larger one is launched call by call, which takes the host as long as the device takes for 8,192 tokens of a small model.
When a shape is captured is the runner's decision.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from llmrs.backends.torch.attn_metadata import LESS, MOST, Shape, StepInputs, splits

Run = Callable[[], torch.Tensor]

DECODE = (1, 2, 4, *range(8, 257, 8), *range(288, 513, 32))
MIXED = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 5120, 6144, 7168, 8192)
ROWS = (4, 16, 64, 128, 256, 512)
COVER_DECODE, COVER_MIXED = (1, 4, 16, 64, 128, 256, 512), (128, 256, 512, 1024, 2048)  # captured at load
KERNEL_TOKENS = (64, 128, 256, 384, 512, 768, 1024)  # mixed steps with other kernels, or launched in another way
KERNEL_ROWS = (256, 1024)  # tokens of mixed steps that are tried with every number of sequences
COPIES = 3  # of a step's array on the host: two steps may be under way while the third is written


def bucket(exact: Shape, tile: int, programs: float) -> Shape | None:
    """The shape in which a step runs; None: none is large enough. `tile` is the tokens of a prompt's tile,
    `programs` those of attention that fill the device, for each KV head."""
    if exact.plain:
        n = _next(DECODE, exact.tokens)
        return Shape(n, n, n, 0, exact.split) if n else None
    tokens, rows = _next(MIXED, exact.tokens), _next(ROWS, exact.sequences)
    if not tokens or not rows:
        return None
    return _mixed(tokens, rows, rows if exact.singles else 0, tile, programs)


def _next(sizes: tuple[int, ...], n: int) -> int | None:
    return next((size for size in sizes if size >= n), None)


def _up_to(sizes: tuple[int, ...], n: int) -> int:
    """The size that holds n, else the largest."""
    return _next(sizes, n) or sizes[-1]


def decode_shapes(sequences: int, programs: float) -> list[Shape]:
    """Of decode steps, up to this number of sequences of equal context, long or short; the largest come first."""
    largest = _up_to(DECODE, sequences)
    even = [(n, splits(n, programs)) for n in reversed(DECODE) if n <= largest]
    return [Shape(n, n, n, 0, split) for n, most in even for split in sorted({most, min(most, LESS)})]


def covering_shapes(sequences: int, tokens: int, tile: int, programs: float) -> list[Shape]:
    """A few shapes that hold nearly every step up to these sizes; the largest come first."""
    decode = [n for n in COVER_DECODE if n <= sequences]
    decode += [_up_to(DECODE, sequences)]
    rows = _up_to(ROWS, sequences)
    mixed = [_mixed(t, min(t, rows), min(t, rows), tile, programs) for t in COVER_MIXED if t <= tokens]
    return [*reversed(mixed), *(Shape(n, n, n, 0, splits(n, programs)) for n in sorted({*decode}, reverse=True))]


def kernel_shapes(sequences: int, tokens: int, tile: int, programs: float) -> list[Shape]:
    """Shapes whose steps run every variant of every kernel that steps up to these sizes run."""
    decode = [Shape(1, 1, 1, 0, 1 << n) for n in range(MOST.bit_length())] + decode_shapes(sequences, programs)
    rows = [n for n in ROWS if n <= _up_to(ROWS, sequences)]
    sizes = [(t, n) for t in KERNEL_TOKENS for n in (rows if t in KERNEL_ROWS else rows[:1]) if n <= t <= tokens]
    long = [(t, rows[0]) for t in MIXED if t <= tokens][-1:]
    return [*decode, *(_mixed(t, n, singles, tile, programs) for t, n in (*sizes, *long) for singles in (0, n))]


def _mixed(tokens: int, rows: int, singles: int, tile: int, programs: float) -> Shape:
    return Shape(tokens, rows, singles, tokens // tile + rows, splits(singles, programs))  # last tiles are not full


class Recording:
    """A function whose launches were recorded: a call runs them again. `result` is the tensor that it gives."""

    def __init__(self, again: Callable[[], object], result: torch.Tensor) -> None:
        self.again, self.result = again, result

    def __call__(self) -> torch.Tensor:
        self.again()
        return self.result


@dataclass
class Recorded:
    """One shape: its arrays, its forward part, and its sampling part without and with top-k, top-p, min-p."""

    inputs: StepInputs
    came: int = 0  # steps of this shape before it was captured
    forward: Recording | None = None
    sample: dict[bool, Recording] = field(default_factory=dict)

    def holds(self, shape: Shape) -> bool:
        """Whether its graph can run a step of another shape."""
        s = self.inputs.shape
        room = s.tokens >= shape.tokens and s.sequences >= shape.sequences and s.singles >= shape.singles
        return self.forward is not None and room and s.chunks >= shape.chunks and s.plain == shape.plain


class Recorder:
    """Records functions of tensors that stay where they are.

    All recorded functions of one recorder share one pool of memory, results included: one at a time runs, and its
    result must be read before the next. Without a GPU the function itself runs, to the same place.
    """

    def __init__(self, device: torch.device, room: int = 1) -> None:
        """`room`: bytes that the pool begins with, so that a large function that comes late finds them in one piece."""
        self.device, self.used = device, False
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = torch.cuda.graph_pool_handle() if self.stream else None
        # a pool ends with its last graph, and can't begin again: this one stays as long as the recorder
        empty = partial(torch.zeros, max(room, 1), dtype=torch.uint8, device=device)
        self.first = self._captured(empty) if self.stream else None

    def record(self, run: Run) -> Recording:
        """`run` must bear to be run twice, and its kernels must be loaded unless this is the recorder's first."""
        if self.stream is None:
            place = run()
            return Recording(lambda: place.copy_(run()), place)
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        if not self.used:
            with torch.cuda.stream(self.stream):
                run()  # libraries take their workspaces on this stream
            self.used = True
        graph, result = self._captured(run)
        current.wait_stream(self.stream)
        return Recording(graph.replay, result)

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
