"""glibc allocator settings for a long-running server; they do nothing on other systems."""

import ctypes
import sys
from typing import Any

_M_ARENA_MAX = -8  # from glibc's malloc.h


def share_arenas() -> None:
    """Make all threads allocate from two arenas. Call this before threads are started.

    By default glibc creates up to eight arenas per core, and each holds on to the memory freed in it. A server whose
    requests are answered by changing threads then grows by a megabyte per request until all arenas are large.
    """
    _call("mallopt", _M_ARENA_MAX, 2)


def release_freed_memory() -> None:
    """Return freed memory to the system at once."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    function: Any = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
