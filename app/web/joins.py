"""`Joins`: which requests may enter Gradio's queue, call a handler, or listen to results."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import parse_qs

import gradio as gr

from app.web.jobs import Jobs
from app.web.limits import MAX_JOBS, MAX_UNHEARD, Refusal, check_session, check_values, read_body

_PATIENCE_S = 4.0  # a client connects right after it has joined, and gives up after 5 s without an answer
_POLL_S = 0.05


class Joins:
    """Checks the requests that name a session, a handler or a job.

    Args:
        app: the page and the API.
        jobs: its queue.
        queue_size: number of jobs of an address that may wait.
    """

    def __init__(self, app: gr.Blocks, jobs: Jobs, queue_size: int):
        self._jobs, self._queue_size = jobs, queue_size
        self._handlers = app.fns
        self._endpoints = {fn.api_name: fn for fn in app.fns.values() if fn.api_visibility == "public"}
        self._joining: Counter[str] = Counter()

    @asynccontextmanager
    async def call(self, route: str, body: bytes, address: str) -> AsyncIterator[bytes]:
        """Check a request that starts a handler; the body to pass on, within this context.

        Args:
            route: the path after /gradio_api/.
            body: of the request.
            address: of the client.

        Raises:
            Refusal: it is malformed, or the client has too many jobs.
        """
        values = read_body(body)
        named = route.partition("/")[2].removeprefix("v2/").strip("/") if not route.startswith("queue/") else ""
        session = values.get("session_hash")
        if session is not None or route.startswith("queue/"):
            check_session(session)
        self._check_handler(route, named, values)
        checked = json.dumps(values).encode()  # so that Gradio cannot read it in another way
        if route.startswith(("run/", "api/")):  # answered at once
            yield checked
            return
        if not self._jobs.alive:
            raise Refusal(503, "the server is being stopped; try again in a minute")
        await self._check_number(session, address)
        self._joining[address] += 1
        try:
            yield checked
        finally:
            self._joining[address] -= 1
            self._joining += Counter()  # forget addresses without any

    def _check_handler(self, route: str, named: str, values: dict[str, Any]) -> None:
        if named in ("", "predict") and "fn_index" in values:
            number = values["fn_index"]
            handler = self._handlers.get(number) if type(number) is int else None
            if handler is None:
                raise Refusal(404, "fn_index must be the number of one of the handlers in /config")
        else:
            handler = self._endpoints.get(named)
            if handler is None or "fn_index" in values:
                known = ", ".join(f"/{name}" for name in self._endpoints)
                raise Refusal(404, f"there is no endpoint of this name; there are {known}")
        if route.startswith("call/v2/"):
            self._check_names(named, handler, values)
        else:
            name = f"/{handler.api_name}" if handler.api_visibility == "public" else "this handler"
            check_values(values, len(handler.inputs), name)

    def _check_names(self, named: str, handler: Any, values: dict[str, Any]) -> None:
        known = list(handler.input_parameter_names or ())
        unknown = sorted(set(values) - set(known) - {"session_hash"})
        if unknown:
            raise Refusal(400, f"/{named} takes {', '.join(known) or 'nothing'}; it does not know {unknown[0][:40]}")

    async def _check_number(self, session: str | None, address: str) -> None:
        if session is not None and self._jobs.of_session(session) >= MAX_JOBS:
            raise Refusal(429, f"at most {MAX_JOBS} jobs are taken from a client at a time; wait for one to finish")
        if self._jobs.waiting_of(address) >= self._queue_size:
            raise Refusal(503, "too many jobs from your address are waiting; try again in a minute")
        end_s = time.monotonic() + _PATIENCE_S
        while not self._may_join(session, address):
            if time.monotonic() > end_s:
                raise Refusal(429, "too many jobs whose results nobody has asked for; ask for them first")
            self._jobs.others_wait = True
            await asyncio.sleep(_POLL_S)

    def _may_join(self, session: str | None, address: str) -> bool:
        if session is not None and self._jobs.is_heard(session):
            return True
        return self._jobs.unheard_of(address) + self._joining[address] < MAX_UNHEARD

    @contextmanager
    def listening(self, route: str, query: str) -> Iterator[None]:
        """Check a request that listens to results or keeps a session alive, while it is open.

        Raises:
            Refusal: there is no such session or job.
        """
        if route.startswith("heartbeat/"):
            session, open_ones = check_session(route.removeprefix("heartbeat/").strip("/")), self._jobs.present
        else:
            if route.startswith("call/"):
                session = self._jobs.session_of(route.rstrip("/").rpartition("/")[2])
            else:
                session = check_session((parse_qs(query).get("session_hash") or [None])[0])
            if not self._jobs.knows(session):
                raise Refusal(404, "this session has no job, or its results are gone; start one first")
            open_ones = self._jobs.listening
        open_ones[session] += 1
        try:
            yield
        finally:
            open_ones[session] -= 1
            if not open_ones[session]:
                del open_ones[session]
