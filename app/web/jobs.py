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
from gradio.queueing import Event, EventQueue, Queue
from gradio.server_messages import ProcessCompletedMessage

from app.web.calls import DEVICE

UNHEARD_S = 30.0
"""Time after which a job is dropped if no client listens to it."""
_UNHEARD_WHILE_OTHERS_WAIT_S = 2.0
_MAX_MAILBOXES = 2000


def device_line(queue: Queue) -> EventQueue | None:
    """The jobs that wait for the device; None before the first."""
    return queue.event_queue_per_concurrency_id.get(DEVICE["concurrency_id"])


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
        others_wait: whether a request to join has been held since `drop_unheard`.
    """

    def __init__(self, app: gr.Blocks):
        self._app, self._queue = app, app._queue
        self.listening: Counter[str] = Counter()
        self.present: Counter[str] = Counter()
        self.others_wait = False
        queue: Any = self._queue
        queue.pending_messages_per_session = Mailboxes(self)
        self._first_in_line = queue.get_events
        queue.get_events = self._next

    @property
    def alive(self) -> bool:
        """Whether waiting jobs will be started."""
        return not self._queue.stopped and self._app.server.thread.is_alive()

    def waiting(self) -> list[Event]:
        """Jobs that have not begun."""
        return [event for line in list(self._queue.event_queue_per_concurrency_id.values()) for event in line.queue]

    def running(self) -> list[Event]:
        """Jobs under way."""
        return [event for jobs in self._queue.active_jobs if jobs is not None for event in jobs]

    def waiting_for_device(self) -> int:
        """Number of jobs that would generate music if there were room."""
        line = device_line(self._queue)
        return 0 if line is None else len(line.queue)

    def busy_sessions(self) -> set[str]:
        """Sessions with a job, waiting or running, or with a stream of results."""
        return {event.session_hash for event in (*self.waiting(), *self.running())} | set(+self.listening)

    def of_session(self, session: str) -> int:
        """Number of jobs of a session."""
        return sum(event.session_hash == session for event in (*self.waiting(), *self.running()))

    def waiting_of(self, address: str) -> int:
        """Number of waiting jobs of an address whose clients are connected."""
        return sum(_address(event) == address and self.is_heard(event.session_hash) for event in self.waiting())

    def unheard_of(self, address: str) -> int:
        """Number of jobs of an address whose client is not connected."""
        return sum(
            _address(event) == address and not self.is_heard(event.session_hash)
            for event in (*self.waiting(), *self.running())
        )

    def knows(self, session: str) -> bool:
        """Whether there is a mailbox for a session."""
        return session in self._queue.pending_messages_per_session

    def is_heard(self, session: str) -> bool:
        """Whether a client is connected that will ask for the results of a session, or does."""
        return bool(self.listening[session] or self.present[session])

    def session_of(self, job: str) -> str:
        """The session of a job, from its id; a job without a session of its own goes by its id."""
        event = self._queue.event_ids_to_events.get(job)
        if event is not None:
            return event.session_hash
        pending = self._queue.pending_event_ids_session.items()
        return next((session for session, jobs in pending if job in jobs), job)

    def _next(self) -> Any:
        """The jobs to start now: Gradio's choice, of those who listen first, and one of each session at a time."""
        line = device_line(self._queue)
        if line is None:
            return self._first_in_line()
        busy = {event.session_hash for event in self.running() if event.concurrency_id == line.concurrency_id}
        later = [event for event in line.queue if event.session_hash in busy]
        line.queue[:] = [event for event in line.queue if event.session_hash not in busy]
        line.queue.sort(key=lambda event: not self.is_heard(event.session_hash))
        chosen = self._first_in_line()
        line.queue += later
        return chosen

    async def drop_unheard(self) -> int:
        """Drop the jobs that no client has listened to for `UNHEARD_S`, sooner if others wait; their number."""
        others_wait = self.others_wait or any(self.is_heard(event.session_hash) for event in self.waiting())
        self.others_wait = False
        unheard = [
            event for event in (*self.waiting(), *self.running()) if event.alive and self._is_late(event, others_wait)
        ]
        for event in unheard:
            self._empty_mailbox(event)
            self._refuse(event, "nobody asked for the results of this job in time; start it again")
            await self._queue.clean_events(event_id=event._id)
        return len(unheard)

    async def refuse_all(self, reason: str) -> None:
        """Tell all clients that their jobs will not be done. Those under way must end by themselves."""
        for event in self.running():
            self._refuse(event, reason)
            event.alive = False  # nothing more is sent to its client
        for event in self.waiting():
            self._refuse(event, reason)
            await self._queue.remove_from_queue(event._id)

    def _refuse(self, event: Event, reason: str) -> None:
        self._queue.send_message(event, ProcessCompletedMessage(output={"error": reason}, success=False))

    def _empty_mailbox(self, event: Event) -> None:
        """Remove the messages of a job, which hold its music."""
        mailbox = self._queue.pending_messages_per_session[event.session_hash]
        for _ in range(mailbox.qsize()):
            message = mailbox.get_nowait()
            if message.event_id != event._id:
                mailbox.put_nowait(message)

    def _is_late(self, event: Event, others_wait: bool) -> bool:
        waited_s = time.monotonic() - event.enqueue_time
        if self.listening[event.session_hash]:
            return False
        return waited_s > UNHEARD_S or (
            others_wait and waited_s > _UNHEARD_WHILE_OTHERS_WAIT_S and not self.is_heard(event.session_hash)
        )


def _address(event: Event) -> str:
    return event.request.client.host if event.request.client else ""
