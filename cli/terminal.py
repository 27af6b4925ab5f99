"""What goes to the terminal beside the data: errors, notes, and a line that is drawn over. All of it on stderr."""

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

from llmrs.cli.signals import INTERRUPTED
from llmrs.cli.streams import ReaderLeft
from llmrs.core.errors import LlmrsError

WRONG, READER_LEFT = 2, 1  # exit statuses; docs/config.md has the table


def one_line(text: str) -> str:
    """Text without line ends and control characters: it may quote a file from anywhere."""
    return "".join(c if c.isprintable() else " " for c in text)


def report(error: LlmrsError, where: str = "") -> None:
    """`error:` and `hint:`, a line each."""
    print(f"error: {one_line(where + error.message)}", file=sys.stderr)
    if error.hint:
        print(f"hint: {one_line(error.hint)}", file=sys.stderr)


def note(text: str) -> None:
    print(f"note: {one_line(text)}", file=sys.stderr)


def edit_lines() -> None:
    """Lets `input` edit lines with the arrow keys, and take pasted lines as one."""
    try:
        import readline
    except ModuleNotFoundError:  # Windows, whose console edits lines by itself
        return
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off


class StatusLine:
    """One line that is drawn over, at most ten times a second; nothing at all when stderr is no terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.active = self.stream.isatty()
        self._width, self._next = 0, 0.0

    def show(self, text: Callable[[], str]) -> None:
        if self.active and time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.1
            self._draw(text()[: shutil.get_terminal_size().columns - 1])

    def clear(self) -> None:
        """Makes room for other output; the next `show` draws again."""
        if self._width:
            self._draw("")
            self._next = 0.0

    def _draw(self, text: str) -> None:
        # spaces, not an escape code: it works on every Windows console
        self.stream.write(f"\r{text.ljust(self._width)}" + ("" if text else "\r"))
        self.stream.flush()
        self._width = len(text)


def guarded(body: Callable[[], int]) -> int:
    """Runs a command; its exit status. Anything but an LlmrsError is a bug of ours and keeps its traceback."""
    try:
        return body()
    except ReaderLeft:
        return READER_LEFT
    except LlmrsError as error:
        report(error)
        return WRONG
    except KeyboardInterrupt:
        return INTERRUPTED
