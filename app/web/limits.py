"""What one client may send: sizes, uploads an hour, jobs, and the shape of a request to join the queue."""

import json
import re
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from app.web.session import MAX_PROMPT_BYTES

MAX_JSON_BYTES = 256 * 2**10
MAX_UPLOAD_BYTES = MAX_PROMPT_BYTES + 64 * 2**10  # one file, and the headers of its form
MAX_MCP_BYTES = 2 * MAX_PROMPT_BYTES  # holds a file as base64
MAX_TIMELINE_BYTES = 2 * 2**20
"""A conversation, with all that was played in it."""
MAX_UPLOADED_BYTES = 50 * 2**20
"""What an address may upload in an hour."""
MAX_JOBS = 8
"""Jobs that a session may have, waiting or running."""
MAX_UNHEARD = 8
"""Jobs of an address whose clients are not connected."""
MAX_CONNECTIONS = 300
"""Requests of an address that may be open at once."""
_MAX_UPLOADS_AT_ONCE = 8  # they are held in memory until they are complete
_LEAST_COUNTED_BYTES = 64 * 2**10  # so that small files are not too many
_HOUR_S = 3600.0
_SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Refusal(Exception):
    """A request that is not passed on.

    Args:
        status: HTTP status.
        reason: what was expected and what came, in words.
    """

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class UploadQuota:
    """The bytes that each address has uploaded in the last hour."""

    def __init__(self) -> None:
        self._uploads: dict[str, deque[tuple[float, int]]] = {}
        self._open: Counter[str] = Counter()

    def check(self, address: str) -> None:
        """Refuse an address that has uploaded its share.

        Raises:
            Refusal: it must wait.
        """
        recent = self._recent(address)
        if sum(size for _, size in recent) >= MAX_UPLOADED_BYTES:
            wait_min = (recent[0][0] + _HOUR_S - time.monotonic()) / 60
            most = MAX_UPLOADED_BYTES // 2**20
            raise Refusal(429, f"at most {most} MB of files are taken an hour; try again in {wait_min:.0f} minutes")

    @contextmanager
    def room(self, address: str) -> Iterator[None]:
        """Let an address upload, within this context.

        Raises:
            Refusal: the address has uploaded its share, or uploads too much at once.
        """
        self.check(address)
        if self._open[address] >= _MAX_UPLOADS_AT_ONCE:
            raise Refusal(429, f"at most {_MAX_UPLOADS_AT_ONCE} files are taken at once")
        self._open[address] += 1
        try:
            yield
        finally:
            self._open[address] -= 1
            self._open += Counter()  # forget addresses without any

    def add(self, address: str, size: int) -> None:
        """Count an upload of so many bytes."""
        self._uploads.setdefault(address, deque()).append((time.monotonic(), max(size, _LEAST_COUNTED_BYTES)))

    def _recent(self, address: str) -> deque[tuple[float, int]]:
        uploads = self._uploads.get(address, deque())
        while uploads and uploads[0][0] < time.monotonic() - _HOUR_S:
            uploads.popleft()
        if not uploads:
            self._uploads.pop(address, None)
        return uploads


def read_body(body: bytes) -> dict[str, Any]:
    """Read the JSON object that a request must hold.

    Raises:
        Refusal: it is something else.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the request must be a JSON object in UTF-8") from error
    if not isinstance(values, dict):
        raise Refusal(400, "the request must be a JSON object")
    return values


def check_session(session: object) -> str:
    """Check a session hash, the name that a client gives itself.

    Raises:
        Refusal: it is missing, empty, too long or has other characters.
    """
    if not isinstance(session, str) or not _SESSION.fullmatch(session):
        raise Refusal(400, "session_hash must be a text of 1 to 64 letters, digits, - or _")
    return session


def check_values(values: Mapping[str, Any], expected: int, endpoint: str) -> None:
    """Check that a request carries the values of an endpoint, as a list in `data`.

    Raises:
        Refusal: it does not.
    """
    data = values.get("data")
    if not isinstance(data, list):
        raise Refusal(400, f"data must be a list with the {expected} values of {endpoint}")
    if len(data) != expected:
        raise Refusal(400, f"{endpoint} takes {expected} values, in the order of /gradio_api/info; got {len(data)}")
    if values.get("batched"):
        raise Refusal(400, "batched must be false")
