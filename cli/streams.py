"""The three standard streams: UTF-8, present even where they were closed, with one rule for failures.

Failed writes to stderr are dropped: diagnostics do not change the outcome. Failed writes to stdout raise WriteError:
lost results end every command with an error.
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

STDIN_ENCODINGS = ("utf-8-sig", "utf-16")
UTF16_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class WriteError(LlmrsError):
    """Results can't be written."""


class ReaderClosed(WriteError):
    """The reader of stdout has closed its end, as `head` does: a reason to stop, but no error."""


class DroppingRaw(io.RawIOBase):
    """A raw stream over another. The first failed write calls `on_error`; later writes are dropped."""

    def __init__(self, raw: io.RawIOBase, on_error: Callable[[OSError], None], *, missing: bool) -> None:
        self.raw, self.on_error = raw, on_error
        self.missing = missing  # it was closed when the process started
        self.dropping = False

    def write(self, data: "memoryview") -> int:  # type: ignore[override]
        if self.dropping:
            return len(data)
        try:
            while (written := self.raw.write(data)) is None:  # a full non-blocking pipe
                select.select([], [self.raw], [])
            return written
        except OSError as error:
            self.dropping = True
            self.on_error(error)
            return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.raw.fileno()

    def isatty(self) -> bool:
        return self.raw.isatty()


def set_up() -> None:
    """Replaces the process's standard streams. A second call changes nothing."""
    sys.stdin = _input(sys.stdin)  # in this order: open() takes the lowest free descriptor
    sys.stdout = _output(sys.stdout, sys.stdout is sys.__stdout__, raise_write_error)
    sys.stderr = _output(sys.stderr, sys.stderr is sys.__stderr__, lambda error: None)


def _input(stream: TextIO | None) -> TextIO:
    """Stdin without a byte-order mark. Bytes that are not UTF-8 become surrogates, which no prompt may hold."""
    if stream is None:
        return open(os.open(os.devnull, os.O_RDONLY), encoding="utf-8")
    if stream is sys.__stdin__ and isinstance(stream, io.TextIOWrapper) and stream.encoding not in STDIN_ENCODINGS:
        stream.reconfigure(encoding=STDIN_ENCODINGS[0], errors="surrogateescape")
    return stream


def _output(stream: TextIO | None, original: bool, on_error: Callable[[OSError], None]) -> TextIO:
    if stream is not None and not original:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        return stream
    if stream is None:  # a descriptor without write access: writes fail, as they should
        raw: Any = io.FileIO(os.open(os.devnull, os.O_RDONLY), "w")
    else:
        raw = getattr(stream.buffer, "raw", stream.buffer)  # `python -u` has no buffer
    lines = on_error is not raise_write_error or raw.isatty() or getattr(stream, "write_through", False)
    dropping: Any = DroppingRaw(raw, on_error, missing=stream is None)  # typeshed wants FileIO's mode
    return io.TextIOWrapper(io.BufferedWriter(dropping), "utf-8", "backslashreplace", line_buffering=lines)


def raise_write_error(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):
        raise ReaderClosed("the reader of standard output has ended") from error
    raise WriteError(f"standard output can't be written: {error.strerror}", write_hint(error)) from error


def write_hint(error: OSError) -> str:
    hints = {
        errno.ENOSPC: "the disk is full: free some space, or use another disk",
        errno.EDQUOT: "the disk quota is used up: free some space, or use another disk",
        errno.EFBIG: "the file size limit is reached (`ulimit -f`): give another file",
        errno.EBADF: "it is closed: leave it open, or redirect it to a file",
    }
    return hints.get(error.errno or 0, "give another file")


def require_stdout(instead: str | None = None) -> None:
    """Raises WriteError where stdout was closed from the start, before work is done for it.

    With `instead`, a file that gets the results too, stdout is dropped.
    """
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, DroppingRaw) and raw.missing:
        if instead is None:
            raise_write_error(OSError(errno.EBADF, os.strerror(errno.EBADF)))
        raw.dropping = True


def detect_utf16() -> None:
    """Reads stdin as UTF-16 if it starts with that byte-order mark. Waits for its first bytes."""
    buffer = getattr(sys.stdin, "buffer", None)
    if isinstance(buffer, io.BufferedReader) and buffer.peek(2)[:2] in UTF16_BOMS:
        sys.stdin.reconfigure(encoding=STDIN_ENCODINGS[1], errors="replace")  # type: ignore[union-attr]
