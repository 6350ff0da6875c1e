"""Serve the web page of a model in its own process, for the benchmarks that use it."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from gradio_client import Client


@contextmanager
def served(*, measure: bool = True, checkpoint: str | None = None) -> Iterator[tuple[str, int]]:
    """Run `music-ar web`; its address and its process id.

    Args:
        measure: wait until the server has measured the speed of several variations, which takes minutes.
        checkpoint: the model; default: the shipped one.

    Raises:
        RuntimeError: it ended without an address.
    """
    command = [sys.executable, "-m", "app.cli", "web", *([] if measure else ["--no-measure"])]
    command += [] if checkpoint is None else ["--checkpoint", checkpoint]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise RuntimeError("the page did not start")
        client = Client(found[0], verbose=False)
        while measure and not client.predict(api_name="/info")["warm"]:
            time.sleep(1)
        client.close()
        yield found[0], process.pid
    finally:
        process.terminate()
        process.communicate()
