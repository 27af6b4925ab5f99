"""Regular expressions from a checkpoint's config, which may be hostile: Python's matcher can take exponential time."""

import math
import re
import time
from collections.abc import Sequence
from typing import Generic, TypeVar

from llmrs.core.errors import ModelError

MAX_LENGTH = 10_000  # characters of a pattern
MAX_NAME = 200  # characters of a name that is matched
MAX_STEPS = 10**8  # of one match: seconds
MAX_SECONDS = 10.0  # of all matches
TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^]\\])*\]|\(\?[aiLmsux-]|.", re.DOTALL)
REPEATS = ("*", "+", "{")
T = TypeVar("T")


def compile_pattern(text: str) -> re.Pattern[str]:
    """Raises ValueError for a pattern that could take too long, or is none."""
    if len(text) > MAX_LENGTH or _steps(text) > MAX_STEPS:
        raise ValueError("it could take too long")
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no regular expression: {error}") from error


def _steps(text: str) -> float:
    """A bound on the ways to match a name: how to divide it among the repeats, times the choices of alternatives."""
    repeats, ways, alternatives, last = 0, 1, [1], ""
    for token in TOKEN.findall(text):
        if (last == ")" and token in REPEATS) or (token.startswith("(") and len(token) > 1):
            return math.inf  # a repeated group; flags, of which x changes the syntax
        if token == "(":
            alternatives.append(1)
        elif token == "|":
            alternatives[-1] += 1
        elif token == ")" and len(alternatives) > 1:
            ways *= alternatives.pop()
        elif token == "?" and last != "(":
            ways *= 2
        repeats += token in REPEATS
        last = token
        if repeats > 9 or ways > MAX_STEPS:
            return math.inf
    return ways * math.prod(alternatives) * math.comb(MAX_NAME + repeats, repeats)


class Patterns(Generic[T]):
    """Values by the pattern of their names."""

    def __init__(self, values: Sequence[tuple[re.Pattern[str], T]] = ()) -> None:
        self.values, self.seconds = values, 0.0

    def find(self, name: str) -> T | None:
        """The value of the first pattern that matches the beginning of the name. Raises ModelError."""
        if not self.values:
            return None
        began = time.thread_time()
        found = next((v for pattern, v in self.values if pattern.match(name)), None) if len(name) <= MAX_NAME else None
        self.seconds += time.thread_time() - began
        if self.seconds > MAX_SECONDS:
            raise ModelError(
                "the patterns of quantized modules take too long to match", "simplify those in config.json"
            )
        return found
