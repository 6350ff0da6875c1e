"""`Conversations`: all duets of a server, their limits, and their turns on the device."""

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from app.web.conversation import Conversation
from app.web.limits import Refusal
from app.web.manager import STOPPING, SessionManager
from app.web.settings import WebError
from app.web.timeline import Refused, Timeline

MAX_CONVERSATIONS = 100
MAX_CONNECTIONS = 64
MAX_OF_AN_ADDRESS = 8
"""Connections of one address."""
MAX_ANSWERS = 4
"""Conversations that are answered at once."""
MAX_LIVE = 4
"""Conversations whose caches stay on the device."""
FORGOTTEN_AFTER_S = 1800.0
_TIMELINE_BYTES, _TIMELINE_BYTES_PER_S = 6 * 2**20, 100 * 2**10  # of one address: the model must read them
_LEAST_COUNTED_BYTES = 20 * 2**10


class Bucket:
    """An allowance that fills up again with time.

    Args:
        most: what may be taken at once.
        per_s: how fast it fills up.
    """

    def __init__(self, most: float, per_s: float):
        self._most, self._per_s = most, per_s
        self._left, self._at_s = most, time.monotonic()

    def take(self, amount: float) -> bool:
        """Take something; false, and nothing is taken, if there is not enough."""
        self._fill()
        if amount > self._left:
            return False
        self._left -= amount
        return True

    @property
    def full(self) -> bool:
        """Whether it has filled up."""
        self._fill()
        return self._left >= self._most

    def _fill(self) -> None:
        now_s = time.monotonic()
        self._left = min(self._most, self._left + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s


class Conversations:
    """The duets of all clients. All methods are called from the server's event loop.

    Args:
        manager: the model and its machine, which the duets share with the sessions of the page.
    """

    def __init__(self, manager: SessionManager):
        self.manager = manager
        self._all: dict[str, Conversation] = {}
        self._live: OrderedDict[Conversation, None] = OrderedDict()
        self._connections: Counter[str] = Counter()
        self._openings: dict[str, Bucket] = {}
        # Each conversation does one thing at a time, so no more threads are needed than conversations at work.
        self._threads = ThreadPoolExecutor(max_workers=2 * MAX_ANSWERS, thread_name_prefix="conversation")

    @contextmanager
    def connected(self, address: str) -> Iterator[None]:
        """Count a connection, within this context.

        Raises:
            Refusal: there are too many.
        """
        if self._connections[address] >= MAX_OF_AN_ADDRESS:
            raise Refusal(429, f"at most {MAX_OF_AN_ADDRESS} conversations are open from your address; close one")
        if self._connections.total() >= MAX_CONNECTIONS:
            raise Refusal(503, "too many people are playing here now; try again later")
        self._connections[address] += 1
        try:
            yield
        finally:
            self._connections[address] -= 1
            self._connections += Counter()  # forget addresses without any

    def check_timeline(self, address: str, size: int) -> None:
        """Count the bytes with which an address opens or replaces a conversation.

        Raises:
            Refused: there are too many of them.
        """
        if len(self._openings) > MAX_CONVERSATIONS:
            self._openings = {each: bucket for each, bucket in self._openings.items() if not bucket.full}
        bucket = self._openings.setdefault(address, Bucket(_TIMELINE_BYTES, _TIMELINE_BYTES_PER_S))
        if not bucket.take(max(size, _LEAST_COUNTED_BYTES)):
            raise Refused("rate", "too many conversations were opened or changed from your address; wait a little")

    def open(self, values: dict[str, Any]) -> tuple[Conversation, bool]:
        """Find a conversation, or begin one; and whether it was found.

        Raises:
            WebError: the values are malformed.
        """
        if self.manager.stopping:
            raise Refused("stopping", STOPPING)
        timeline = None if values.get("timeline") is None else Timeline.read(values["timeline"])
        session = values.get("session")
        found = self._all.get(session) if isinstance(session, str) else None
        if found is None:
            settings = self.manager.settings({"latents": values.get("latents", 0)}, text=False)
            self._make_room()
            conversation = Conversation(self, settings.latents)
            self._all[conversation.name] = conversation
        else:
            conversation = found
        if timeline is not None:
            conversation.replace(timeline)
        elif found is not None:
            conversation.stop("lost")
        return conversation, found is not None

    def of(self, name: str) -> Conversation | None:
        """The conversation of this name."""
        return self._all.get(name)

    def forget_old(self) -> None:
        """Forget the conversations that nobody has been connected to for long. The server calls this now and then."""
        latest_s = time.monotonic() - FORGOTTEN_AFTER_S
        for conversation in [each for each in self._all.values() if each.post is None and each.left_s < latest_s]:
            self._forget(conversation)

    def check_room(self) -> None:
        """Check that one more conversation can be answered.

        Raises:
            Refused: too many are.
        """
        if sum(each.answer is not None for each in self._all.values()) >= MAX_ANSWERS:
            raise Refused("busy", f"{MAX_ANSWERS} others are being answered; ask again in a moment")

    def others(self, conversation: Conversation) -> int:
        """How many others the device is shared with: answers, and runs of the page."""
        answered = sum(each.answer is not None and each is not conversation for each in self._all.values())
        return answered + len(self.manager.in_progress())

    async def run(self, conversation: Conversation, work: Callable[[], Any]) -> Any:
        """Do some work on the device, when it is this conversation's turn.

        Raises:
            WebError: the server is being stopped.
        """
        if self.manager.stopping:
            raise WebError(STOPPING)
        self._live[conversation] = None
        self._live.move_to_end(conversation)
        for idle in [each for each in self._live if not each.working][: max(0, len(self._live) - MAX_LIVE)]:
            del self._live[idle]
            idle.live.free()
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._in_turn, work)

    def stop(self) -> None:
        """End all answers."""
        for conversation in self._all.values():
            conversation.stop("failed")
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _in_turn(self, work: Callable[[], Any]) -> Any:
        with self.manager.guest():
            return work()

    def _make_room(self) -> None:
        if len(self._all) >= MAX_CONVERSATIONS:
            alone = [each for each in self._all.values() if each.post is None]
            if not alone:
                raise Refused("busy", "too many people are playing here now; try again later")
            self._forget(min(alone, key=lambda each: each.left_s))

    def _forget(self, conversation: Conversation) -> None:
        conversation.stop("lost")
        del self._all[conversation.name]
        if conversation in self._live and not conversation.working:
            del self._live[conversation]
            conversation.live.free()
