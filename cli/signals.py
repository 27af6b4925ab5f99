"""Ctrl-C, SIGTERM and SIGHUP: the first stops generation and keeps the results, a second ends the process."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

SIGNALLED = 128  # plus the signal's number: exit status, as in shells
INTERRUPTED = SIGNALLED + signal.SIGINT
TERMINATION = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP. As with Ctrl-C, `finally` blocks close files and release memory."""


class Stop:
    """`status` is the exit status of the signal that arrived; 0 before."""

    status = 0


def termination() -> AbstractContextManager[Stop]:
    """Within, the first SIGTERM or SIGHUP raises Terminated. typer reports it as Ctrl-C, so Stop keeps the status."""

    def terminate() -> None:
        raise Terminated

    return _on_first_signal(TERMINATION, terminate)


def on_interrupt(stop: Callable[[], None]) -> AbstractContextManager[Stop]:
    """The first Ctrl-C, SIGTERM or SIGHUP calls `stop`; a second one raises KeyboardInterrupt, or Terminated.

    A call and not an exception, which could interrupt a write and lose or repeat output.
    """
    return _on_first_signal([signal.SIGINT, *TERMINATION], stop)


@contextmanager
def _on_first_signal(numbers: list[int], action: Callable[[], None]) -> Iterator[Stop]:
    """Calls `action` for the first signal, and then restores the previous handlers. Ignored signals stay ignored."""
    stop, previous = Stop(), {n: signal.getsignal(n) for n in numbers}
    previous = {n: h for n, h in previous.items() if h not in (None, signal.SIG_IGN)}
    if threading.current_thread() is not threading.main_thread():
        previous = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        stop.status = SIGNALLED + number
        action()

    for number in previous:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()
