"""One request's answer as it grows: written by the engine's thread, read by any other."""

import queue
from collections.abc import Callable, Iterator

from llmrs.core.request import Request
from llmrs.models.detokenize import Detokenizer
from llmrs.output import GenerationOutput, TokenLogprob

Cancel = Callable[[Request, str], None]
PromptProgress = Callable[[int, int], object]  # tokens of the prompt done, and all; False cancels the request


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
            self._put(self.detokenizer.push(token))
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

    A stream that is given up (`cancel()`, or no reference left) stops its request.
    """

    def __init__(
        self, request: Request, sink: Sink, cancel: Callable[[Request], None], progress: PromptProgress | None = None
    ) -> None:
        self._request, self._sink, self._cancel, self._progress = request, sink, cancel, progress
        self._drained = False

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

    def __next__(self) -> str:
        return self.take()

    def take(self, *, block: bool = True) -> str:
        """The next piece of text. Raises StopIteration at the end, and queue.Empty where it would have to wait."""
        while not self._drained:
            piece = self._sink.pieces.get(block)
            if isinstance(piece, str):
                return piece
            if isinstance(piece, int):
                self._report(piece)
            self._drained = piece is None
        if self._request.error is not None:
            raise self._request.error
        raise StopIteration

    def _report(self, done: int) -> None:
        if self._progress is not None and self._progress(done, self.prompt_length) is False:
            self.cancel()

    def cancel(self) -> None:
        """Ends the answer where it is. May be called from any thread, more than once."""
        self._cancel(self._request)

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
