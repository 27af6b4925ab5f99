"""The three standard streams, for every command: UTF-8, there even where they were closed, and one rule for failures.

What can't be written to stderr is dropped, since diagnostics decide nothing. What can't be written to stdout raises
WriteError in every command: lost results end it with an error.
"""

import codecs
import errno
import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any, TextIO

from llmrs.core.errors import LlmrsError

ENCODINGS = ("utf-8-sig", "utf-16")  # of standard input
BOMS_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class WriteError(LlmrsError):
    """Results can't be written."""


class ReaderLeft(WriteError):
    """The reader of standard output has ended, as `head` does: a reason to stop, and no error."""


class Raw(io.RawIOBase):
    """A raw stream over another. When a write fails `failed` is called; after that everything is dropped."""

    def __init__(self, raw: io.RawIOBase, failed: Callable[[OSError], None], *, missing: bool) -> None:
        self.raw, self.failed = raw, failed
        self.missing = missing  # it was closed when the process started
        self.dropping = False

    def write(self, data: "memoryview") -> int:  # type: ignore[override]
        if self.dropping:
            return len(data)
        try:
            while (written := self.raw.write(data)) is None:  # a pipe that does not block, and is full
                select.select([], [self.raw], [])
            return written
        except OSError as error:
            self.dropping = True
            self.failed(error)
            return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.raw.fileno()

    def isatty(self) -> bool:
        return self.raw.isatty()


def set_up() -> None:
    """Puts streams of ours in the place of the process's own; called again, it leaves them as they are."""
    sys.stdin = _input(sys.stdin)  # in this order: an empty place is taken by the lowest descriptor that is free
    sys.stdout = _output(sys.stdout, sys.stdout is sys.__stdout__, _results_failed)
    sys.stderr = _output(sys.stderr, sys.stderr is sys.__stderr__, lambda error: None)


def _input(stream: TextIO | None) -> TextIO:
    """Standard input, without a byte-order mark. Bytes that are not UTF-8 become surrogates: no prompt may hold one."""
    if stream is None:
        return open(os.open(os.devnull, os.O_RDONLY), encoding="utf-8")
    if stream is sys.__stdin__ and isinstance(stream, io.TextIOWrapper) and stream.encoding not in ENCODINGS:
        stream.reconfigure(encoding=ENCODINGS[0], errors="surrogateescape")
    return stream


def _output(stream: TextIO | None, own: bool, failed: Callable[[OSError], None]) -> TextIO:
    if stream is not None and not own:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        return stream
    if stream is None:  # a descriptor that can't be written: what is printed is missed, as it should be
        raw: Any = io.FileIO(os.open(os.devnull, os.O_RDONLY), "w")
    else:
        raw = getattr(stream.buffer, "raw", stream.buffer)  # `python -u` has no buffer in between
    lines = failed is not _results_failed or raw.isatty() or getattr(stream, "write_through", False)
    ours: Any = Raw(raw, failed, missing=stream is None)  # typeshed wants a mode, which only FileIO has
    return io.TextIOWrapper(io.BufferedWriter(ours), "utf-8", "backslashreplace", line_buffering=lines)


def _results_failed(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):
        raise ReaderLeft("the reader of standard output has ended") from error
    raise WriteError(f"standard output can't be written: {error.strerror}", advice(error)) from error


def advice(error: OSError) -> str:
    """What helps where a file can't be written."""
    hints = {
        errno.ENOSPC: "the disk is full: make room, or write to another one",
        errno.EDQUOT: "the quota is used up: make room, or write to another disk",
        errno.EFBIG: "the largest size of a file is reached (`ulimit -f`): give another file",
        errno.EBADF: "it is closed: leave it open, or send it to a file",
    }
    return hints.get(error.errno or 0, "give another file")


def require_stdout(instead: str | None = None) -> None:
    """Raises WriteError where standard output was closed from the start, before work is done for it.

    With `instead`, a file that gets the results too, what is printed is dropped.
    """
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, Raw) and raw.missing:
        if instead is None:
            _results_failed(OSError(errno.EBADF, os.strerror(errno.EBADF)))
        raw.dropping = True


def expect_utf16() -> None:
    """Reads standard input as UTF-16 where it begins so. Waits for its first bytes."""
    buffer = getattr(sys.stdin, "buffer", None)
    if isinstance(buffer, io.BufferedReader) and buffer.peek(2)[:2] in BOMS_UTF16:
        sys.stdin.reconfigure(encoding=ENCODINGS[1], errors="replace")  # type: ignore[union-attr]
