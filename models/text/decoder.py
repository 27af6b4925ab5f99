"""What each token adds to a text, by the decoder that tokenizer.json names."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from llmrs.core.errors import ModelError

SUPPORTED = {"BPEDecoder", "ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}
SPELLING = SUPPORTED - {"Fuse", "Strip"}  # one of these says how words are spelled
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
EACH_BYTE = "llmrs.each_byte"  # for decoding: U+FFFD for each byte that is wrong, where "replace" gives one for several
codecs.register_error(EACH_BYTE, lambda e: ("\ufffd" * (e.end - e.start), e.end))  # type: ignore[attr-defined]
WORD = "a"  # stands before and after a token, so that it is neither the first nor the last


def _byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in byte-level vocabularies: printable ones for themselves, others from 256 on.

    Source: GPT-2's vocabulary.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


LETTERS = _byte_letters()


class TokenDecoder:
    """Bytes of single tokens. Joined, those of several are what the `tokenizers` library decodes them to.

    The tokens go on with a text: what decoders do to its first word (to take a space off) is left out. `errors` is
    how the joined bytes are decoded where they are not UTF-8. One difference remains: of bytes in a row, some of
    which are not UTF-8, ByteFallback loses all; here whole characters stay, since a stream has shown them by then.
    """

    def __init__(self, inner: tokenizers.Tokenizer, path: Path) -> None:
        """Raises ModelError for a decoder whose tokens can't be decoded one by one."""
        parts = list(_parts(json.loads(inner.decoder.__getstate__()) if inner.decoder else {}))
        _require_supported(parts, path)
        kinds = {part["type"] for part in parts}
        self._decoder = inner.decoder
        self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self.errors = EACH_BYTE if self._byte_fallback and not self._byte_level else "replace"
        if not self._byte_level:
            self._before = self._decoder.decode([WORD])
            self._after = self._decoder.decode([WORD, WORD])[len(self._before) :]

    def __call__(self, word: str) -> bytes:
        """What a token that is written so in the vocabulary, or as an added token, adds to the text."""
        if self._byte_level:
            whole = all(c in LETTERS for c in word)
            return bytes(LETTERS[c] for c in word) if whole else word.encode()
        if self._byte_fallback and (byte := BYTE.fullmatch(word)):
            return bytes([int(byte[1], 16)])
        text: str = self._decoder.decode([WORD, word, WORD])
        return text[len(self._before) : len(text) - len(self._after)].encode()


def _require_supported(parts: list[dict[str, Any]], path: Path) -> None:
    """Raises ModelError for parts that do more than to look at one token after the other."""
    kinds = [part["type"] for part in parts]
    mixed = "ByteLevel" in kinds and not set(kinds) <= {"ByteLevel", "Fuse", "Strip"}
    across = any(_is_across(part, fused="Fuse" in kinds[:n]) for n, part in enumerate(parts))
    if mixed or across or not set(kinds) <= SUPPORTED or not set(kinds) & SPELLING:
        shown = ", ".join(kinds) or "none"
        hint = "byte-level, SentencePiece and WordPiece are"
        raise ModelError(f"{path}: its decoder ({shown}) is not supported", hint)


def _is_across(part: dict[str, Any], *, fused: bool) -> bool:
    """Whether a part replaces what goes over several tokens, or strips the ends of single ones: that the library does
    for all but the shortest words, for which it panics.
    """
    if part["type"] == "Replace":
        return fused and len(part["pattern"].get("String", "..")) > 1
    return part["type"] == "Strip" and not fused and part["stop"] > 0


def _parts(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A decoder's parts, in the order in which they work."""
    if decoder.get("type") == "Sequence":
        for part in decoder["decoders"]:
            yield from _parts(part)
    elif "type" in decoder:
        yield decoder
