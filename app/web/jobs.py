"""`Jobs`: Gradio's queue of requests, mended and watched.

Gradio 6.31 ends the task that starts jobs, for good, when it wants to tell a waiting client its place and has no
mailbox for it. That happens after a request with an empty session hash (its mailbox is filed under the empty name, its
job under another), and after 2,000 other sessions. `docs/reference/http-api.md` describes the fault.
"""

import asyncio
import time
from collections import Counter, OrderedDict
from typing import Any

import gradio as gr
from gradio.queueing import Event
from gradio.server_messages import ProcessCompletedMessage

from app.web.calls import DEVICE

UNHEARD_S = 30.0
"""Time after which a job is dropped if no client listens to it."""
_MAX_MAILBOXES = 2000


class Mailboxes(OrderedDict[str, "asyncio.Queue[Any]"]):
    """Messages for each session. Whoever waits for a job keeps the mailbox; a message without one is dropped."""

    def __init__(self, jobs: "Jobs"):
        super().__init__()
        self._jobs = jobs

    def __setitem__(self, session: str, mailbox: "asyncio.Queue[Any]") -> None:
        if session not in self and len(self) >= _MAX_MAILBOXES:
            busy = self._jobs.busy_sessions()
            self.pop(next((each for each in self if each not in busy), session), None)
        super().__setitem__(session, mailbox)

    def __missing__(self, session: str) -> "asyncio.Queue[Any]":
        return asyncio.Queue()

    def __delitem__(self, session: str) -> None:
        if session in self:  # two streams of one session may both end
            super().__delitem__(session)


class Jobs:
    """The jobs of an app, waiting and running. Call it after `gr.Blocks.queue` and before `launch`.

    Args:
        app: the app.

    Attributes:
        listening: for each session, the streams of results that are open.
        present: for each session, the other connections that are open, which last as long as a page or a client.
    """

    def __init__(self, app: gr.Blocks):
        self._app, self._queue = app, app._queue
        self.listening: Counter[str] = Counter()
        self.present: Counter[str] = Counter()
        mailboxes: Any = Mailboxes(self)
        self._queue.pending_messages_per_session = mailboxes

    @property
    def alive(self) -> bool:
        """Whether waiting jobs will be started."""
        return not self._queue.stopped and self._app.server.thread.is_alive()

    def waiting(self) -> list[Event]:
        """Jobs that have not begun."""
        return [event for line in list(self._queue.event_queue_per_concurrency_id.values()) for event in line.queue]

    def running(self) -> list[Event]:
        """Jobs under way."""
        return [event for jobs in self._queue.active_jobs if jobs is not None for event in jobs if event.alive]

    def waiting_for_device(self) -> int:
        """Number of jobs that would generate music if there were room."""
        line = self._queue.event_queue_per_concurrency_id.get(DEVICE["concurrency_id"])
        return 0 if line is None else len(line.queue)

    def busy_sessions(self) -> set[str]:
        """Sessions with a job, waiting or running, or with a stream of results."""
        return {event.session_hash for event in (*self.waiting(), *self.running())} | set(+self.listening)

    def of_session(self, session: str) -> int:
        """Number of jobs of a session."""
        return sum(event.session_hash == session for event in (*self.waiting(), *self.running()))

    def waiting_of(self, address: str) -> int:
        """Number of waiting jobs of an address."""
        return sum(_address(event) == address for event in self.waiting())

    def unheard_of(self, address: str) -> int:
        """Number of jobs of an address whose client is not connected."""
        return sum(
            _address(event) == address and not self._is_heard(event) for event in (*self.waiting(), *self.running())
        )

    def knows(self, session: str) -> bool:
        """Whether there is a mailbox for a session."""
        return session in self._queue.pending_messages_per_session

    def session_of(self, job: str) -> str:
        """The session of a job, from its id; a job without a session of its own goes by its id."""
        event = self._queue.event_ids_to_events.get(job)
        if event is not None:
            return event.session_hash
        pending = self._queue.pending_event_ids_session.items()
        return next((session for session, jobs in pending if job in jobs), job)

    async def drop_unheard(self) -> int:
        """Drop the jobs that no client has listened to for `UNHEARD_S`; their number."""
        latest_s = time.monotonic() - UNHEARD_S
        unheard = [
            event
            for event in (*self.waiting(), *self.running())
            if event.enqueue_time < latest_s and not self.listening[event.session_hash]
        ]
        for event in unheard:
            await self._queue.clean_events(event_id=event._id)
        return len(unheard)

    async def refuse_waiting(self, reason: str) -> None:
        """Tell all whose jobs wait that these will not be done."""
        for event in self.waiting():
            self._queue.send_message(event, ProcessCompletedMessage(output={"error": reason}, success=False))
            await self._queue.remove_from_queue(event._id)

    def _is_heard(self, event: Event) -> bool:
        return bool(self.listening[event.session_hash] or self.present[event.session_hash])


def _address(event: Event) -> str:
    return event.request.client.host if event.request.client else ""
