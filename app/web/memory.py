"""What a server does so that its memory stays together: hints to glibc, which do nothing elsewhere."""

import ctypes
import sys
from typing import Any

_M_ARENA_MAX = -8  # in glibc's malloc.h


def share_pools() -> None:
    """Has all threads share two pools of memory; it must run before there are threads.

    By default glibc gives threads up to eight pools a core, and each keeps what was freed in it: a server whose
    requests are answered by ever other threads then grows by a megabyte a request until all of them are large.
    """
    _call("mallopt", _M_ARENA_MAX, 2)


def give_back() -> None:
    """Gives freed memory back to the system at once."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    function: Any = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
