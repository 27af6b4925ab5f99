"""Prompts as users give them: one text split at '|', a file, or standard input."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from llmrs.core.errors import ConfigError

SUFFIXES = (".txt", ".jsonl")  # of a single word that must be a file, there or not


def expand(text: str, folder: Path | None = None) -> list[str]:
    """The prompts that `text` stands for. A file is looked for here, then in `folder`. Raises ConfigError."""
    if text == "-":
        return _lines("standard input", sys.stdin, jsonl=False)
    for path in (text, *([str(folder / text)] if folder else [])):
        if os.path.isfile(path):
            return read(Path(path))
    if text.endswith(SUFFIXES) and len(text.split()) == 1:
        raise ConfigError(f"prompts: there is no file {text!r}", "give a file with one prompt a line")
    found = [p for part in text.split("|") if (p := part.strip())]
    if not found:
        raise ConfigError("prompts: there is no text in it", "give prompts, with | between them")
    return found


def read(path: Path) -> list[str]:
    """One prompt a line; in a .jsonl file a JSON string, or an object with "prompt"."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            return _lines(str(path), file, jsonl=path.suffix == ".jsonl")
    except OSError as error:
        raise ConfigError(f"prompts: {path} can't be read: {error.strerror}", "is it a text file?") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts: {path} is not UTF-8 text", "give a text file with one prompt a line") from error


def _lines(name: str, lines: Iterable[str], *, jsonl: bool) -> list[str]:
    full = [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
    if not full:
        raise ConfigError(f"prompts: {name} holds no prompts", "it needs one prompt a line")
    return [_from_json(name, n, line) if jsonl else line for n, line in full]


def _from_json(name: str, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    value = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(value, str):
        hint = 'each line is a JSON string, or an object such as {"prompt": "Hi"}'
        raise ConfigError(f"prompts: {name}, line {number}: no prompt", hint)
    return value
