"""What goes to the terminal beside the data: errors, notes, and a line that is drawn over. All of it on stderr."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from llmrs.core.errors import LlmrsError

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


def use_utf8() -> None:
    """UTF-8 on all three streams, whatever the locale; what it can't hold is escaped, not fatal."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if hasattr(stream, "reconfigure"):  # not where a test or a host program put its own object
            stream.reconfigure(encoding="utf-8", errors=errors)


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
    except LlmrsError as error:
        report(error)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough
        discard_stdout()
        return 1


def discard_stdout() -> None:
    """Nobody reads stdout any more: what is left in its buffer must not fail again when Python ends."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)


@contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[threading.Event]:
    """The first Ctrl-C calls `stop` and sets the event; a second one raises KeyboardInterrupt as usual.

    An exception in the middle of a write would lose or double a piece of the output; a call loses nothing.
    """
    pressed = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        pressed.set()
        stop()

    possible = threading.current_thread() is threading.main_thread() and before not in (None, signal.SIG_IGN)
    if possible:
        signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        if possible:
            signal.signal(signal.SIGINT, before)
