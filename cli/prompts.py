"""Prompts: text split at '|', a file, or standard input."""

import io
import json
import os
import sys
from pathlib import Path
from typing import BinaryIO

from llmrs.cli.outputs import STDIN
from llmrs.cli.streams import UTF16_BOMS
from llmrs.core.errors import ConfigError

SUFFIXES = (".txt", ".jsonl")  # a single word with one of them must be an existing file
MAX_BYTES = 2**28
TEXT_FILE = "give a text file with one prompt per line"
JSONL_FILE = 'each line is a JSON string, or an object such as {"prompt": "Hi"}'


def expand(text: str, inputs: dict[str, str], folder: Path | None = None) -> list[str]:
    """The prompts in `text`. A file is looked for in the current folder, then in `folder`, and added to `inputs`.

    Raises ConfigError.
    """
    if text == "-":
        inputs["the file of prompts on standard input"] = STDIN
        return _parse("standard input", _read_stdin(), jsonl=False)
    for path in (text, *([str(folder / text)] if folder else [])):
        if text.strip() and os.path.exists(path):
            inputs[f"the file of prompts {path}"] = path
            return _read_file(Path(path))
    if text.endswith(SUFFIXES) and len(text.split()) == 1:
        raise ConfigError(f"prompts: there is no file {text!r}", TEXT_FILE)
    prompts = [p for part in text.split("|") if (p := part.strip())]
    if not prompts:
        raise ConfigError("prompts: no text", "give prompts, separated by |")
    return prompts


def _read_file(path: Path) -> list[str]:
    if path.is_dir():
        raise ConfigError(f"prompts: {path} is a folder", f"{TEXT_FILE}; '{path} |' is the word itself")
    try:
        with path.open("rb") as file:  # or a pipe
            text = _decode(str(path), file)
    except OSError as error:
        raise ConfigError(f"prompts: {path} can't be read: {error.strerror}", TEXT_FILE) from error
    return _parse(str(path), text, jsonl=path.suffix == ".jsonl")


def _read_stdin() -> str:
    binary = getattr(sys.stdin, "buffer", None)
    try:
        return sys.stdin.read(MAX_BYTES) if binary is None else _decode("standard input", binary)
    except OSError as error:
        problem = f"prompts: standard input can't be read: {error.strerror}"
        raise ConfigError(problem, "give a file or a pipe") from error


def _decode(name: str, file: BinaryIO) -> str:
    """UTF-8, or UTF-16 as PowerShell writes it, without the byte-order mark. Raises ConfigError for other bytes."""
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigError(f"prompts: {name} is larger than {MAX_BYTES} bytes", "split it into several files")
    try:
        text = data.decode("utf-16" if data[:2] in UTF16_BOMS else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"prompts: {name}, line {line}, is not UTF-8 text", TEXT_FILE) from error
    if "\0" in text:
        raise ConfigError(f"prompts: {name} holds zero bytes, so it is no text", TEXT_FILE)
    return text


def _parse(name: str, text: str, *, jsonl: bool) -> list[str]:
    """One prompt per line. Raises ConfigError with the first wrong line."""
    lines = io.StringIO(text, newline=None)  # line ends as in a text file; U+2028 is none
    numbered = [(n, stripped) for n, line in enumerate(lines, 1) if (stripped := line.strip())]
    if not numbered:
        raise ConfigError(f"prompts: {name} holds no prompts", TEXT_FILE)
    if not jsonl:
        return [line for _, line in numbered]
    parsed = [(n, *_from_json(line)) for n, line in numbered]
    wrong = [(n, problem) for n, _, problem in parsed if problem]
    if wrong:
        number, problem = wrong[0]
        others = f" (and so on: {len(wrong)} lines are wrong)" if len(wrong) > 1 else ""
        raise ConfigError(f"prompts: {name}, line {number}: {problem}{others}", JSONL_FILE)
    return [prompt for _, prompt, _ in parsed]


def _from_json(line: str) -> tuple[str, str]:
    """(prompt, problem) of a JSON string, or of an object with "prompt"."""
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
