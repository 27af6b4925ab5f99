"""Streaming detokenization: yields complete characters only, and stops before stop strings."""

import codecs
import re
from collections.abc import Container

from llmrs.models.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one answer. The joined results of `add` and `flush` do not depend on how tokens are split.

    Text is decoded as a continuation of the prompt: SentencePiece's space before the first word is kept. Bytes that
    are not UTF-8 become U+FFFD. Special tokens are skipped if `skip_special_tokens`.

    The text ends before the stop string that completes first, the longest one on a tie; `stopped` is that string.
    Skipped special tokens match too, as for transformers' stop_strings. A stop string has to complete after the first
    `min_tokens` tokens, but may begin in them, as in vLLM.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop_strings: tuple[str, ...] = (), min_tokens: int = 0,
        *, skip_special_tokens: bool = True,
    ) -> None:  # fmt: skip
        self._pieces, self._all_pieces = tokenizer.pieces(skip_special_tokens), tokenizer.pieces(False)
        self._skipped: Container[int] = tokenizer.special_ids if skip_special_tokens else ()
        self._errors = tokenizer.errors
        self._pending = b""  # of an incomplete character
        self._min_tokens = min_tokens
        self._stop = StopStrings(stop_strings) if stop_strings else None

    @property
    def stopped(self) -> str | None:
        return None if self._stop is None else self._stop.matched

    def add(self, token: int) -> str:
        """The text that this token completes."""
        piece = self._pieces[token]
        text = piece if isinstance(piece, str) and not self._pending else self._decode(piece)
        if self._stop is None:
            return text
        self._min_tokens -= 1
        skipped = token in self._skipped
        if skipped:
            written = self._all_pieces[token]
            text = written if isinstance(written, str) else written.decode(errors="replace")
        return self._stop.add(text, skipped=skipped, early=self._min_tokens >= 0)

    def flush(self) -> str:
        """The remaining text, at the end of the answer."""
        text, self._pending = self._pending.decode(errors=self._errors), b""
        if self._stop is None:
            return text
        return self._stop.add(text, early=self._min_tokens >= 0) + self._stop.flush()

    def _decode(self, piece: str | bytes) -> str:
        data = self._pending + (piece.encode() if isinstance(piece, str) else piece)
        text, count = codecs.utf_8_decode(data, self._errors, False)
        self._pending = data[count:]
        return text


class StopStrings:
    """Searches growing text for stop strings. Holds back text that may begin one."""

    def __init__(self, stop_strings: tuple[str, ...]) -> None:
        self.stop_strings = stop_strings
        self.matched: str | None = None
        self._first_chars = re.compile("|".join({re.escape(stop[0]) for stop in stop_strings}))
        self._pending = ""
        self._skipped: list[tuple[int, int]] = []  # spans of the pending text that are matched, but not returned
        self._early = 0  # pending characters that can't complete a stop string

    def add(self, text: str, *, skipped: bool = False, early: bool = False) -> str:
        """The text that is now certain. `skipped` text is only matched; `early` text completes no stop string."""
        if self.matched is not None or not text:
            return ""
        if not self._pending and not self._first_chars.search(text):  # the usual case
            return "" if skipped else text
        if skipped:
            self._skipped.append((len(self._pending), len(self._pending) + len(text)))
        self._pending += text
        if early:
            self._early = len(self._pending)
        elif (end := self._match()) is not None:
            return self._take(end)
        return self._take(len(self._pending) - max(_overlap(self._pending, s) for s in self.stop_strings))

    def flush(self) -> str:
        return "" if self.matched is not None else self._take(len(self._pending))

    def _match(self) -> int | None:
        """Where the first complete stop string begins."""
        found = ((self._pending.find(s, max(0, self._early - len(s) + 1)), s) for s in self.stop_strings)
        _, begin, self.matched = min(((at + len(s), at, s) for at, s in found if at >= 0), default=(0, None, None))
        return begin

    def _take(self, end: int) -> str:
        """Removes pending[:end]; returns it without skipped spans."""
        text, self._pending = self._pending[:end], self._pending[end:]
        self._early = max(0, self._early - end)
        if not self._skipped:
            return text
        starts, ends = zip(*self._skipped, strict=True)
        self._skipped = [(max(0, a - end), b - end) for a, b in self._skipped if b > end]
        return "".join(text[a:b] for a, b in zip((0, *ends), (*starts, None), strict=True))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of the text that is a prefix of the stop string."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0
