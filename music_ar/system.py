"""What of the machine this process may use, CPU cores and memory, and where compiled programs are kept."""

import contextlib
import os
from pathlib import Path

import platformdirs

CGROUP = Path("/sys/fs/cgroup")  # of a container: its own
_MEMORY_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # version 2, version 1
_CPU_QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))


def usable_cores() -> int:
    """Count the CPU cores that this process may use: fewer than the machine has in a container or under taskset.

    A quota of 2.5 cores counts as 2: threads that wait for each other lose by a third that is stopped half of the time.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # not on every platform
    cores = [len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1]
    for names in _CPU_QUOTAS:
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
            quota_us, period_us = map(int, " ".join((CGROUP / name).read_text() for name in names).split())
            if quota_us > 0:  # -1 is no quota
                cores.append(max(1, quota_us // period_us))
    return min(cores)


def usable_memory() -> int | None:
    """Bytes of memory that this process may use: the machine's, or less in a container. None if it is not known."""
    if not hasattr(os, "sysconf"):  # not on every platform
        return None
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
            limits.append(int((CGROUP / name).read_text()))
    return min(limits)


def keep_compiled_programs() -> None:
    """Have JAX keep compiled programs, small ones too, between runs. Call it before JAX is imported."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", platformdirs.user_cache_dir("music-ar", appauthor=False))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
