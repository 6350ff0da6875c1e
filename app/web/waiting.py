"""Who waits for the device: the place of a session in Gradio's queue, in words."""

from gradio.queueing import Queue

from app.console import clock
from app.web.jobs import device_line
from app.web.manager import SessionManager


def waiting_in_words(queue: Queue, manager: SessionManager, name: str) -> str | None:
    """The place of a session in the queue and when its turn comes; None if it does not wait.

    Args:
        queue: of the app.
        manager: knows how long the runs in progress still take.
        name: of the session.
    """
    device = device_line(queue)
    names = [] if device is None else [event.session_hash for event in device.queue]
    if name not in names:
        return None
    rank = names.index(name)
    wait_s = _wait_s(manager, rank)
    place = "next" if rank == 0 else f"number {rank + 1}"
    if wait_s is None:
        return f"Other pieces come first: you are {place}."
    return f"Other pieces come first: you are {place}, in about {clock(wait_s)}."


def _wait_s(manager: SessionManager, rank: int) -> float | None:
    """Estimated time until one after `rank` others gets its turn; these may take as long as those in progress."""
    runs = sorted((session.left_s, session.run_s) for session in manager.in_progress() if session.left_s is not None)
    if not runs:
        return None
    left_s, run_s = runs[rank % len(runs)]
    return left_s + rank // len(runs) * run_s
