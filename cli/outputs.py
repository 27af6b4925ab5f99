"""Output files of a command: checked before the model is loaded, written as whole records."""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrs.cli.streams import WriteError, write_hint
from llmrs.core.errors import ConfigError

if TYPE_CHECKING:
    from llmrs.engine import Engine

STDIN = "-"  # among the inputs
OTHER_FILE = "give another file"
MODEL_FILES = ("config.json", "tokenizer.json", ".index.json", "chat_template.jinja", ".safetensors", ".gguf")


def check_outputs(outputs: Mapping[str, str | None], inputs: Mapping[str, str], model: str) -> None:
    """Raises ConfigError for a path that can't be written, or that is another file of the command.

    outputs: option -> path. inputs: description -> path. model: a path, or a Hugging Face id.
    """
    from llmrs.models.hub.resolve import local_path  # imported here to keep `llmrs --help` fast

    given = {option: path for option, path in outputs.items() if path is not None}
    for option, path in given.items():
        _check_writable(option, path)
        for description, other in inputs.items():
            if _same_file(path, other):
                raise ConfigError(f"{option}: {path} is {description}, which would be overwritten", OTHER_FILE)
        if _is_model_file(path, local_path(model)):
            raise ConfigError(f"{option}: {path} is a file of the model, which would be overwritten", OTHER_FILE)
        if any(_is_descriptor(path, number) for number in (1, 2)):
            raise ConfigError(f"{option}: {path} is standard output or standard error already", OTHER_FILE)
    for (a, first), (b, second) in combinations(given.items(), 2):
        if _same_file(first, second):
            raise ConfigError(f"{b}: {second} is the file of {a} too", OTHER_FILE)


def _check_writable(option: str, path: str) -> None:
    file, hint = Path(path), "give a file in an existing folder"
    if "\0" in path or file.is_dir() or not file.absolute().parent.is_dir():
        raise ConfigError(f"{option}: {path} can't be written", hint)
    if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise ConfigError(f"{option}: {path} can't be written: permission denied", hint)


def _same_file(path: str, other: str) -> bool:
    """Whether both name one file, by links or otherwise. Devices and pipes do not count."""
    if other == STDIN:
        return _is_descriptor(path, 0)
    try:
        return os.path.samefile(path, other) and stat.S_ISREG(os.stat(path).st_mode)
    except OSError:  # one of them does not exist yet
        return os.path.normcase(os.path.realpath(path)) == os.path.normcase(os.path.realpath(other))


def _is_model_file(path: str, model: Path) -> bool:
    """Whether the path is a file of a model in the folder of this one."""
    file, target = Path(path).resolve(), model.resolve()
    folder = target if target.is_dir() else target.parent  # of a split set, the others are there too
    return file.is_file() and (file == target or (file.parent == folder and file.name.endswith(MODEL_FILES)))


def _is_descriptor(path: str, number: int) -> bool:
    """Whether the path names the regular file that is open as this descriptor."""
    try:
        status = os.stat(path)
        return stat.S_ISREG(status.st_mode) and os.path.samestat(status, os.fstat(number))
    except OSError:
        return False


class JsonlFile:
    """The file of --output: one JSON object per line. A line that does not fit is removed again."""

    def __init__(self, path: str, total: int) -> None:
        """`total` is the expected number of records. Raises ConfigError where the file can't be opened."""
        self.path, self.total, self.count = path, total, 0
        try:
            self.file = open(path, "wb", buffering=0)  # noqa: SIM115  # unbuffered: records survive a crash
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"output: {path} can't be written: {reason}", OTHER_FILE) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Raises WriteError with the number of records in the file."""
        line = to_json(record).encode("utf-8", "backslashreplace") + b"\n"
        written = 0
        try:
            while written < len(line):
                written += self.file.write(line[written:])
        except OSError as error:
            with suppress(OSError):
                self.file.truncate(self.file.tell() - written)
            raise self._failed(error) from error
        self.count += 1

    def close(self) -> None:
        """Raises WriteError: some file systems report a full disk only here."""
        try:
            self.file.close()
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> WriteError:
        reason = f"{error.strerror}; it has {self.count} of {self.total} answers"
        return WriteError(f"output: {self.path} can't be written: {reason}", write_hint(error))


def to_json(record: Mapping[str, Any]) -> str:
    """Lone surrogates stay in the text; the stream escapes them as \\udc80, as JSON does."""
    return json.dumps(record, ensure_ascii=False)


@contextmanager
def traced(engine: "Engine", path: str | None) -> Iterator[None]:
    """Writes a trace of the steps within, if there is a path. Raises ConfigError where it can't be written."""
    if path is None:
        yield
        return
    trace = engine.start_trace()
    try:
        yield
    finally:
        trace.write(Path(path))
