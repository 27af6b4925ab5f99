"""MLX's process-wide state, leased to engines: its memory limits, and one stream per engine.

Streams are never destroyed, and each holds a thread (CPU) or a command queue (Metal), so they are reused. MLX does not
survive a fork: the stream threads exist only in the parent, and waiting for one in the child would hang.

MLX has one memory limit per process. It is set to the sum of the engines' budgets plus what the program held before;
if an engine has no budget, to the GPU's working set. The limit is soft: near it MLX frees its cache and waits for
running work, rather than fail.
"""

import os
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import mlx.core as mx

from llmrs.backends.host_memory import free_host_memory
from llmrs.core.errors import BackendError

MAX_CACHE_BYTES = 1 << 30  # freed buffers that MLX may keep for the next step

_lock = threading.RLock()  # reentrant: garbage collection of an engine may release its lease inside
_free_streams: dict[str, list[mx.Stream]] = {"cpu": [], "gpu": []}
_leases: list["StreamLease"] = []
_saved_limits: dict[str, int] = {}  # set by the program before the first lease
_baseline_bytes = 0  # held by the program before the first lease
_process: int | None = None  # process of the first lease


@dataclass(eq=False)
class StreamLease:
    """An engine's own stream, and its memory budget in bytes; None: no budget."""

    device: str
    stream: mx.Stream
    budget: int | None = None


def acquire(device: str) -> StreamLease:
    """A lease on "cpu" or "gpu"; sets MLX's limits while any lease is held.

    Raises BackendError in a fork of a process that held one.
    """
    global _baseline_bytes, _process
    _process = _process or os.getpid()
    if _process != os.getpid():  # before the lock, which may be held forever in a fork
        raise BackendError(
            "MLX has run in the parent of this process, and does not survive a fork",
            "start processes with multiprocessing's 'spawn' or 'forkserver', or use backend: torch",
        )
    with _lock:
        if not _leases:
            _baseline_bytes = mx.get_active_memory()
        free = _free_streams[device]
        _leases.append(StreamLease(device, free.pop() if free else mx.new_thread_unsafe_stream(getattr(mx, device))))
        _set_limits()
        return _leases[-1]


def set_budget(lease: StreamLease, budget: int | None) -> None:
    with _lock:
        lease.budget = budget
        _set_limits()


def release(lease: StreamLease) -> None:
    """Ends a lease; the last one restores MLX's limits. No-op in a fork: the lease is the parent's."""
    if _process != os.getpid():
        return
    with _lock:
        _leases.remove(lease)
        _free_streams[lease.device].append(lease.stream)
        mx.clear_cache()
        if _leases:
            _set_limits()
            return
        for name, limit in _saved_limits.items():
            getattr(mx, f"set_{name}_limit")(limit)
        _saved_limits.clear()


def use_stream(stream: mx.Stream) -> AbstractContextManager[object]:
    """Makes the stream current: within the context on the main thread, for good on an engine's thread.

    Reading an engine thread's own stream in order to restore it would create one that is never destroyed.
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
    budgets = [lease.budget for lease in _leases if lease.budget is not None]
    limit = _baseline_bytes + sum(budgets) if len(budgets) == len(_leases) else None
    if size is not None:
        limit = min(size, limit or size)
        _set("wired", limit)  # else macOS may page weights out between requests
    _set("cache", min(MAX_CACHE_BYTES, (limit or free_host_memory()) // 16))
    if limit is not None:
        _set("memory", limit)
    elif "memory" in _saved_limits:
        mx.set_memory_limit(_saved_limits["memory"])


def _set(name: str, limit: int) -> None:
    """Sets a limit; saves the program's at the first call."""
    _saved_limits.setdefault(name, getattr(mx, f"set_{name}_limit")(limit))
