"""Tokens to text while they come: never half a character, never a part of a stop string."""

import codecs

from llmrs.models.tokenizer import Tokenizer


class Detokenizer:
    """The text of one answer. What `push` and `flush` give, joined, does not depend on how the tokens are split.

    Bytes that are not UTF-8 become U+FFFD. The answer ends before the stop string that is complete first; of those
    that are complete at the same character, before the longest. `stopped` is that string, once there is one. What
    the first `minimum` tokens say is not looked at for stop strings.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = (), minimum: int = 0) -> None:
        self.stops, self.minimum = stops, minimum
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # could begin a stop string

    def push(self, token: int) -> str:
        """The text that is certain now."""
        self.minimum -= 1
        return self._add(self._decoder.decode(self._tokenizer.token_bytes(token)), final=False)

    def flush(self) -> str:
        """What was held back. For the end of the answer."""
        return self._add(self._decoder.decode(b"", True), final=True)

    def _add(self, text: str, *, final: bool) -> str:
        if self.stopped is not None:
            return ""
        if self.minimum >= 0 or not self.stops:
            return text
        text = self._held + text
        found = [(at + len(s), at, s) for s in self.stops if (at := text.find(s)) >= 0]
        if found:
            _, cut, self.stopped = min(found)
            self._held = ""
            return text[:cut]
        keep = 0 if final else max((_overlap(text, s) for s in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
