"""One request's output: written by the device thread, read by any other.

`OutputQueue.on_update` runs on the device thread after each commit and puts text into a queue; `Stream` takes it out
in the caller's thread, `aio.AsyncStream` in an event loop.
"""

import queue
from collections.abc import Callable, Iterator
from typing import Any, Self

from llmrs.core.errors import EngineClosedError, RequestError
from llmrs.core.request import Request
from llmrs.models.text.detokenize import Detokenizer
from llmrs.output import GenerationOutput, TokenLogprob
from llmrs.process import current_process

Cancel = Callable[[Request, str], None]
PromptProgress = Callable[[int, int], object]  # prompt tokens computed, prompt tokens; False cancels the request


class OutputQueue:
    """Turns a request's tokens into text and queues it. `text_parts` is all text so far."""

    def __init__(self, detokenizer: Detokenizer, stop: Cancel) -> None:
        self.detokenizer, self.stop = detokenizer, stop
        self.notify: Callable[[], None] = lambda: None  # called on the device thread after each item
        self.queue: queue.SimpleQueue[str | int | None] = queue.SimpleQueue()  # text, prompt tokens done, or the end
        self.ended = False
        self.text_parts: list[str] = []

    def on_update(self, request: Request, tokens: list[int]) -> None:
        """Called by the device thread after each commit, and when the request ends without a token."""
        if self.ended:
            return
        if len(request.output) == len(tokens):  # up to the first token
            self._put(request.computed_tokens)
        for token in tokens:
            self._put_text(self.detokenizer.add(token))
        if request.finish_reason is not None:
            self._put_text(self.detokenizer.flush())
        if self.detokenizer.stopped is not None:
            if request.finish_reason == "length":  # on the token that completes the stop string
                request.finish_reason = "stop"
            self.stop(request, "stop")  # calls this again without tokens, unless the request has ended
        if request.finish_reason is not None and not self.ended:
            self.ended = True
            self._put(None)

    def _put_text(self, text: str) -> None:
        if text:
            self.text_parts.append(text)
            self._put(text)

    def _put(self, item: str | int | None) -> None:
        self.queue.put(item)
        self.notify()


class Stream(Iterator[str]):
    """An iterator of text. Raises the request's error, if any, at the end.

    `with stream:` and `close()` cancel an unfinished request; so do an exception such as Ctrl-C while the stream
    waits, and the stream's deletion. The engine stays open while one of its streams is in use. Threads that read one
    stream share its text, and each gets the end.
    """

    def __init__(
        self, request: Request, output_queue: OutputQueue, cancel: Callable[[Request], None],
        progress: PromptProgress | None = None, engine: object = None,
    ) -> None:  # fmt: skip
        """`engine` is kept alive until the stream is read to its end or closed."""
        self.request, self._output, self._cancel, self._progress = request, output_queue, cancel, progress
        self._drained, self._engine, self._process = False, engine, current_process()

    @property
    def seq_id(self) -> int:
        return self.request.id

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def finished(self) -> bool:
        """Whether generation has ended; text may still be unread."""
        return self._output.ended

    @property
    def token_count(self) -> int:
        """Tokens generated so far."""
        return len(self.request.output)

    def __iter__(self) -> "Stream":
        return self

    def take(self, *, block: bool = True) -> str:
        """The next text. Raises StopIteration at the end; without `block`, queue.Empty where it would wait."""
        if self._process != current_process():
            raise EngineClosedError("the stream belongs to another process", "read it in the process that started it")
        interrupted = True
        try:
            while not self._drained:
                item = self._output.queue.get(block)
                if isinstance(item, str):
                    interrupted = False
                    return item
                self._on_event(item)
            interrupted = False
        except queue.Empty:
            interrupted = False
            raise
        finally:
            if interrupted:  # by an exception of `progress` or of a signal handler, such as Ctrl-C
                self.cancel()
        if self.request.error is not None:
            raise copied(self.request.error)
        raise StopIteration

    __next__ = take

    def _on_event(self, prompt_tokens: int | None) -> None:
        """Handles prompt progress, or None: the end."""
        if prompt_tokens is None:
            self._output.queue.put(None)  # for other readers that wait
            self._drained, self._engine = True, None
        elif self._progress is not None and self._progress(prompt_tokens, self.prompt_length) is False:
            self.cancel()

    def cancel(self) -> None:
        """Ends the request after the current step. Callable from any thread, repeatedly."""
        self._cancel(self.request)

    def close(self) -> None:
        """Cancels an unfinished request and releases the engine. Callable repeatedly."""
        self.cancel()
        self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise RequestError("a Stream can't be pickled or copied", "pickle the result of output()")

    def result(self) -> GenerationOutput:
        """Waits for the end and returns the whole output. Raises the request's error."""
        for _ in self:
            pass
        return self.output()

    def output(self) -> GenerationOutput:
        """The output so far, without waiting; `finish_reason` is "" until the end."""
        r, now = self.request, self.request.finished
        first = r.first_token or now
        prompt_logprobs = [p and TokenLogprob.of(p) for p in r.prompt_logprobs]
        return GenerationOutput(
            seq_id=r.id, index=r.index, text="".join(self._output.text_parts), token_ids=list(r.output),
            prompt_length=len(r.prompt), decoded_length=len(r.output), cached_tokens=r.cached_tokens,
            queue_time=max((r.started or now) - r.arrival, 0.0), prompt_time=max(first - (r.started or first), 0.0),
            decode_time=max(now - first, 0.0), finish_reason=r.finish_reason or "",
            logprobs=None if r.params.logprobs is None else [TokenLogprob.of(p) for p in r.logprobs],
            prompt_logprobs=None if r.params.prompt_logprobs is None else prompt_logprobs,
        )  # fmt: skip

    def __del__(self) -> None:
        if not self._output.ended:
            self.cancel()


def copied(error: Exception) -> Exception:
    """A copy of an exception that several requests or readers share, with its cause and traceback.

    Each raise of one object adds the reader's frames to its traceback.
    """
    copy = type(error).__new__(type(error), *error.args)  # __init__ may want other arguments
    copy.__dict__.update(error.__dict__)
    copy.__cause__ = error.__cause__
    return copy.with_traceback(error.__traceback__)
