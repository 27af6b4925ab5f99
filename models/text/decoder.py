"""Decodes single tokens to bytes, with the decoder of tokenizer.json."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from llmrs.core.errors import ModelError

SUPPORTED = {"BPEDecoder", "ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}
SPELLING = SUPPORTED - {"Fuse", "Strip"}  # at least one is needed
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
EACH_BYTE = "llmrs.each_byte"  # error handler: one U+FFFD per invalid byte; "replace" merges several
codecs.register_error(EACH_BYTE, lambda e: ("\ufffd" * (e.end - e.start), e.end))  # type: ignore[attr-defined]
WORD = "a"  # context on both sides of a token: decoders treat the first and last token differently


# GPT-2's byte-level alphabet: printable bytes map to themselves, others to characters from 256 on
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF_LETTER = {chr(b): b for b in PRINTABLE}
BYTE_OF_LETTER |= {chr(256 + n): b for n, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}


class TokenDecoder:
    """Bytes of single tokens. Joined and decoded with `errors`, they equal the decoding of `tokenizers`.

    Two exceptions: tokens continue a text, so no space is stripped from the first word; and valid characters in a run
    of partly invalid bytes are kept, where ByteFallback drops the run, because a stream has already shown them.
    """

    def __init__(self, inner: tokenizers.Tokenizer, path: Path) -> None:
        """Raises ModelError for a decoder that can't decode tokens one by one."""
        parts = list(_parts(json.loads(inner.decoder.__getstate__()) if inner.decoder else {}))
        kinds = [part["type"] for part in parts]
        mixed = "ByteLevel" in kinds and not set(kinds) <= {"ByteLevel", "Fuse", "Strip"}
        across = any(_is_across(part, fused="Fuse" in kinds[:n]) for n, part in enumerate(parts))
        if mixed or across or not set(kinds) <= SUPPORTED or not set(kinds) & SPELLING:
            problem = f"{path}: its decoder ({', '.join(kinds) or 'none'}) is not supported"
            raise ModelError(problem, "byte-level, SentencePiece and WordPiece are")
        self._decoder = inner.decoder
        self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self.errors = EACH_BYTE if self._byte_fallback and not self._byte_level else "replace"
        if not self._byte_level:
            self._before = self._decoder.decode([WORD])
            self._after = self._decoder.decode([WORD, WORD])[len(self._before) :]

    def __call__(self, word: str) -> bytes:
        """Bytes of a vocabulary entry or added token."""
        if self._byte_level:
            whole = all(c in BYTE_OF_LETTER for c in word)
            return bytes(BYTE_OF_LETTER[c] for c in word) if whole else word.encode()
        if self._byte_fallback and (byte := BYTE.fullmatch(word)):
            return bytes([int(byte[1], 16)])
        text: str = self._decoder.decode([WORD, word, WORD])
        return text[len(self._before) : len(text) - len(self._after)].encode()


def _is_across(part: dict[str, Any], *, fused: bool) -> bool:
    """Whether a part replaces text across tokens, or strips the ends of single ones (a panic for short words)."""
    if part["type"] == "Replace":
        return fused and len(part["pattern"].get("String", "..")) > 1
    return part["type"] == "Strip" and not fused and part["stop"] > 0


def _parts(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps of a decoder, in order."""
    if decoder.get("type") == "Sequence":
        for part in decoder["decoders"]:
            yield from _parts(part)
    elif "type" in decoder:
        yield decoder
