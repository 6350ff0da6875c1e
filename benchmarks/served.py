"""The web page of the shipped model in a process of its own, for the benchmarks that open it."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from gradio_client import Client


@contextmanager
def served() -> Iterator[tuple[str, int]]:
    """Runs `music-ar web` and gives its address and its process id, once it has measured all that it measures.

    Raises:
        RuntimeError: it ended without an address.
    """
    process = subprocess.Popen([sys.executable, "-m", "app.cli", "web"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise RuntimeError("the page did not start")
        client = Client(found[0], verbose=False)
        while not client.predict(api_name="/info")["warm"]:
            time.sleep(1)
        client.close()
        yield found[0], process.pid
    finally:
        process.terminate()
        process.wait()
