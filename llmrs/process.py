"""Detects that this process is a fork of the one that made an engine or a stream."""

import os

_current = os.getpid()


def current_process() -> int:
    """The process id, without a system call: streams ask for every token."""
    return _current


def _update() -> None:
    global _current
    _current = os.getpid()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_update)
