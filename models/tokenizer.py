"""Text to token ids and back, through the `tokenizers` library."""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from llmrs.core.errors import ModelError, RequestError
from llmrs.models.conversation import checked
from llmrs.models.fields import SHORT
from llmrs.models.files import MIB, inside, read_text
from llmrs.models.specials import read_settings, special_tokens

MOST_WORDS = 2**24  # of a vocabulary; today's largest have 262,144
LIMIT = 256 * MIB  # a vocabulary of 256,000 words takes about 35
HINT = "is the file complete? It is what `tokenizers` writes"
SPACE = "▁"  # SentencePiece's mark for a space
BOUNDARY = "\ufdd0"  # a noncharacter: Unicode keeps it for the inside of programs
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in byte-level vocabularies: printable ones for themselves, others from 256 on.

    Source: GPT-2's vocabulary.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


LETTERS = _byte_letters()


class Tokenizer:
    """A model's tokenizer. Its bytes are those of the text: `token_bytes` of an answer's ids, joined, is the answer."""

    def __init__(self, inner: tokenizers.Tokenizer, settings: dict[str, Any], path: Path) -> None:
        """`settings` is what tokenizer_config.json holds. Raises ModelError."""
        inner.no_truncation()  # a file may ask for it, and a prompt would lose its end without a word
        inner.no_padding()
        self.inner = inner
        self.added = inner.get_added_tokens_decoder()
        self.specials = special_tokens(settings, path, inner.token_to_id)
        eos = self.specials.get("eos")
        eos_id = self.id_of(eos) if eos is not None else None
        if eos is not None and eos_id is None:
            raise ModelError(f"{path}: the end-of-sequence token {eos!r} is not in the vocabulary", HINT)
        self.eos_ids = () if eos_id is None else (eos_id,)
        self._byte_level = _is_byte_level(inner, path)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """From tokenizer.json, and tokenizer_config.json where there is one. Raises ModelError."""
        path = inside(folder, "tokenizer.json")
        text = read_text(path, LIMIT)
        return cls(_parse(text, path), read_settings(folder), path)

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to less than this; the model may have a few more that stand for nothing."""
        return self.inner.get_vocab_size()

    def id_of(self, token: str) -> int | None:
        return self.inner.token_to_id(token)

    def has(self, token: int) -> bool:
        return self.inner.id_to_token(token) is not None

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, in which control tokens are parsed, and one beginning-of-sequence if the model wants it.

        Raises RequestError for text that is not Unicode (a lone surrogate).
        """
        ids = self.inner.encode(checked(text), add_special_tokens=True).ids
        doubled = len(ids) > 1 and ids[0] == ids[1] == self.inner.token_to_id(self.specials.get("bos") or "")
        return ids[1:] if doubled else ids

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of text that holds all its control tokens, as chat templates write it."""
        return self.inner.encode(checked(text), add_special_tokens=False).ids

    def encode_plain(self, text: str, *, first: bool = True) -> list[int]:
        """Ids of text in which nothing is a control token. If it is not `first`, an added token stands before it,
        and SentencePiece puts no space there. Raises RequestError for U+FDD0, which marks that place.
        """
        if BOUNDARY in text:
            raise RequestError("the text holds U+FDD0, which is no character", "leave it out")
        if first:
            return self._plain.encode(checked(text), add_special_tokens=False).ids
        return self._plain.encode(BOUNDARY + checked(text), add_special_tokens=False).ids[1:]

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Ids of text that holds all its control tokens. Where the mark stands between two of them, and where one
        comes about only by normalizing, there is plain text. The mark goes.
        """
        encoding = self.inner.encode(checked(text), add_special_tokens=False)
        ids: list[int] = []
        begin = at = 0  # of the text since the last added token: in the ids, and in the text
        for n, (token, span) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            if token in self.added and text[slice(*span)].strip() == self.added[token].content.strip():
                ids += self._between(text[at : span[0]], encoding.ids[begin:n], mark, first=at == 0)
                ids.append(token)
                begin, at = n + 1, span[1]
        return ids + self._between(text[at:], encoding.ids[begin:], mark, first=at == 0)

    def _between(self, text: str, ids: list[int], mark: str, *, first: bool) -> list[int]:
        """The ids of text between added tokens, which are `ids` unless it is marked or they hold one nevertheless."""
        if mark not in text and not any(i in self.added and self.added[i].content.strip() for i in ids):
            return ids
        return self.encode_plain(text.replace(mark, ""), first=first) if text else []

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text; nothing for control tokens and for ids that are none."""
        if token not in self._bytes:
            self._bytes[token] = self._token_bytes(token)
        return self._bytes[token]

    def _token_bytes(self, token: int) -> bytes:
        if token in self.added:
            return b"" if self.added[token].special else self.added[token].content.encode()
        word = self.inner.id_to_token(token) or ""
        if self._byte_level:
            whole = all(c in LETTERS for c in word)
            return bytes(LETTERS[c] for c in word) if whole else word.encode()
        byte = BYTE.fullmatch(word)
        return bytes([int(byte[1], 16)]) if byte else word.replace(SPACE, " ").encode()

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same without added tokens. Runs of white space stay: they are text, which some models add this way."""
        data = json.loads(self.inner.to_str())
        data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].strip(f"{SPACE} \n\t")]
        plain = tokenizers.Tokenizer.from_str(json.dumps(data))
        plain.add_special_tokens([BOUNDARY])
        return plain


def _parse(text: str, path: Path) -> tokenizers.Tokenizer:
    """Reads and tries a tokenizer. Raises ModelError for what the library refuses, and for what it panics on."""
    _check_ids(text, path)
    try:
        inner = tokenizers.Tokenizer.from_str(text)
        inner.encode("Hi", add_special_tokens=True)
    except BaseException as error:  # Rust's panics are none of Python's Exceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{path} holds no tokenizer: {error}", HINT) from error
    return inner


def _check_ids(text: str, path: Path) -> None:
    """Raises ModelError for an id that no model has: the library makes tables that are as long as the largest."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}", HINT) from error
    model = data.get("model") if isinstance(data, dict) else None
    words = model.get("vocab") if isinstance(model, dict) else None
    for word, number in words.items() if isinstance(words, dict) else ():
        if type(number) is not int or not 0 <= number < MOST_WORDS:
            raise ModelError(
                f"{path}: the id of {word[:50]!r} is {SHORT.repr(number)}; ids are 0 to {MOST_WORDS - 1}", HINT
            )


def _is_byte_level(inner: tokenizers.Tokenizer, path: Path) -> bool:
    """Whether words are spelled in LETTERS, or as SentencePiece does. Raises ModelError for other ways."""
    kinds = set(_types(json.loads(inner.decoder.__getstate__()) if inner.decoder else {}))
    if "ByteLevel" in kinds:
        return True
    if kinds & {"ByteFallback", "Metaspace"}:
        return False
    shown = ", ".join(sorted(kinds)) or "none"
    raise ModelError(f"{path}: its decoder ({shown}) is not supported", "byte-level and SentencePiece are")


def _types(decoder: dict[str, Any]) -> Iterator[str]:
    """The decoder's type, and those of its parts."""
    if "type" in decoder:
        yield decoder["type"]
    for part in decoder.get("decoders", ()):
        yield from _types(part)
