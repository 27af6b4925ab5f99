"""The files that a command writes: checked before a model is loaded for them, and written so that nothing is lost."""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrs.cli.streams import WriteError, advice
from llmrs.core.errors import ConfigError

if TYPE_CHECKING:
    from llmrs.engine import Engine

STDIN = "-"  # among the inputs
OWN = "give a file of its own"
# ends of the names of files that are read from a model's folder
OF_MODELS = ("config.json", "tokenizer.json", ".index.json", "chat_template.jinja", ".safetensors", ".gguf")


def check_outputs(outputs: Mapping[str, str | None], inputs: Mapping[str, str], model: str | None = None) -> None:
    """Raises ConfigError for a path where no file can be written, and for one that is another file of the command.

    outputs: option -> path. inputs: what it is, in words -> path. model: its folder or file, if it is one.
    """
    given = {option: path for option, path in outputs.items() if path is not None}
    for option, path in given.items():
        _check_writable(option, path)
        for what, other in inputs.items():
            if _same(path, other):
                raise ConfigError(f"{option}: {path} is {what}, which would be overwritten", OWN)
        if model is not None and _of_model(path, Path(model)):
            raise ConfigError(f"{option}: {path} is a file of the model, which would be overwritten", OWN)
        if any(_is_descriptor(path, number) for number in (1, 2)):
            raise ConfigError(f"{option}: {path} is where standard output or standard error goes already", OWN)
    for (a, first), (b, second) in combinations(given.items(), 2):
        if _same(first, second):
            raise ConfigError(f"{b}: {second} is the file of {a} too", OWN)


def _check_writable(option: str, path: str) -> None:
    file, hint = Path(path), "give a file in a folder that is there"
    if "\0" in path or file.is_dir() or not file.absolute().parent.is_dir():
        raise ConfigError(f"{option}: {path} can't be written", hint)
    if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise ConfigError(f"{option}: {path} can't be written: permission denied", hint)


def _same(path: str, other: str) -> bool:
    """Whether both name one file, by links or otherwise. Devices and pipes are no files."""
    if other == STDIN:
        return _is_descriptor(path, 0)
    try:
        return os.path.samefile(path, other) and stat.S_ISREG(os.stat(path).st_mode)
    except OSError:  # one of them is not there yet
        return os.path.normcase(os.path.realpath(path)) == os.path.normcase(os.path.realpath(other))


def _of_model(path: str, model: Path) -> bool:
    """Whether the path is one of the files of a model folder, or the file of a model."""
    file, there = Path(path).resolve(), model.expanduser().resolve()
    return file.is_file() and (file == there or (file.parent == there and file.name.endswith(OF_MODELS)))


def _is_descriptor(path: str, number: int) -> bool:
    """Whether the path names the file that is open as this descriptor."""
    try:
        found = os.stat(path)
        return stat.S_ISREG(found.st_mode) and os.path.samestat(found, os.fstat(number))
    except OSError:
        return False


class Records:
    """The file of --output: a JSON object a line. A line that does not fit is cut off again."""

    def __init__(self, path: str, total: int) -> None:
        """Raises ConfigError where the file can't be opened. `total` is how many records are to come."""
        self.path, self.total, self.count = path, total, 0
        try:
            self.file = open(path, "wb", buffering=0)  # noqa: SIM115  # no buffer: what is there survives whatever comes
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"output: {path} can't be written: {reason}", "give another file") from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Raises WriteError, which says how many records are in the file."""
        line = encoded(record).encode("utf-8", "backslashreplace") + b"\n"
        written = 0
        try:
            while written < len(line):
                written += self.file.write(line[written:])
        except OSError as error:
            self._cut(written)
            raise self._failed(error) from error
        self.count += 1

    def close(self) -> None:
        """Raises WriteError: some file systems say only now that the disk is full."""
        try:
            self.file.close()
        except OSError as error:
            raise self._failed(error) from error

    def _cut(self, written: int) -> None:
        """Takes the beginning of a line away again, where that is possible."""
        with suppress(OSError):
            self.file.truncate(self.file.tell() - written)

    def _failed(self, error: OSError) -> WriteError:
        reason = f"{error.strerror}; it has {self.count} of {self.total} answers"
        return WriteError(f"output: {self.path} can't be written: {reason}", advice(error))


def encoded(record: Mapping[str, Any]) -> str:
    """As JSON. A lone surrogate is escaped where the text is written: \\udc80, which is how JSON writes it."""
    return json.dumps(record, ensure_ascii=False)


@contextmanager
def records_file(path: str | None, total: int) -> Iterator[Records | None]:
    """The open file, or None where none is asked for."""
    if path is None:
        yield None
        return
    records = Records(path, total)
    try:
        yield records
    finally:
        records.close()


@contextmanager
def traced(engine: "Engine", path: str | None) -> Iterator[None]:
    """Writes a trace of the steps meanwhile, where one is asked for. Raises ConfigError where it can't be written."""
    if path is None:
        yield
        return
    trace = engine.start_trace()
    try:
        yield
    finally:
        trace.write(Path(path))
