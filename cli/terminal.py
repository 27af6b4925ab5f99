"""Diagnostics on stderr: errors, notes and a status line."""

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

from llmrs.cli.signals import INTERRUPTED
from llmrs.cli.streams import ReaderClosed
from llmrs.core.errors import LlmrsError

FAILED, READER_CLOSED = 2, 1  # exit statuses; docs/config.md has the table


def one_line(text: str) -> str:
    """Text without line ends and control characters, since it may quote an untrusted file."""
    return "".join(c if c.isprintable() else " " for c in text)


def print_error(error: LlmrsError, prefix: str = "") -> None:
    """One line `error:`, one line `hint:`."""
    print(f"error: {one_line(prefix + error.message)}", file=sys.stderr)
    if error.hint:
        print(f"hint: {one_line(error.hint)}", file=sys.stderr)


def note(text: str) -> None:
    print(f"note: {one_line(text)}", file=sys.stderr)


def enable_line_editing() -> None:
    """Lets `input` edit lines with the arrow keys, and take pasted lines as one."""
    try:
        import readline
    except ModuleNotFoundError:  # Windows, whose console edits lines by itself
        return
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off


class StatusLine:
    """A line that is redrawn at most ten times a second; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self.stream: TextIO = sys.stderr
        self.active = self.stream.isatty()
        self._width, self._next_draw = 0, 0.0

    def show(self, text: Callable[[], str]) -> None:
        if self.active and time.monotonic() >= self._next_draw:
            self._next_draw = time.monotonic() + 0.1
            self._draw(text()[: shutil.get_terminal_size().columns - 1])

    def clear(self) -> None:
        """Erases the line; the next `show` draws at once."""
        if self._width:
            self._draw("")
            self._next_draw = 0.0

    def _draw(self, text: str) -> None:
        # spaces instead of an escape code, for every Windows console
        self.stream.write(f"\r{text.ljust(self._width)}" + ("" if text else "\r"))
        self.stream.flush()
        self._width = len(text)


def exit_status(command: Callable[[], int]) -> int:
    """Runs a command and prints its LlmrsError. Other exceptions are bugs and keep their traceback."""
    try:
        return command()
    except ReaderClosed:
        return READER_CLOSED
    except LlmrsError as error:
        print_error(error)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
