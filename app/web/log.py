"""The log of the page: a line for each request and each job, on standard error."""

import logging
import queue
import sys
import time
from contextlib import suppress
from logging.handlers import QueueHandler, QueueListener

LOG = logging.getLogger("music_ar.web")
_MAX_LINES_WAITING = 10_000


class _Hand(QueueHandler):
    """Hands lines to the thread that writes them; drops them if nobody reads what it writes."""

    def enqueue(self, record: logging.LogRecord) -> None:
        with suppress(queue.Full):
            self.queue.put_nowait(record)


def start_log() -> "queue.Queue[logging.LogRecord]":
    """Write log lines to standard error from now on, without ever making a request wait for that.

    Returns:
        The lines not yet written, for `finish_log`.
    """
    lines: queue.Queue[logging.LogRecord] = queue.Queue(_MAX_LINES_WAITING)
    writer = logging.StreamHandler(sys.stderr)
    writer.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    QueueListener(lines, writer).start()
    LOG.handlers = [_Hand(lines)]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    return lines


def finish_log(lines: "queue.Queue[logging.LogRecord]", timeout_s: float = 1.0) -> None:
    """Wait until the lines are written, but not for long."""
    end_s = time.monotonic() + timeout_s
    while not lines.empty() and time.monotonic() < end_s:
        time.sleep(0.01)
