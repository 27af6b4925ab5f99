"""A str that hides escape characters from chat templates, and the sandbox that keeps them hidden."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, pairwise
from typing import Any, SupportsIndex

from llmrs.models.text.sandbox import UNICODE_ESCAPE, Sandbox

QUERIES = (
    "__contains__", "__eq__", "__ge__", "__gt__", "__hash__", "__le__", "__len__", "__lt__", "__ne__",
    "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier",
    "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "rfind", "rindex", "startswith",
)  # fmt: skip
CASES = ("capitalize", "casefold", "lower", "swapcase", "title", "upper")


class EscapedStr(str):
    """A str with hidden escape characters. Comparison, search and length ignore them; slices keep those inside and
    at their ends. Other methods and C code see the raw text, so that no escape is lost, whatever a template does.
    """

    __slots__ = ("_clean", "_escape", "_positions")
    _clean: str
    _escape: str
    _positions: list[int]  # of each escape, in the clean text

    def __new__(cls, text: str, escape: str = "") -> "EscapedStr":
        new = super().__new__(cls, text)
        pieces = str.split(text, escape) if escape else [text]
        new._escape, new._clean, new._positions = escape, "".join(pieces), [*accumulate(map(len, pieces[:-1]))]
        return new

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        """Keeps the escape, which Python would write as \\uXXXX."""
        escaped = f"\\u{ord(self._escape):04x}" if self._escape else ""
        return UNICODE_ESCAPE.sub(lambda m: self._escape if m[0] == escaped else m[0], str.__repr__(self))

    def __add__(self, other: str) -> str:
        return hide_escapes(str.__add__(self, other), self._escape)

    def __iter__(self) -> Iterator[str]:
        return (self._slice(n, n + 1) for n in range(len(self._clean)))

    def __getitem__(self, index: SupportsIndex | slice) -> str:
        chosen = range(len(self._clean))[index]
        if isinstance(chosen, int):
            return self._slice(chosen, chosen + 1)
        if chosen.step == 1:
            return self._slice(chosen.start, max(chosen.start, chosen.stop))
        return hide_escapes("".join(self._slice(n, n + 1) for n in chosen), self._escape)

    def _slice(self, begin: int, end: int) -> str:
        """clean[begin:end], with the escapes inside and at its ends."""
        begin, end = begin + bisect_left(self._positions, begin), end + bisect_right(self._positions, end)
        return hide_escapes(str.__getitem__(self, slice(begin, end)), self._escape)

    def _slices(self, pieces: Iterable[str], gap: int = 0) -> list[str]:
        """Slices for successive pieces of the clean text, `gap` characters or white space apart."""
        slices, at = [], 0
        for piece in pieces:
            at = self._clean.find(piece, at)
            slices.append(self._slice(at, at + len(piece)))
            at += len(piece) + gap
        return slices

    def strip(self, chars: str | None = None, /) -> str:
        return self.lstrip(chars).rstrip(_clean(chars))

    def lstrip(self, chars: str | None = None, /) -> str:
        return self._slice(len(self._clean) - len(self._clean.lstrip(_clean(chars))), len(self._clean))

    def rstrip(self, chars: str | None = None, /) -> str:
        return self._slice(0, len(self._clean.rstrip(_clean(chars))))

    def removeprefix(self, prefix: str, /) -> str:
        return self._slice(len(self._clean) - len(self._clean.removeprefix(_clean(prefix))), len(self._clean))

    def removesuffix(self, suffix: str, /) -> str:
        return self._slice(0, len(self._clean.removesuffix(_clean(suffix))))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._slices(self._clean.split(_clean(sep), maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._slices(self._clean.rsplit(_clean(sep), maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        return self._slices(self._clean.splitlines(keepends))

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        before, middle, after = self._slices(self._clean.partition(_clean(sep)))
        return before, middle, after

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        before, middle, after = self._slices(self._clean.rpartition(_clean(sep)))
        return before, middle, after

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        pieces = self.split(old, count) if old else [str.replace(self, old, new, count)]
        return hide_escapes(str.join(new, pieces), self._escape)


def hide_escapes(text: str, escape: str) -> str:
    """The text as an EscapedStr if it contains `escape`."""
    return EscapedStr(text, escape) if escape and str.__contains__(text, escape) else text


def _clean(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_clean, value))
    return value._clean if isinstance(value, EscapedStr) else value


def _query(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def query(self: EscapedStr, *args: Any) -> Any:
        return method(self._clean, *map(_clean, args))

    query.__name__ = name
    return query


def _case(name: str) -> Callable[..., str]:
    method = getattr(str, name)

    def case(self: EscapedStr) -> str:
        text = method(self._clean)
        if len(text) != len(self._clean):
            return hide_escapes(method(self), self._escape)
        bounds = [0, *self._positions, len(text)]
        return hide_escapes(self._escape.join(text[a:b] for a, b in pairwise(bounds)), self._escape)

    case.__name__ = name
    return case


for _name in QUERIES:
    setattr(EscapedStr, _name, _query(_name))
for _name in CASES:
    setattr(EscapedStr, _name, _case(_name))


class EscapingSandbox(Sandbox):
    """Hides all `sentinels` but the first, in a template's input and in every string that it makes."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self._hidden(super().getattr(obj, attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return self._hidden(super().getitem(obj, argument))

    def concat(self, parts: Iterable[str]) -> str:
        """The output of a block, a macro or the whole template."""
        return self._hidden("".join(parts))

    def concatenate(self, *parts: Any) -> str:
        return self._hidden(super().concatenate(*parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        return self._hidden(super().call_binop(context, operator, left, right))

    def _charged(self, value: Any) -> Any:
        return self._hidden(super()._charged(value))

    def _hidden(self, value: Any) -> Any:
        for sentinel in self.sentinels[1:] if type(value) is str else ():
            value = hide_escapes(value, sentinel)
        return value
