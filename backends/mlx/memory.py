"""MLX's process-wide state, borrowed while engines live: its memory limits, and a stream for each engine.

Streams are never destroyed, and each holds a thread (CPU) or a command queue (Metal), so they are used again.
"""

import threading
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx

from llmrs.backends.memory import free_host_memory

MOST_CACHED = 1 << 30  # bytes of freed buffers that MLX may keep for the next step

_lock = threading.Lock()
_idle: dict[str, list[mx.Stream]] = {"cpu": [], "gpu": []}
_engines = 0
_before: dict[str, int] = {}  # the limits that the program had set


def borrow_stream(device: str) -> mx.Stream:
    """A stream that nobody else uses, of "cpu" or "gpu". The first borrower's call also sets MLX's limits."""
    global _engines
    with _lock:
        if not _engines:
            _set_limits()
        _engines += 1
        return _idle[device].pop() if _idle[device] else mx.new_thread_unsafe_stream(getattr(mx, device))


def using(stream: mx.Stream) -> AbstractContextManager[object]:
    """Runs what follows on this stream.

    Elsewhere than on the main thread, whose own stream comes back, it stays this thread's for good: a thread that is
    asked for its stream gets one made, which nothing destroys, and an engine's thread does nothing else.
    """
    if threading.current_thread() is threading.main_thread():
        return mx.stream(stream)
    mx.set_default_stream(stream)
    return nullcontext()


def give_back(device: str, stream: mx.Stream) -> None:
    """Ends a loan; the last one restores the limits."""
    global _engines
    with _lock:
        _idle[device].append(stream)
        _engines -= 1
        mx.clear_cache()
        if not _engines:
            _restore_limits()


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
    _before["cache"] = mx.set_cache_limit(min(MOST_CACHED, (size or free_host_memory()) // 16))
    if size is not None:
        _before["memory"] = mx.set_memory_limit(size)
        _before["wired"] = mx.set_wired_limit(size)  # else the system may page weights out between two answers


def _restore_limits() -> None:
    for name, limit in _before.items():
        getattr(mx, f"set_{name}_limit")(limit)
    _before.clear()
