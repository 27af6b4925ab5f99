"""How much main memory is free, on every system."""

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


def _windows_free() -> int:
    """MEMORYSTATUSEX.ullAvailPhys (Win32 `GlobalMemoryStatusEx`)."""
    status = (ctypes.c_uint64 * 8)(64)  # dwLength and dwMemoryLoad share the first; ullAvailPhys is the third
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined,unused-ignore]
    return int(status[2])
