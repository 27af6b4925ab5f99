"""One request's answer as it grows: written by the engine's thread, read by any other."""

import os
import queue
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, Protocol, Self

from llmrs.core.errors import EngineClosedError, RequestError
from llmrs.core.request import Request
from llmrs.models.text.detokenize import Detokenizer
from llmrs.output import GenerationOutput, TokenLogprob

Cancel = Callable[[Request, str], None]
PromptProgress = Callable[[int, int], object]  # tokens of the prompt done, and all; False cancels the request
_process = os.getpid()  # kept, because a system call for each token would cost more than the token


def _note_fork() -> None:
    global _process
    _process = os.getpid()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_note_fork)


class Sink:
    """Turns a request's tokens into text and hands it over. `text` is what has been handed over so far."""

    def __init__(self, detokenizer: Detokenizer, stop: Cancel, notify: Callable[[], None] = lambda: None) -> None:
        self.detokenizer, self.stop, self.notify = detokenizer, stop, notify
        self.pieces: queue.SimpleQueue[str | int | None] = queue.SimpleQueue()  # int: prompt tokens; None: the end
        self.ended = False
        self.parts: list[str] = []

    def update(self, request: Request, tokens: list[int]) -> None:
        """Called by the engine's thread after each commit, and when the request ends without a token."""
        if self.ended:
            return
        if len(request.output) == len(tokens):  # up to the first token
            self._hand_over(request.computed_tokens)
        for token in tokens:
            self._put(self.detokenizer.add(token))
        if request.finish_reason is not None:
            self._put(self.detokenizer.flush())
        if self.detokenizer.stopped is not None:
            if request.finish_reason == "length":  # on the token that completes the stop string
                request.finish_reason = "stop"
            self.stop(request, "stop")  # unless it has ended, comes back here with no tokens
        if request.finish_reason is not None and not self.ended:
            self.ended = True
            self._hand_over(None)

    def _put(self, text: str) -> None:
        if text:
            self.parts.append(text)
            self._hand_over(text)

    def _hand_over(self, piece: str | int | None) -> None:
        self.pieces.put(piece)
        self.notify()


class Stream(Iterator[str]):
    """An iterator of text. Ends when the answer does; raises what ended it when that was an error.

    `with stream:` and `close()` cancel a request that has not ended. So does an exception, such as Ctrl-C, that comes
    while the stream waits, and so does the stream's deletion. The engine is not closed while it has a stream that is
    in use. Threads that read one stream share its pieces, and each gets the end.
    """

    def __init__(
        self,
        request: Request,
        sink: Sink,
        cancel: Callable[[Request], None],
        progress: PromptProgress | None = None,
        engine: object = None,
    ) -> None:
        """`engine` is kept alive until the stream is read to its end or closed."""
        self._request, self._sink, self._cancel, self._progress = request, sink, cancel, progress
        self._pieces, self._drained = sink.pieces, False
        self._engine, self._process = engine, _process

    @property
    def request(self) -> Request:
        """What was submitted. For the engine."""
        return self._request

    @property
    def seq_id(self) -> int:
        return self._request.id

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self._request.prompt)

    @property
    def finished(self) -> bool:
        """Whether the answer is complete; parts of it may still wait to be read."""
        return self._sink.ended

    @property
    def token_count(self) -> int:
        """Tokens of the answer so far."""
        return len(self._request.output)

    def __iter__(self) -> "Stream":
        return self

    def take(self, *, block: bool = True) -> str:
        """The next piece of text. Raises StopIteration at the end, and queue.Empty where it would have to wait."""
        if self._process != _process:
            raise EngineClosedError("the stream belongs to another process", "read it in the process that started it")
        interrupted = True
        try:
            while not self._drained:
                piece = self._pieces.get(block)
                if isinstance(piece, str):
                    interrupted = False
                    return piece
                self._note(piece)
            interrupted = False
        except queue.Empty:
            interrupted = False
            raise
        finally:
            if interrupted:  # by what `progress` raised, Ctrl-C, or another exception in a signal handler
                self.cancel()
        if self._request.error is not None:
            raise copied(self._request.error)
        raise StopIteration

    __next__ = take

    def _note(self, piece: int | None) -> None:
        """Takes in what is not text: how many tokens of the prompt are computed, or the end."""
        if piece is None:
            self._pieces.put(None)  # for other readers that wait
            self._drained, self._engine = True, None
        elif self._progress is not None and self._progress(piece, self.prompt_length) is False:
            self.cancel()

    def cancel(self) -> None:
        """Ends the answer where it is, after the step under way. May be called from any thread, more than once."""
        self._cancel(self._request)

    def close(self) -> None:
        """Cancels what has not ended, and needs the engine no more. May be called again."""
        self.cancel()
        self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise RequestError("a Stream can't be pickled or copied", "pickle what output() gives")

    def result(self) -> GenerationOutput:
        """Waits for the end; the whole answer. Raises what ended it when that was an error."""
        for _ in self:
            pass
        return self.output()

    def output(self) -> GenerationOutput:
        """The answer so far, without waiting; its `finish_reason` is "" while it grows."""
        r, now = self._request, self._request.finished
        first = r.first_token or now
        return GenerationOutput(
            seq_id=r.id,
            text="".join(self._sink.parts),
            token_ids=list(r.output),
            finish_reason=r.finish_reason or "",
            prompt_length=len(r.prompt),
            decoded_length=len(r.output),
            cached_tokens=r.cached_tokens,
            queue_time=max((r.started or now) - r.arrival, 0.0),
            prompt_time=max(first - (r.started or first), 0.0),
            decode_time=max(now - first, 0.0),
            index=r.index,
            logprobs=None if r.params.logprobs is None else [TokenLogprob.of(p) for p in r.logprobs],
            prompt_logprobs=None
            if r.params.prompt_logprobs is None
            else [p and TokenLogprob.of(p) for p in r.prompt_logprobs],
        )

    def __del__(self) -> None:
        if not self._sink.ended:
            self.cancel()


class Cancellable(Protocol):
    def cancel(self) -> None: ...


def cancelling(streams: Iterable[Cancellable]) -> ExitStack:
    """A context that cancels these streams at its end, however it ends, unless its `pop_all` is called."""
    stack = ExitStack()
    for stream in streams:
        stack.callback(stream.cancel)
    return stack


def copied(error: Exception) -> Exception:
    """An exception to raise in place of one that several requests or readers share, with its cause and traceback.

    Raising one object more than once adds to its traceback, which then holds the frames of every reader.
    """
    copy = type(error).__new__(type(error), *error.args)  # __init__ may want other arguments
    copy.__dict__.update(error.__dict__)
    copy.__cause__ = error.__cause__
    return copy.with_traceback(error.__traceback__)
