"""Text to token ids and back, through the `tokenizers` library."""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from llmrs.core.errors import ModelError, RequestError
from llmrs.models.files.json_reader import parse_json, short_repr
from llmrs.models.files.untrusted import MIB, inside, read_text
from llmrs.models.text.conversation import check_unicode
from llmrs.models.text.decoder import TokenDecoder
from llmrs.models.text.ordinary import BOUNDARY, HIDDEN, ordinary_tokenizer
from llmrs.models.text.special_tokens import HINT, read_settings, set_special, special_tokens

MAX_VOCAB_SIZE = 2**24  # today's largest have 262,144
MAX_FILE_BYTES = 256 * MIB  # 256,000 words take about 35
SPACE = "▁"  # SentencePiece


class Tokenizer:
    """A model's tokenizer. Joined `token_bytes` of generated ids are the generated text."""

    def __init__(self, inner: tokenizers.Tokenizer, settings: dict[str, Any], path: Path) -> None:
        """`settings`: contents of tokenizer_config.json. Raises ModelError."""
        inner.no_truncation()  # tokenizer.json may enable both
        inner.no_padding()
        set_special(inner, settings)
        self.inner = inner
        self.added = inner.get_added_tokens_decoder()
        self.special_tokens = special_tokens(settings, path, inner.token_to_id)  # bos, eos, ... -> text
        eos = self.special_tokens.get("eos")
        eos_id = self.token_to_id(eos) if eos is not None else None
        if eos is not None and eos_id is None:
            raise ModelError(f"{path}: the end-of-sequence token {eos!r} is not in the vocabulary", HINT)
        self.eos_ids = () if eos_id is None else (eos_id,)
        self._decoder = TokenDecoder(inner, path)
        self.errors = self._decoder.errors  # error handler for bytes that are not UTF-8
        special = [t.content for t in self.added.values() if t.special]
        skipped = self._ids(special)
        # white space is matched in untrusted text, too
        self.special_texts = frozenset(c for c in special if c.strip(f"{SPACE} \n\t"))
        self.special_ids = self._ids(self.special_texts)
        self._pieces = _Pieces(self._piece)
        self._pieces_without_special = _Pieces(lambda token: "" if token in skipped else self._pieces[token])

    def _ids(self, contents: Iterable[str]) -> frozenset[int]:
        return frozenset(i for content in contents if (i := self.token_to_id(content)) is not None)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """From tokenizer.json and, if present, tokenizer_config.json. Raises ModelError."""
        path = inside(folder, "tokenizer.json")
        return cls(_parse(path), read_settings(folder), path)

    @property
    def vocab_size(self) -> int:
        """Ids are below this; the model's vocab_size may be padded."""
        return self.inner.get_vocab_size()

    def token_to_id(self, token: str) -> int | None:
        return self.inner.token_to_id(token)

    def has(self, token: int) -> bool:
        return self.inner.id_to_token(token) is not None

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with special tokens parsed, and one BOS if the model uses it.

        Raises RequestError for a lone surrogate.
        """
        ids = self.inner.encode(check_unicode(text), add_special_tokens=True).ids
        doubled = len(ids) > 1 and ids[0] == ids[1] == self.inner.token_to_id(self.special_tokens.get("bos") or "")
        return ids[1:] if doubled else ids

    def encode_ordinary(self, text: str, *, first: bool = True) -> list[int]:
        """Ids of text without parsing special tokens. Other added tokens are parsed.

        Text that is not `first` follows an added token: SentencePiece adds no space before it. Raises RequestError
        for U+FDD0 and U+FDD1, which are used internally.
        """
        if BOUNDARY in text or HIDDEN in text:
            raise RequestError("the text holds U+FDD0 or U+FDD1, which are no characters", "leave them out")
        if first:
            return self._ordinary.encode(check_unicode(text), add_special_tokens=False).ids
        return self._ordinary.encode(BOUNDARY + check_unicode(text), add_special_tokens=False).ids[1:]

    def encode_escaped(self, text: str, escape: str) -> list[int]:
        """Ids of a rendered chat template with escaped user text. Removes the escapes.

        Between two special tokens, text with an escape, or that becomes a special token only by normalization, is
        encoded as ordinary text.
        """
        encoding = self.inner.encode(check_unicode(text), add_special_tokens=False)
        ids: list[int] = []
        begin = at = 0  # of the text after the last special token: in the ids, and in the text
        for n, (token, span) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            if token in self.special_ids and self._is_verbatim(token, text, span, escape):
                ids += self._between(text[at : span[0]], encoding.ids[begin:n], escape, first=at == 0)
                ids.append(token)
                begin, at = n + 1, span[1]
        return ids + self._between(text[at:], encoding.ids[begin:], escape, first=at == 0)

    def _is_verbatim(self, token: int, text: str, span: tuple[int, int], escape: str) -> bool:
        """Whether the text contains this special token verbatim, and unescaped if it is a single character."""
        content = self.added[token].content.strip()
        return text[slice(*span)].strip() == content and not (len(content) == 1 and text.startswith(escape, span[1]))

    def _between(self, text: str, ids: list[int], escape: str, *, first: bool) -> list[int]:
        if escape not in text and self.special_ids.isdisjoint(ids):
            return ids
        return self.encode_ordinary(text.replace(escape, ""), first=first) if text else []

    def token_bytes(self, token: int, *, skip_special_tokens: bool = True) -> bytes:
        """A token's contribution to the text; empty for unknown ids and skipped special tokens."""
        piece = self.pieces(skip_special_tokens)[token]
        return piece.encode() if isinstance(piece, str) else piece

    def pieces(self, skip_special_tokens: bool = True) -> Mapping[int, str | bytes]:
        """`token_bytes` of each token, as str if it is valid UTF-8. Filled lazily."""
        return self._pieces_without_special if skip_special_tokens else self._pieces

    def _piece(self, token: int) -> str | bytes:
        word = self.inner.id_to_token(token)
        data = b"" if word is None else self._decoder(word)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data

    @cached_property
    def _ordinary(self) -> tokenizers.Tokenizer:
        return ordinary_tokenizer(self.inner, self.special_texts)


class _Pieces(dict[int, str | bytes]):
    """Makes each value on first access."""

    def __init__(self, make: Callable[[int], str | bytes]) -> None:
        self._make = make

    def __missing__(self, token: int) -> str | bytes:
        piece = self[token] = self._make(token)
        return piece


def _parse(path: Path) -> tokenizers.Tokenizer:
    """Raises ModelError for huge ids, and for what `parse_tokenizer` refuses."""
    text = read_text(path, MAX_FILE_BYTES)
    data = parse_json(text, path)
    model = data.get("model") if isinstance(data, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    for word, number in vocab.items() if isinstance(vocab, dict) else ():
        if type(number) is not int or not 0 <= number < MAX_VOCAB_SIZE:  # tables are allocated up to the largest
            allowed = f"ids are 0 to {MAX_VOCAB_SIZE - 1}"
            raise ModelError(f"{path}: the id of {word[:50]!r} is {short_repr(number)}; {allowed}", HINT)
    return parse_tokenizer(text, path)


def parse_tokenizer(text: str, path: Path) -> tokenizers.Tokenizer:
    """Reads and tries the text of a tokenizer.json. Raises ModelError for errors and panics of the library."""
    try:
        inner = tokenizers.Tokenizer.from_str(text)
        inner.encode("Hi", add_special_tokens=True)
    except BaseException as error:  # a Rust panic is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{path} holds no tokenizer: {error}", HINT) from error
    return inner
