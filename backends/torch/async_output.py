"""How a step's tokens reach the host.

`TorchOutput` copies them on the stream that runs the steps, where the next step waits behind the copy. `OutputCopier`
copies them on a stream of its own, into pinned buffers that are reused:

- The copy starts when the tokens are written: its stream waits for an event recorded after sampling.
- Nothing overwrites them before. CUDA graphs share memory, so kernels write tokens to a tensor of the runner
  (`GPUModelRunner.tokens`), which only the next sampling overwrites, after `wait_for_copy`. A forward pass lies
  between, so this never waits in practice. Tensors made for one step are marked with `record_stream`.
- A buffer is reused after its output was read. At most max_in_flight + 1 outputs are alive, and as many buffers exist.
  Buffers of failed steps are freed with them; the next step that finds none makes one.
- Outputs are read in any order: each buffer has an event of its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from llmrs.core.sampling import Logprobs


class TorchOutput:
    """A launched step, whose tokens and, if requested, log probabilities are being copied."""

    def __init__(self, tokens: torch.Tensor, logprobs: tuple[torch.Tensor, ...] | None) -> None:
        self.host = [_to_host(t) for t in (tokens, *(logprobs or ()))]
        self.event = None
        if tokens.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()

    def tokens(self) -> np.ndarray:
        """int32 (S,)."""
        if self.event is not None:
            self.event.synchronize()
        return self.host[0].numpy().astype(np.int32)

    def logprobs(self) -> Logprobs | None:
        return _logprobs(self.host[1:])


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """An asynchronous copy in pinned memory; a CPU tensor as it is."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _logprobs(tensors: Sequence[torch.Tensor]) -> Logprobs | None:
    """From the host copies of what `sampling.logprobs` gives; None from none."""
    if not tensors:
        return None
    chosen, ids, top = (t.numpy() for t in tensors)
    return Logprobs(chosen, ids.astype(np.int32), top)


class PinnedBuffer:
    """Host memory for one step's tokens, and the event after their copy."""

    def __init__(self, size: int, cuda: bool) -> None:
        self.host = torch.empty(size, dtype=torch.int32, pin_memory=cuda)
        self.copied = torch.cuda.Event() if cuda else None


class OutputCopier:
    """Copies tokens to the host on a stream of its own. Used by one thread. On the CPU it copies at once."""

    def __init__(self, device: torch.device, max_num_seqs: int, num_buffers: int) -> None:
        self.max_num_seqs, self.cuda = max_num_seqs, device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self.sampled = torch.cuda.Event() if self.cuda else None
        self.free = [PinnedBuffer(max_num_seqs, self.cuda) for _ in range(num_buffers)]
        self.latest: PinnedBuffer | None = None

    def wait_for_copy(self) -> None:
        """Before tokens are overwritten: the current stream waits for the last copy."""
        if self.latest and self.latest.copied:
            torch.cuda.current_stream().wait_event(self.latest.copied)

    def send(self, tokens: torch.Tensor, logprobs: tuple[torch.Tensor, ...] | None) -> "CopiedOutput":
        """Starts the copy of tokens (S,) and log probabilities that the current stream writes."""
        tokens = tokens.to(torch.int32)
        fits = self.free and len(tokens) <= self.max_num_seqs
        buffer = self.free.pop() if fits else PinnedBuffer(max(len(tokens), self.max_num_seqs), self.cuda)
        with self._on_copy_stream((tokens, *(logprobs or ())), buffer):
            buffer.host[: len(tokens)].copy_(tokens, non_blocking=True)
            rest = [_to_host(t) for t in logprobs or ()]
        self.latest = buffer
        return CopiedOutput(self, buffer, len(tokens), rest)

    @contextmanager
    def _on_copy_stream(self, tensors: Sequence[torch.Tensor], buffer: PinnedBuffer) -> Iterator[None]:
        """Copies of `tensors` in this block run on the copy stream, after the current stream's work so far."""
        if not (self.stream and self.sampled and buffer.copied):
            yield
            return
        self.sampled.record()
        self.stream.wait_event(self.sampled)
        with torch.cuda.stream(self.stream):
            yield
            buffer.copied.record()
        for t in tensors:
            t.record_stream(self.stream)


class CopiedOutput:
    """A launched step whose output an `OutputCopier` copies."""

    def __init__(self, copier: OutputCopier, buffer: PinnedBuffer, count: int, rest: Sequence[torch.Tensor]) -> None:
        self.copier, self.buffer, self.count, self.rest = copier, buffer, count, rest
        self.read: np.ndarray | None = None

    def tokens(self) -> np.ndarray:
        """int32 (S,). The first call returns the buffer to the copier."""
        if self.read is None:
            if self.buffer.copied:
                self.buffer.copied.synchronize()
            self.read = self.buffer.host[: self.count].numpy().copy()
            self.copier.free.append(self.buffer)
        return self.read

    def logprobs(self) -> Logprobs | None:
        """None if none were requested."""
        self.tokens()  # waits for the copies
        return _logprobs(self.rest)
