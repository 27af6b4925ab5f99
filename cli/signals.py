"""Ctrl-C, SIGTERM and SIGHUP: the first ends what runs and keeps what was answered, a second ends the program."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # exit status after Ctrl-C: 128 + the signal's number, as shells have it
FIRST = 128
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

Handler = Callable[[int, FrameType | None], None]


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, as Ctrl-C is KeyboardInterrupt: files are closed and memory is given back on the way out."""


class Stop:
    """Whether a signal asked for an end, and the exit status then; 0 before."""

    status = 0


@contextmanager
def _handled(numbers: list[int], handle: Handler) -> Iterator[None]:
    """`handle` for the first signal; then, and at the end, what was there before. Ignored signals stay ignored."""
    before = {n: signal.getsignal(n) for n in numbers}
    before = {n: h for n, h in before.items() if h not in (None, signal.SIG_IGN)}
    if threading.current_thread() is not threading.main_thread():
        before = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def first(number: int, frame: FrameType | None) -> None:
        restore()
        handle(number, frame)

    for number in before:
        signal.signal(number, first)
    try:
        yield
    finally:
        restore()


@contextmanager
def termination() -> Iterator[Stop]:
    """Within, the first SIGTERM or SIGHUP raises Terminated. The status is kept, as typer makes Ctrl-C of it."""
    stopped = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        stopped.status = FIRST + number
        raise Terminated

    with _handled(ENDING, handle):
        yield stopped


@contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[Stop]:
    """The first Ctrl-C, SIGTERM or SIGHUP calls `stop`; a second one raises KeyboardInterrupt, or Terminated.

    An exception in the middle of a write would lose or double a piece of the output; a call loses nothing.
    """
    stopped = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        stopped.status = FIRST + number
        stop()

    with _handled([signal.SIGINT, *ENDING], handle):
        yield stopped
