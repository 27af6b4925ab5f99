"""MLX's process-wide state, borrowed while engines live: its memory limits, and a stream for each engine.

Streams are never destroyed, and each holds a thread (CPU) or a command queue (Metal), so they are used again.

MLX does not survive a fork: its streams' threads are the parent's alone, and waiting for one there never ends.

MLX has one memory limit for all engines of a process and for what the program itself does with MLX. So it is the sum of
the engines' budgets and of what the program held before them; as soon as one engine has no budget, all that the GPU can
hold. It is soft: near it MLX frees what it keeps and waits for running work, rather than fail.
"""

import os
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import mlx.core as mx

from llmrs.backends.host_memory import free_host_memory
from llmrs.core.errors import BackendError

MOST_CACHED = 1 << 30  # bytes of freed buffers that MLX may keep for the next step

_lock = threading.RLock()  # an engine that nobody holds any more may end within
_idle: dict[str, list[mx.Stream]] = {"cpu": [], "gpu": []}
_loans: list["Loan"] = []
_before: dict[str, int] = {}  # the limits that the program had set
_held = 0  # bytes that it held before the first engine
_process: int | None = None  # the first in which there was a loan


@dataclass(eq=False)
class Loan:
    """What an engine has: a stream that nobody else uses, and bytes that it may fill; None: all that there is."""

    device: str
    stream: mx.Stream
    budget: int | None = None


def borrow(device: str) -> Loan:
    """A loan on "cpu" or "gpu". While there is one, MLX's limits are the engines'.

    Raises BackendError in a fork of a process that had one.
    """
    global _held, _process
    _process = _process or os.getpid()
    if _process != os.getpid():  # the lock may be held for ever there
        raise BackendError(
            "MLX has run in the parent of this process, and does not survive a fork",
            "start processes with multiprocessing's 'spawn' or 'forkserver', or use backend: torch",
        )
    with _lock:
        if not _loans:
            _held = mx.get_active_memory()
        stream = _idle[device].pop() if _idle[device] else mx.new_thread_unsafe_stream(getattr(mx, device))
        _loans.append(Loan(device, stream))
        _set_limits()
        return _loans[-1]


def bound(loan: Loan, budget: int | None) -> None:
    """Gives an engine a budget."""
    with _lock:
        loan.budget = budget
        _set_limits()


def give_back(loan: Loan) -> None:
    """Ends a loan; the last one restores the limits. In a fork it does nothing: the loan is the parent's."""
    if _process != os.getpid():
        return
    with _lock:
        _loans.remove(loan)
        _idle[loan.device].append(loan.stream)
        mx.clear_cache()
        if _loans:
            _set_limits()
        else:
            _restore_limits()


def using(stream: mx.Stream) -> AbstractContextManager[object]:
    """Runs what follows on this stream.

    Elsewhere than on the main thread, whose own stream comes back, it stays this thread's for good: a thread that is
    asked for its stream gets one made, which nothing destroys, and an engine's thread does nothing else.
    """
    if threading.current_thread() is threading.main_thread():
        return mx.stream(stream)
    mx.set_default_stream(stream)
    return nullcontext()


def working_set() -> int | None:
    """Bytes that a Mac's GPU can hold without swapping; None without Metal."""
    if not mx.metal.is_available():
        return None
    return int(mx.device_info()["max_recommended_working_set_size"])


def free_memory() -> int:
    """Bytes that could still be allocated."""
    size = working_set()
    return free_host_memory() if size is None else max(size - mx.get_active_memory(), 0)


def _set_limits() -> None:
    size = working_set()
    budgets = [loan.budget for loan in _loans if loan.budget is not None]
    most = _held + sum(budgets) if len(budgets) == len(_loans) else None
    if size is not None:
        most = min(size, most or size)
        _set("wired", most)  # else the system may page weights out between two answers
    _set("cache", min(MOST_CACHED, (most or free_host_memory()) // 16))
    if most is not None:
        _set("memory", most)
    elif "memory" in _before:
        mx.set_memory_limit(_before["memory"])


def _set(name: str, limit: int) -> None:
    """Sets a limit, and keeps the first that it takes the place of."""
    _before.setdefault(name, getattr(mx, f"set_{name}_limit")(limit))


def _restore_limits() -> None:
    for name, limit in _before.items():
        getattr(mx, f"set_{name}_limit")(limit)
    _before.clear()
