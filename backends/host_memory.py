"""Main memory on every system: how much is free, keeping what is freed for the next step, and giving it back."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
MADV_HUGEPAGE, MADV_COLLAPSE, HUGE = 14, 25, 2**21  # of mman.h; bytes of a huge page on x86-64 and most Arm
KEPT, HEAP = 2**26, 2**25  # bytes; the second is the largest that glibc takes


def free_host_memory() -> int:
    """Bytes of main memory that could be allocated without swapping; half of all where the system does not say."""
    if sys.platform == "linux":
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if sys.platform == "win32":
        return _windows_free()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def keep_freed_memory() -> None:
    """Lets the C library keep up to 64 MiB that are freed, for the next step's temporaries (glibc: `mallopt`).

    Else each is mapped anew, page by page, which takes longer than what is computed on it: a norm of 256 rows takes
    1.06 ms in place of 0.13. It holds for the whole process; `trim_host_memory` gives back what is kept.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)
        libc.mallopt(M_MMAP_THRESHOLD, HEAP)


def use_huge_pages() -> None:
    """Asks for huge pages where large things lie that are allocated now: weights (Linux: `madvise`, since 6.1 at once).

    Weights are read from end to end in each step; with pages of 4 KiB looking up where they lie takes 5 % of it.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    with open("/proc/self/maps") as lines:
        areas = [a for line in lines if (a := _anonymous_area(line))]
    for begin, end in areas:
        for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):  # an older kernel refuses the second, which changes nothing
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)


def _anonymous_area(line: str) -> tuple[int, int] | None:
    """Whole huge pages of a line of /proc/self/maps, where it is private memory of no file, and large."""
    area, access, _, _, inode, *name = line.split()
    begin, end = (int(a, 16) for a in area.split("-"))
    begin, end = -(-begin // HUGE) * HUGE, end // HUGE * HUGE
    private = access == "rw-p" and inode == "0" and name in ([], ["[heap]"])
    return (begin, end) if private and end - begin >= 2 * HUGE else None


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
