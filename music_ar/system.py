"""CPU affinity, and where compiled programs are kept."""

import os

import platformdirs


def usable_cores() -> int:
    """Count the CPU cores that this process may use: fewer than the machine has in a container or under taskset."""
    if hasattr(os, "sched_getaffinity"):  # not on every platform
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_compiled_programs() -> None:
    """Have JAX keep compiled programs, small ones too, between runs. Call it before JAX is imported."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", platformdirs.user_cache_dir("music-ar", appauthor=False))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
