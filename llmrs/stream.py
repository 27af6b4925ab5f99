"""One request's answer as it grows: written by the engine's thread, read by any other."""

import queue
from collections.abc import Callable, Iterator

from llmrs.core.request import GenerationOutput, Request
from llmrs.models.detokenize import Detokenizer

Cancel = Callable[[Request, str], None]


class Sink:
    """Turns a request's tokens into text and hands it over. `text` is what has been handed over so far."""

    def __init__(self, detokenizer: Detokenizer, stop: Cancel) -> None:
        self.detokenizer, self.stop = detokenizer, stop
        self.pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # None: the end
        self.ended = False
        self.parts: list[str] = []

    def update(self, request: Request, tokens: list[int]) -> None:
        """Called by the engine's thread after each commit, and when the request ends without a token."""
        if self.ended:
            return
        for token in tokens:
            self._put(self.detokenizer.push(token))
        if self.detokenizer.stopped is not None:
            if request.finish_reason == "length":  # on the token that completes the stop string
                request.finish_reason = "stop"
            self.stop(request, "stop")  # unless it has ended, comes back here with no tokens
        elif request.finish_reason is not None:
            self._put(self.detokenizer.flush())
        if request.finish_reason is not None and not self.ended:
            self.ended = True
            self.pieces.put(None)

    def _put(self, text: str) -> None:
        if text:
            self.parts.append(text)
            self.pieces.put(text)


class Stream(Iterator[str]):
    """An iterator of text. Ends when the answer does; raises what ended it when that was an error.

    A stream that is given up (`cancel()`, or no reference left) stops its request.
    """

    def __init__(self, request: Request, sink: Sink, cancel: Callable[[Request], None]) -> None:
        self._request, self._sink, self._cancel = request, sink, cancel
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
        piece = None if self._drained else self._sink.pieces.get()
        if piece is not None:
            return piece
        self._drained = True
        if self._request.error is not None:
            raise self._request.error
        raise StopIteration

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
        )

    def __del__(self) -> None:
        if not self._sink.ended:
            self.cancel()
