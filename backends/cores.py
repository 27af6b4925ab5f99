"""CPU cores: the number of usable ones, and the wait policy of torch's OpenMP threads."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
# OpenMP wait policy: the standard's variable, GNU's and LLVM's
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Cores of the affinity mask, capped by the container's CPU quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = _quota(cgroup)
    return cores if quota is None else max(min(cores, round(quota)), 1)


def _quota(cgroup: Path) -> float | None:
    """CPU quota in cores, from cgroup v2 or v1; None: no limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
            return None if quota in ("max", "-1") else int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None


@contextmanager
def passive_waiting() -> Iterator[None]:
    """Sets OMP_WAIT_POLICY=passive during the import of torch, when its OpenMP library reads it (Linux).

    By default threads spin for about a millisecond. If another process needs a core, the kernel preempts a spinning
    thread and all others wait for it: on two cores with one busy process, decoding was 40 times slower. Variables set
    by the user take precedence.
    """
    if sys.platform != "linux" or "torch" in sys.modules or os.environ.keys() & set(WAITING):
        yield
        return
    os.environ[WAITING[0]] = "passive"
    try:
        yield
    finally:
        del os.environ[WAITING[0]]
