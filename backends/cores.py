"""CPU cores: how many a step's threads may use, and how the threads of torch wait for each other."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
# What sets how OpenMP's threads wait: the standard's variable, and those of GNU's and LLVM's libraries
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Cores that this process may use: those of its affinity mask, within a container's CPU quota, at least 1."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = _quota(cgroup)
    return cores if quota is None else max(min(cores, round(quota)), 1)


def _quota(cgroup: Path) -> float | None:
    """Cores' worth of time, from version 2 or 1 of Linux's control groups; None: no limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
            return None if quota in ("max", "-1") else int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None


@contextmanager
def passive_waiting() -> Iterator[None]:
    """For the import of torch, whose OpenMP library reads it then: threads sleep while they wait for each other.

    By default they spin, for about a millisecond. Where another process wants a core, the kernel takes it from a
    thread that has spun, and all others wait for that one: on two cores with one busy process, decoding fell to a
    fortieth. What the user has set holds. Off Linux other libraries are used, which wait in other ways.
    """
    if sys.platform != "linux" or "torch" in sys.modules or os.environ.keys() & set(WAITING):
        yield
        return
    os.environ[WAITING[0]] = "passive"
    try:
        yield
    finally:
        del os.environ[WAITING[0]]
