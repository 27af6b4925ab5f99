"""How the tokens of a step get to the host.

A `TorchTicket` copies them on the stream that runs the steps, where the next step waits behind the copy. An `Outbox`
copies them on a stream of its own, into buffers that are used again. What must hold:

- **The copy begins when the tokens are there:** its stream waits for an event that is recorded after the sampling.
- **Nothing overwrites them before they are copied.** Recorded graphs share memory: had the tokens theirs, the next
  forward part could use it for something else, and would have to wait. So kernels write them to a tensor of the
  runner's own (`KernelRunner.tokens`), which only the next sampling overwrites, and that one waits (`hold`). A forward
  part lies between, so the copy is long done by then. Tensors that are made for one step are marked as used by the
  copy's stream; their memory goes to nobody else before it is through.
- **A buffer is used again only when it has been read:** a ticket holds it, and gives it back when its tokens are taken
  out. At most max_in_flight + 1 tickets are alive, and so many buffers there are from the start. Those of tickets that
  are never read, of steps that failed, go with them, and the next step that finds none makes one.
- **Tickets are read in any order:** each buffer has its own event, recorded after its copy.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from llmrs.core.sampling import Logprobs


class TorchTicket:
    """A step whose tokens, and log probabilities where asked for, are on their way to the host."""

    def __init__(self, tokens: torch.Tensor, likely: tuple[torch.Tensor, ...] | None) -> None:
        self.host = [_on_host(t) for t in (tokens, *(likely or ()))]
        self.event = None
        if tokens.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()

    def tokens(self) -> np.ndarray:
        if self.event is not None:
            self.event.synchronize()
        return self.host[0].numpy().astype(np.int32)

    def logprobs(self) -> Logprobs | None:
        return _logprobs(self.host[1:])


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that will be there when the device has come so far; a CPU tensor as it is."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _logprobs(found: Sequence[torch.Tensor]) -> Logprobs | None:
    """From what `sampling.logprobs` gave, on the host; None of nothing."""
    if not found:
        return None
    chosen, ids, top = (t.numpy() for t in found)
    return Logprobs(chosen, ids.astype(np.int32), top)


class Buffer:
    """Room for one step's tokens on the host, and the event after their copy."""

    def __init__(self, rows: int, cuda: bool) -> None:
        self.host = torch.empty(rows, dtype=torch.int32, pin_memory=cuda)
        self.copied = torch.cuda.Event() if cuda else None


class Outbox:
    """Sends tokens to the host beside the steps; the module says how. Used by one thread. On the CPU it just copies."""

    def __init__(self, device: torch.device, rows: int, steps: int) -> None:
        """`steps` tickets may be alive, of up to `rows` tokens."""
        self.rows, self.cuda = rows, device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self.sampled = torch.cuda.Event() if self.cuda else None
        self.free = [Buffer(rows, self.cuda) for _ in range(steps)]
        self.latest: Buffer | None = None

    def hold(self) -> None:
        """Before tokens are overwritten: the current stream waits until the last ones are copied."""
        if self.latest and self.latest.copied:
            torch.cuda.current_stream().wait_event(self.latest.copied)

    def send(self, tokens: torch.Tensor, likely: tuple[torch.Tensor, ...] | None) -> "Sent":
        """A ticket for tokens (S,) and log probabilities that the current stream has under way."""
        tokens = tokens.to(torch.int32)
        fits = self.free and len(tokens) <= self.rows
        buffer = self.free.pop() if fits else Buffer(max(len(tokens), self.rows), self.cuda)
        with self._aside((tokens, *(likely or ())), buffer):
            buffer.host[: len(tokens)].copy_(tokens, non_blocking=True)
            rest = [_on_host(t) for t in likely or ()]
        self.latest = buffer
        return Sent(self, buffer, len(tokens), rest)

    @contextmanager
    def _aside(self, tensors: Sequence[torch.Tensor], buffer: Buffer) -> Iterator[None]:
        """What copies `tensors` in this block runs on the stream for it, after what the current one has under way."""
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


class Sent:
    """A ticket of an outbox."""

    def __init__(self, outbox: Outbox, buffer: Buffer, count: int, rest: Sequence[torch.Tensor]) -> None:
        self.outbox, self.buffer, self.count, self.rest = outbox, buffer, count, rest
        self.found: np.ndarray | None = None

    def tokens(self) -> np.ndarray:
        """int32 (S,). The first call gives the buffer back."""
        if self.found is None:
            if self.buffer.copied:
                self.buffer.copied.synchronize()
            self.found = self.buffer.host[: self.count].numpy().copy()
            self.outbox.free.append(self.buffer)
        return self.found

    def logprobs(self) -> Logprobs | None:
        """None where none were asked for."""
        self.tokens()  # waits for the copies
        return _logprobs(self.rest)
