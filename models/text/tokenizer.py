"""Text to token ids and back, through the `tokenizers` library."""

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from llmrs.core.errors import ModelError, RequestError
from llmrs.models.files.json_reader import SHORT
from llmrs.models.files.untrusted import MIB, inside, read_text
from llmrs.models.text.control import add_control
from llmrs.models.text.conversation import checked
from llmrs.models.text.decoder import TokenDecoder
from llmrs.models.text.plain import BOUNDARY, HIDDEN, plain
from llmrs.models.text.specials import read_settings, special_tokens

MOST_WORDS = 2**24  # of a vocabulary; today's largest have 262,144
LIMIT = 256 * MIB  # a vocabulary of 256,000 words takes about 35
HINT = "is the file complete? It is what `tokenizers` writes"
SPACE = "▁"  # SentencePiece's mark for a space


class Tokenizer:
    """A model's tokenizer. Its bytes are those of the text: `token_bytes` of an answer's ids, joined, is the answer."""

    def __init__(self, inner: tokenizers.Tokenizer, settings: dict[str, Any], path: Path) -> None:
        """`settings` is what tokenizer_config.json holds. Raises ModelError."""
        inner.no_truncation()  # a file may ask for it, and a prompt would lose its end without a word
        inner.no_padding()
        add_control(inner, settings)
        self.inner = inner
        self.added = inner.get_added_tokens_decoder()
        self.specials = special_tokens(settings, path, inner.token_to_id)
        eos = self.specials.get("eos")
        eos_id = self.id_of(eos) if eos is not None else None
        if eos is not None and eos_id is None:
            raise ModelError(f"{path}: the end-of-sequence token {eos!r} is not in the vocabulary", HINT)
        self.eos_ids = () if eos_id is None else (eos_id,)
        self._decoder = TokenDecoder(inner, path)
        self.errors = self._decoder.errors  # how bytes are decoded that are not UTF-8
        special = [t.content for t in self.added.values() if t.special]
        skipped = frozenset(i for content in special if (i := self.id_of(content)) is not None)
        self.control_texts = frozenset(c for c in special if c.strip(f"{SPACE} \n\t"))  # white space is text
        self.control = frozenset(i for content in self.control_texts if (i := self.id_of(content)) is not None)
        self._written = _Pieces(self._piece)
        self._spoken = _Pieces(lambda token: "" if token in skipped else self._written[token])

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
        """Ids of text in which nothing is a control token; other added tokens are parsed. If it is not `first`, an
        added token stands before it, and SentencePiece puts no space there. Raises RequestError for U+FDD0, which
        marks that place, and for U+FDD1.
        """
        if BOUNDARY in text or HIDDEN in text:
            raise RequestError("the text holds U+FDD0 or U+FDD1, which are no characters", "leave them out")
        if first:
            return self._plain.encode(checked(text), add_special_tokens=False).ids
        return self._plain.encode(BOUNDARY + checked(text), add_special_tokens=False).ids[1:]

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Ids of text that holds all its control tokens. Where the mark stands between two of them, and where one
        comes about only by normalizing, there is plain text. The mark goes.
        """
        encoding = self.inner.encode(checked(text), add_special_tokens=False)
        ids: list[int] = []
        begin = at = 0  # of the text since the last control token: in the ids, and in the text
        for n, (token, span) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            if token in self.control and self._is_written(token, text, span, mark):
                ids += self._between(text[at : span[0]], encoding.ids[begin:n], mark, first=at == 0)
                ids.append(token)
                begin, at = n + 1, span[1]
        return ids + self._between(text[at:], encoding.ids[begin:], mark, first=at == 0)

    def _is_written(self, token: int, text: str, span: tuple[int, int], mark: str) -> bool:
        """Whether the text holds this control token as it is, and no mark after it if it is a single character."""
        content = self.added[token].content.strip()
        return text[slice(*span)].strip() == content and not (len(content) == 1 and text.startswith(mark, span[1]))

    def _between(self, text: str, ids: list[int], mark: str, *, first: bool) -> list[int]:
        """The ids of text between control tokens: `ids`, unless it is marked or they hold one nevertheless."""
        if mark not in text and self.control.isdisjoint(ids):
            return ids
        return self.encode_plain(text.replace(mark, ""), first=first) if text else []

    def token_bytes(self, token: int, *, skip_special_tokens: bool = True) -> bytes:
        """What a token adds to the text; nothing for ids that are none, and for control tokens if they are skipped."""
        piece = self.pieces(skip_special_tokens)[token]
        return piece.encode() if isinstance(piece, str) else piece

    def pieces(self, skip_special_tokens: bool = True) -> Mapping[int, str | bytes]:
        """What each token adds to the text: bytes where they are not whole characters. Made as they are asked for."""
        return self._spoken if skip_special_tokens else self._written

    def _piece(self, token: int) -> str | bytes:
        word = self.inner.id_to_token(token)
        data = b"" if word is None else self._decoder(word)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        return plain(self.inner, self.control_texts)


class _Pieces(dict[int, str | bytes]):
    """Made once for each token that comes."""

    def __init__(self, make: Callable[[int], str | bytes]) -> None:
        self._make = make

    def __missing__(self, token: int) -> str | bytes:
        piece = self[token] = self._make(token)
        return piece


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
