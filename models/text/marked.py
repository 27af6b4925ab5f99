"""Text with marks in it, that looks to a template as it does without them."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, SupportsIndex

from llmrs.models.text.sandbox import Sandbox

ESCAPE = re.compile(r"\\(?:u[0-9a-f]{4}|.)")
QUESTIONS = (
    "__contains__", "__eq__", "__ge__", "__gt__", "__hash__", "__le__", "__len__", "__lt__", "__ne__",
    "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier",
    "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "rfind", "rindex", "startswith",
)  # fmt: skip
CASES = ("capitalize", "casefold", "lower", "swapcase", "title", "upper")


class Marked(str):
    """A text whose characters include marks. Comparisons, searches and lengths are those of the text without them;
    parts of it keep the marks in them and at their ends. Other methods, and everything that Python does to texts in
    C, work on the text with its marks: so none is lost, whatever a template does.
    """

    __slots__ = ("_clean", "_mark", "_places")
    _clean: str
    _mark: str
    _places: list[int]  # of each mark, where it would stand in the clean text

    def __new__(cls, text: str, mark: str = "") -> "Marked":
        made = super().__new__(cls, text)
        pieces = str.split(text, mark) if mark else [text]
        made._mark, made._clean, made._places = mark, "".join(pieces), []
        at = 0
        for piece in pieces[:-1]:
            at += len(piece)
            made._places.append(at)
        return made

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        """Python escapes the mark, which has to stay."""
        escaped = f"\\u{ord(self._mark):04x}" if self._mark else ""
        return ESCAPE.sub(lambda found: self._mark if found[0] == escaped else found[0], str.__repr__(self))

    def __add__(self, other: str) -> str:
        return viewed(str.__add__(self, other), self._mark)

    def __iter__(self) -> Iterator[str]:
        return (self._cut(n, n + 1) for n in range(len(self._clean)))

    def __getitem__(self, index: SupportsIndex | slice) -> str:
        chosen = range(len(self._clean))[index]
        if isinstance(chosen, int):
            return self._cut(chosen, chosen + 1)
        if chosen.step == 1:
            return self._cut(chosen.start, max(chosen.start, chosen.stop))
        return viewed("".join(self._cut(n, n + 1) for n in chosen), self._mark)

    def _cut(self, begin: int, end: int) -> str:
        """These characters of the clean text, and all marks between and beside them."""
        begin, end = begin + bisect_left(self._places, begin), end + bisect_right(self._places, end)
        return viewed(str.__getitem__(self, slice(begin, end)), self._mark)

    def _located(self, pieces: Iterable[str], gap: int = 0) -> list[str]:
        """Pieces of the clean text, which come in this order and so far apart: `gap`, or else white space."""
        found, at = [], 0
        for piece in pieces:
            at = self._clean.find(piece, at)
            found.append(self._cut(at, at + len(piece)))
            at += len(piece) + gap
        return found

    def strip(self, chars: str | None = None, /) -> str:
        return self.lstrip(chars).rstrip(_clean(chars))

    def lstrip(self, chars: str | None = None, /) -> str:
        return self._cut(len(self._clean) - len(self._clean.lstrip(_clean(chars))), len(self._clean))

    def rstrip(self, chars: str | None = None, /) -> str:
        return self._cut(0, len(self._clean.rstrip(_clean(chars))))

    def removeprefix(self, prefix: str, /) -> str:
        return self._cut(len(self._clean) - len(self._clean.removeprefix(_clean(prefix))), len(self._clean))

    def removesuffix(self, suffix: str, /) -> str:
        return self._cut(0, len(self._clean.removesuffix(_clean(suffix))))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(self._clean.split(_clean(sep), maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(self._clean.rsplit(_clean(sep), maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        return self._located(self._clean.splitlines(keepends))

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, after = self._located(self._clean.partition(_clean(sep)))
        return before, found, after

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, after = self._located(self._clean.rpartition(_clean(sep)))
        return before, found, after

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        pieces = self.split(old, count) if old else [str.replace(self, old, new, count)]
        return viewed(str.join(new, pieces), self._mark)


def viewed(text: str, mark: str) -> str:
    """The text, with its marks out of sight."""
    return Marked(text, mark) if mark and str.__contains__(text, mark) else text


def _clean(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_clean, value))
    return value._clean if isinstance(value, Marked) else value


def _question(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def answered(self: Marked, *args: Any) -> Any:
        return method(self._clean, *map(_clean, args))

    answered.__name__ = name
    return answered


def _case(name: str) -> Callable[..., str]:
    method = getattr(str, name)

    def changed(self: Marked) -> str:
        text = method(self._clean)
        if len(text) != len(self._clean):
            return viewed(method(self), self._mark)
        places = [0, *self._places, len(text)]
        return viewed(self._mark.join(text[a:b] for a, b in pairwise(places)), self._mark)

    changed.__name__ = name
    return changed


for _name in QUESTIONS:
    setattr(Marked, _name, _question(_name))
for _name in CASES:
    setattr(Marked, _name, _case(_name))


class MarkedSandbox(Sandbox):
    """A sandbox in which a template never sees the marks that `allow` names, but for the first one: in what it is
    given, and in all that it makes.
    """

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self._viewed(super().getattr(obj, attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return self._viewed(super().getitem(obj, argument))

    def concat(self, parts: Iterable[str]) -> str:
        """What a block, a macro or the whole template writes."""
        return self._viewed("".join(parts))

    def concatenate(self, *parts: Any) -> str:
        return self._viewed(super().concatenate(*parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        return self._viewed(super().call_binop(context, operator, left, right))

    def _measured(self, value: Any) -> Any:
        return self._viewed(super()._measured(value))

    def _viewed(self, value: Any) -> Any:
        for mark in self.marks[1:] if type(value) is str else ():
            value = viewed(value, mark)
        return value
