"""Untrusted JSON: reads an object from a file, with typed access to its fields."""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrs.core.errors import ModelError
from llmrs.models.files.untrusted import COMPLETE, JSON_LIMIT, read_text

MAX_INT = 2**31  # above every valid size
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
short_repr = _SHORT.repr  # for values in error messages


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError."""
    data = parse_json(read_text(path, JSON_LIMIT), path)
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds no JSON object", COMPLETE)
    return data


def parse_json(text: str, path: Path) -> Any:
    """Raises ModelError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}", COMPLETE) from error


class ConfigReader:
    """Typed access to a JSON object. Errors name the file, the field, its value and what is allowed.

    A default applies to a missing field only: null is an error.
    """

    def __init__(self, path: Path | str, data: Mapping[str, Any]) -> None:
        self.path, self.data = path, data

    def error(self, name: str, allowed: str) -> ModelError:
        return ModelError(
            f"{self.path}: {name} is {short_repr(self.data.get(name))}; it must be {allowed}",
            "is the file complete, and of a model that llmrs supports?",
        )

    def integer(self, name: str, default: int | None = None, low: int = 1) -> int:
        value = self.data.get(name, default)
        if type(value) is not int or not low <= value < MAX_INT:
            raise self.error(name, f"a whole number from {low}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.data.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MAX_INT:  # NaN fails
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
        """Refuses values that ask for an unsupported feature; null and missing are always allowed."""
        if self.data.get(name) not in (None, *allowed):
            raise self.error(name, " or ".join(map(repr, allowed or (None,))) + ": others are not implemented")
