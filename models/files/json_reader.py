"""Reads JSON that is not trusted: an object from a file, and typed access to its fields."""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrs.core.errors import ModelError
from llmrs.models.files.untrusted import COMPLETE, JSON_LIMIT, read_text

LARGE = 2**31  # no size in a config is larger
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError."""
    try:
        data = json.loads(read_text(path, JSON_LIMIT))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}", COMPLETE) from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds no JSON object", COMPLETE)
    return data


class Fields:
    """Typed access to a JSON object; every error names the file, the field, the value and what is allowed."""

    def __init__(self, path: Path, data: Mapping[str, Any]) -> None:
        self.path, self.data = path, data

    def error(self, name: str, allowed: str) -> ModelError:
        return ModelError(
            f"{self.path}: {name} is {SHORT.repr(self.data.get(name))}; it must be {allowed}",
            "is the file complete, and of a model that llmrs supports?",
        )

    def integer(self, name: str, default: int | None = None, low: int = 1) -> int:
        """`default` stands for a field that is absent. As in `number` and `boolean`, null is refused."""
        value = self.data.get(name, default)
        if type(value) is not int or not low <= value < LARGE:
            raise self.error(name, f"a whole number from {low}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.data.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LARGE:  # NaN fails
            raise self.error(name, "a positive number")
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        value = self.data.get(name, default)
        if type(value) is not bool:
            raise self.error(name, "true or false")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self.data.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, "an object")
        return value or {}

    def must_be(self, name: str, *allowed: Any) -> None:
        """Refuses a field whose other values mean something that is not implemented."""
        if self.data.get(name) not in (None, *allowed):
            raise self.error(name, " or ".join(map(repr, allowed or (None,))) + ": the rest is not implemented")
