"""The web page of the shipped model in a process of its own, for the benchmarks that open it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def served() -> Iterator[tuple[str, int]]:
    """Runs `music-ar web` and gives its address and its process id, once the model is warm.

    Raises:
        RuntimeError: it ended without an address.
    """
    process = subprocess.Popen([sys.executable, "-m", "app.cli", "web"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise RuntimeError("the page did not start")
        yield found[0], process.pid
    finally:
        process.terminate()
        process.wait()
