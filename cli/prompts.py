"""Prompts as users give them: one text split at '|', a file, or standard input."""

import io
import json
import os
import sys
from pathlib import Path
from typing import BinaryIO

from llmrs.cli.outputs import STDIN
from llmrs.cli.streams import BOMS_UTF16
from llmrs.core.errors import ConfigError

SUFFIXES = (".txt", ".jsonl")  # of a single word that must be a file, there or not
LARGEST = 2**28  # bytes of a file of prompts
ONE_A_LINE = "give a text file with one prompt a line"


def expand(text: str, inputs: dict[str, str], folder: Path | None = None) -> list[str]:
    """The prompts that `text` stands for. A file is looked for here, then in `folder`, and added to `inputs`.

    Raises ConfigError.
    """
    if text == "-":
        inputs["the file of prompts on standard input"] = STDIN
        return _lines("standard input", _standard_input(), jsonl=False)
    for path in (text, *([str(folder / text)] if folder else [])):
        if text.strip() and os.path.exists(path):
            inputs[f"the file of prompts {path}"] = path
            return read(Path(path))
    if text.endswith(SUFFIXES) and len(text.split()) == 1:
        raise ConfigError(f"prompts: there is no file {text!r}", "give a file with one prompt a line")
    found = [p for part in text.split("|") if (p := part.strip())]
    if not found:
        raise ConfigError("prompts: there is no text in it", "give prompts, with | between them")
    return found


def read(path: Path) -> list[str]:
    """One prompt a line; in a .jsonl file a JSON string, or an object with "prompt"."""
    if path.is_dir():
        raise ConfigError(f"prompts: {path} is a folder", f"{ONE_A_LINE}; '{path} |' is the word itself")
    try:
        with path.open("rb") as file:  # a pipe will do
            text = decoded(str(path), bounded(str(path), file))
    except OSError as error:
        raise ConfigError(f"prompts: {path} can't be read: {error.strerror}", "is it a text file?") from error
    return _lines(str(path), text, jsonl=path.suffix == ".jsonl")


def _standard_input() -> str:
    name, binary = "standard input", getattr(sys.stdin, "buffer", None)
    try:
        return sys.stdin.read(LARGEST) if binary is None else decoded(name, bounded(name, binary))
    except OSError as error:
        raise ConfigError(f"prompts: {name} can't be read: {error.strerror}", "give a file or a pipe") from error


def bounded(name: str, file: BinaryIO) -> bytes:
    """All that is in it. Raises ConfigError where that is too much."""
    data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ConfigError(f"prompts: {name} is larger than {LARGEST} bytes", "split it into several files")
    return data


def decoded(name: str, data: bytes) -> str:
    """UTF-8, or UTF-16 as PowerShell writes it, without the byte-order mark. Raises ConfigError for other bytes."""
    try:
        text = data.decode("utf-16" if data[:2] in BOMS_UTF16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"prompts: {name}, line {line}, is not UTF-8 text", ONE_A_LINE) from error
    if "\0" in text:
        raise ConfigError(f"prompts: {name} holds zero bytes, as no text does", ONE_A_LINE)
    return text


def _lines(name: str, text: str, *, jsonl: bool) -> list[str]:
    """Every line is looked at before anything is answered. Raises ConfigError that names the first wrong one."""
    lines = io.StringIO(text, newline=None)  # ends of lines as in a text file; U+2028 is none
    full = [(n, stripped) for n, line in enumerate(lines, 1) if (stripped := line.strip())]
    if not full:
        raise ConfigError(f"prompts: {name} holds no prompts", "it needs one prompt a line")
    if not jsonl:
        return [line for _, line in full]
    found = [(n, *_from_json(line)) for n, line in full]
    wrong = [(n, problem) for n, _, problem in found if problem]
    if wrong:
        number, problem = wrong[0]
        others = f" (and so on: {len(wrong)} lines are wrong)" if len(wrong) > 1 else ""
        hint = 'each line is a JSON string, or an object such as {"prompt": "Hi"}'
        raise ConfigError(f"prompts: {name}, line {number}: {problem}{others}", hint)
    return [prompt for _, prompt, _ in found]


def _from_json(line: str) -> tuple[str, str]:
    """The prompt, or what is wrong."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return "", f"it is not JSON: {error}"
    if isinstance(value, dict):
        if "prompt" not in value:
            return "", 'the object has no "prompt"'
        value = value["prompt"]
    if not isinstance(value, str):
        return "", "the prompt is not text"
    return value, "" if value else "the prompt is empty"
