"""Main memory on every system: how much is free, and giving back what was freed."""

import ctypes
import os
import sys


def free_host_memory() -> int:
    """Bytes of main memory that could be allocated without swapping; half of all where the system does not say."""
    if sys.platform == "linux":
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if sys.platform == "win32":
        return _windows_free()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def trim_host_memory() -> None:
    """Hands freed memory back to the system where the C library keeps it (glibc: `malloc_trim`).

    Loading frees a copy of every weight; glibc would hold on to up to a fifth of a small model's size.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _windows_free() -> int:
    """MEMORYSTATUSEX.ullAvailPhys (Win32 `GlobalMemoryStatusEx`)."""
    status = (ctypes.c_uint64 * 8)(64)  # dwLength and dwMemoryLoad share the first; ullAvailPhys is the third
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined,unused-ignore]
    return int(status[2])
