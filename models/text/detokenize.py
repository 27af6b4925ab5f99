"""Tokens to text while they come: never half a character, never a part of a stop text."""

import codecs
import re
from collections.abc import Container

from llmrs.models.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one answer. What `push` and `flush` give, joined, does not depend on how the tokens are split.

    It is what `tokenizers` decodes the ids to, after other tokens: an answer goes on with its prompt, so the space
    that SentencePiece begins a word with stays also before the first one. Bytes that are not UTF-8 become U+FFFD.
    Control tokens have no text, unless `skip_special_tokens` is false.

    The answer ends before the stop text that is complete first; of those that are complete at the same character,
    before the longest. `stopped` is that text, once there is one. Control tokens count with their text, also where
    they are skipped, as for transformers' stop_strings. A stop text has to be complete after the first `minimum`
    tokens, and may begin in them, as in vLLM.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: tuple[str, ...] = (),
        minimum: int = 0,
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._pieces, self._written = tokenizer.pieces(skip_special_tokens), tokenizer.pieces(False)
        self._hidden: Container[int] = tokenizer.control if skip_special_tokens else ()
        self._errors = tokenizer.errors
        self._bytes = b""  # of a character that is not complete
        self._minimum = minimum
        self._stops = StopTexts(stops) if stops else None

    @property
    def stopped(self) -> str | None:
        return None if self._stops is None else self._stops.found

    def push(self, token: int) -> str:
        """The text that is certain now."""
        piece = self._pieces[token]
        text = piece if isinstance(piece, str) and not self._bytes else self._decode(piece)
        if self._stops is None:
            return text
        self._minimum -= 1
        hidden = token in self._hidden
        if hidden:
            written = self._written[token]
            text = written if isinstance(written, str) else written.decode(errors="replace")
        return self._stops.add(text, hidden=hidden, early=self._minimum >= 0)

    def flush(self) -> str:
        """What was held back. For the end of the answer."""
        text = self._bytes.decode(errors=self._errors)
        self._bytes = b""
        if self._stops is None:
            return text
        return self._stops.add(text, early=self._minimum >= 0) + self._stops.rest()

    def _decode(self, piece: str | bytes) -> str:
        """The characters that are complete with this."""
        data = self._bytes + (piece.encode() if isinstance(piece, str) else piece)
        text, count = codecs.utf_8_decode(data, self._errors, False)
        self._bytes = data[count:]
        return text


class StopTexts:
    """Looks for stop texts in a text that grows, and holds back what could begin one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.found: str | None = None
        self._begin = re.compile("|".join({re.escape(stop[0]) for stop in stops}))
        self._held = ""
        self._spans: list[tuple[int, int]] = []  # of the held text, that are not shown
        self._early = 0  # characters of the held text that don't complete a stop text

    def add(self, text: str, *, hidden: bool = False, early: bool = False) -> str:
        """The text that is certain now. `hidden` text is looked at and not shown; `early` text completes no stop."""
        if self.found is not None or not text:
            return ""
        if not self._held and not self._begin.search(text):  # the usual case
            return "" if hidden else text
        if hidden:
            self._spans.append((len(self._held), len(self._held) + len(text)))
        self._held += text
        if early:
            self._early = len(self._held)
        elif (cut := self._look()) is not None:
            return self._shown(cut)
        return self._shown(len(self._held) - max(_overlap(self._held, s) for s in self.stops))

    def rest(self) -> str:
        """What is held back still."""
        return "" if self.found is not None else self._shown(len(self._held))

    def _look(self) -> int | None:
        """Where the answer ends."""
        text, found = self._held, []
        for stop in self.stops:
            at = text.find(stop, max(0, self._early - len(stop) + 1))
            if at >= 0:
                found.append((at + len(stop), at, stop))
        if not found:
            return None
        _, cut, self.found = min(found)
        return cut

    def _shown(self, end: int) -> str:
        """Takes so many characters off what is held; those that are shown."""
        text, self._held = self._held[:end], self._held[end:]
        self._early = max(0, self._early - end)
        if not self._spans:
            return text
        spans, shown, at = self._spans, [], 0
        for a, b in spans:
            shown.append(text[at:a])
            at = b
        self._spans = [(max(0, a - end), b - end) for a, b in spans if b > end]
        return "".join([*shown, text[at:]])


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop text."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0
