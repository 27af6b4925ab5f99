"""The engine's core: requests in, tokens out, step by step. It knows no text, no files, no threads.

    submit -> waiting -> schedule -> launch -> (one step ahead) -> tokens -> commit -> on_update

Up to `backend.max_in_flight` steps are launched before the oldest one's tokens are read, so that the host prepares
step N + 1 while the device computes step N. A finished request is therefore detected one step late, and the extra
token is discarded. Next: `backend.launch`, for CUDA in backends/torch/backend.py.
"""

from collections import deque
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np

from llmrs.core.batch import Batch
from llmrs.core.blocks import BlockPool
from llmrs.core.errors import BackendError, ConfigError, LlmrsError
from llmrs.core.request import Request
from llmrs.core.sampling import Logprobs
from llmrs.core.scheduler import Scheduler, Step


class AsyncOutput(Protocol):
    """The output of a launched step."""

    def tokens(self) -> np.ndarray:
        """Waits for the sampled tokens, int32 (S,). Raises errors of the device."""

    def logprobs(self) -> Logprobs | None:
        """After `tokens`: of the R logits rows, for the sampled tokens and prompt_logprob_ids; None: not requested."""


class ModelRunner(Protocol):
    """What the engine requires of a backend."""

    max_in_flight: int  # steps launched before the first one's tokens are read

    def launch(self, batch: Batch) -> AsyncOutput:
        """Starts a step and returns at once. Steps run in launch order."""

    def forward(self, batch: Batch) -> Any:
        """Starts a step's forward pass alone; the result is for `sample`."""

    def sample(self, logits: Any, batch: Batch, mask: np.ndarray | None) -> AsyncOutput:
        """Starts its sampling. `mask`: tokens that may be sampled, bits uint32 (S, ceil(V / 32))."""


class EngineCore:
    """Steps requests through a backend. Used by one thread."""

    def __init__(
        self, backend: ModelRunner, pool: BlockPool, *, vocab_size: int, max_model_len: int, max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:  # fmt: skip
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {max_num_batched_tokens} is below max_num_seqs {max_num_seqs}",
                "every running request needs room for a token in each step",
            )
        self.backend, self.vocab_size, self.max_model_len = backend, vocab_size, max_model_len
        self.scheduler = Scheduler(max_num_seqs, max_num_batched_tokens, max_model_len, pool)
        self.in_flight: deque[tuple[Step, AsyncOutput]] = deque()
        self.span: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext()  # for traces

    @property
    def idle(self) -> bool:
        return not (self.in_flight or self.scheduler.running or self.scheduler.waiting)

    def submit(self, request: Request) -> None:
        """Queues a request, unless it was cancelled before. The caller has checked params, token ids and length."""
        assert request.params.max_tokens is not None
        if request.finish_reason is not None:
            return
        request.max_total_tokens = min(len(request.prompt) + request.params.max_tokens, self.max_model_len)
        self.scheduler.submit(request)

    def cancel(self, request: Request, reason: str = "cancelled") -> None:
        """Ends a request at once and frees its blocks. Does nothing if it has ended."""
        self.finish([request], reason)

    def step(self) -> None:
        """Launches the next step, if any, and commits the oldest if enough are in flight."""
        step = None
        try:
            with self.span("schedule"):
                step = self.scheduler.schedule()
            if step is not None:
                self.in_flight.append((step, self._launch(step)))
            if self.in_flight and (step is None or len(self.in_flight) >= self.backend.max_in_flight):
                self._commit()
        except LlmrsError as error:
            self._fail(step, error)
        except (RuntimeError, MemoryError, ValueError, ArithmeticError, LookupError, TypeError) as error:
            cause = BackendError(f"a step failed: {error}", "its requests ended; others go on")
            cause.__cause__ = error
            self._fail(step, cause)

    def _launch(self, step: Step) -> AsyncOutput:
        masked = self.scheduler.slots.masked
        if not masked or masked.isdisjoint(step.batch.req_slots.tolist()):
            with self.span("launch"):
                return self.backend.launch(step.batch)
        with self.span("launch"):
            logits = self.backend.forward(step.batch)
        while self.in_flight:  # a mask may depend on all earlier tokens; the forward pass does not
            self._commit()
        mask = np.full((len(step.requests), -(-self.vocab_size // 32)), 2**32 - 1, np.uint32)
        for row, request in enumerate(step.requests):
            if request.mask is not None and step.batch.do_sample[row]:
                mask[row] = request.mask(request.output)
        return self.backend.sample(logits, step.batch, mask)

    def _fail(self, step: Step | None, error: Exception) -> None:
        """Ends the requests of the lost steps, or all if those are unknown."""
        lost = [*([step] if step else []), *(s for s, _ in self.in_flight)]
        if step is None and not self.in_flight:
            self.close(error)
            return
        self.in_flight.clear()
        self.finish({r for s in lost for r in s.requests}, "error", error)

    def finish(self, requests: Collection[Request], reason: str, error: Exception | None = None) -> None:
        for request in requests:
            if request.finish_reason is None:
                self.scheduler.finish(request, reason, error)
                request.on_update(request, [])

    def close(self, error: Exception) -> None:
        """Ends every request with `error`."""
        self.in_flight.clear()
        while rest := [*self.scheduler.running, *self.scheduler.waiting]:  # on_update may submit others
            self.finish(rest, "error", error)

    def _commit(self) -> None:
        step, output = self.in_flight[0]
        with self.span("wait"):
            tokens, logprobs = output.tokens(), output.logprobs() if step.batch.logprobs >= 0 else None
        self.in_flight.popleft()
        with self.span("commit"):
            for request, new in self.scheduler.commit(step, tokens, logprobs):
                request.on_update(request, new)
