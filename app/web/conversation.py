"""`Conversation`: one duet on the server. What was played so far, the model's state after it, the answer under way."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from app.web.answer import LONGEST_S, Answer, read_settled
from app.web.log import LOG
from app.web.manager import SessionManager
from app.web.settings import AUTO, SAMPLING, WebError, in_words
from app.web.timeline import Refused, Timeline, event, seconds
from music_ar import GenerationError
from music_ar.decoding.live import LiveState
from music_ar.decoding.request import MAX_SEED

_AHEAD_S = 5.0  # of the client's clock: what a person does not hear need not be made
_ANSWER_S = 20.0
_LEAD_S = 0.15  # for decoding the first notes, and for their way to the client
_MOST_LEAD_S = 5.0

Post = Callable[[dict[str, Any]], None]


class Device(Protocol):
    """Where the model runs."""

    manager: SessionManager

    async def run(self, conversation: "Conversation", work: Callable[[], Any]) -> Any:
        """Do some work on the device, when it is this conversation's turn."""
        ...

    def others(self, conversation: "Conversation") -> int:
        """How many others the device is shared with."""
        ...

    def check_room(self) -> None:
        """Raise `Refused` if too many are being answered."""
        ...


class Conversation:
    """A duet. All methods are called from the server's event loop; only the model's work is done in other threads.

    Args:
        device: where the model runs.
        latents: latent budget, or `AUTO`.

    Attributes:
        name: by which a client finds it again; it cannot be guessed.
        timeline: what was played and heard so far.
        live: the model's state.
        latents: latent budget.
        answers: the highest number of an answer so far.
        answer: the answer under way, or None.
        latest: the latest answer, which may still be heard after it was made.
        post: sends a message to the client; None if none is connected.
        leave: closes the client's connection, with a code and a reason; None if none is connected.
        left_s: when the last client left, by the monotonic clock.
    """

    def __init__(self, device: Device, latents: int):
        self.name = secrets.token_urlsafe(24)
        self.timeline = Timeline()
        machine = device.manager.machine
        self.latents = machine.auto_budget(None, 1) if latents == AUTO else latents
        self.live = LiveState(machine.generator.decoder, latents=self.latents)
        self.answers = 0
        self.answer: Answer | None = None
        self.latest: Answer | None = None
        self.post: Post | None = None
        self.leave: Callable[[int, str], Awaitable[None]] | None = None
        self.left_s = time.monotonic()
        self._device = device
        self._chunk = machine.generator.decoder.backend.chunk_tokens(1)
        self._one_at_a_time = asyncio.Lock()  # of what changes the model's state
        self._changed = asyncio.Event()  # the answer under way has ended
        self._reading: asyncio.Task[None] | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self._unread = False

    @property
    def working(self) -> bool:
        """Whether the model's state is in use, or has something to read."""
        return self._one_at_a_time.locked() or self._unread

    def play(self, events: object) -> None:
        """Take what the person has played. A key that goes down ends the answer under way.

        Raises:
            Refused: it is malformed.
        """
        touches = self.timeline.play(events)
        first_s = next((touch.time_s for touch in touches if touch.kind == "on"), None)
        if first_s is not None:
            self._silence(first_s)
        self.read_on()

    def replace(self, timeline: Timeline) -> None:
        """Continue with another timeline."""
        self._over("silenced")
        self.timeline, self.latest = timeline, None
        self.read_on()

    def silence(self, values: Mapping[str, Any]) -> None:
        """End the latest answer where the person no longer heard it.

        Raises:
            Refused: the values are malformed.
        """
        heard_s = seconds(values.get("heard"), "heard")
        if self.latest is not None and values.get("id") == self.latest.number:
            self._silence(heard_s)
            self.read_on()

    def ask(self, values: Mapping[str, Any]) -> None:
        """Begin an answer; one that is under way ends there.

        Raises:
            WebError: the values are malformed, or too many others are being answered.
        """
        number = values.get("id")
        if isinstance(number, bool) or not isinstance(number, int) or not self.answers < number < 2**53:
            raise Refused("message", f"id must be a whole number above {self.answers}, got {in_words(number)}")
        asked_s = seconds(values.get("from"), "from")
        last_s = self._last_s()
        if asked_s < last_s:
            raise Refused("order", f"an answer cannot begin at {asked_s:g} s, before the last event at {last_s:g} s")
        length_s = seconds(values.get("seconds", _ANSWER_S), "seconds", LONGEST_S)
        lead_s = seconds(values.get("lead", _LEAD_S), "lead", _MOST_LEAD_S)
        chosen = {name: values[name] for name in (*SAMPLING, "seed") if name in values}
        settings = self._device.manager.settings(chosen, text=False)
        self.timeline.check_size()
        if self.answer is None:
            self._device.check_room()
        self._silence(asked_s)
        self.answers = number
        self.answer = self.latest = Answer(
            number=number,
            asked_s=asked_s,
            at_s=asked_s + lead_s,
            seconds=length_s,
            sampling=settings.sampling,
            seed=secrets.randbelow(MAX_SEED) if settings.seed is None else settings.seed,
            first=len(self.timeline.answered),
        )
        task = asyncio.create_task(self._answer(self.answer))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    def stop(self, why: str) -> None:
        """End the answer under way where it is."""
        self._over(why)

    def read_on(self) -> None:
        """Let the model read what is new, as soon as it can."""
        self._unread = True
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())

    def _last_s(self) -> float:
        """The last event, not counting what of the latest answer lies ahead."""
        if self.latest is None:
            return self.timeline.last_s
        played = self.timeline.played
        asked_s = self.latest.asked_s
        return max(self.timeline.notes.duration_s, played[-1].time_s if played else 0.0, asked_s)

    async def _read(self) -> None:
        while self._unread and self.answer is None:
            self._unread = False
            async with self._one_at_a_time:
                if self.answer is not None:
                    return
                timeline = self.timeline.copied()
                try:
                    await self._device.run(self, lambda timeline=timeline: read_settled(self.live, timeline))
                except WebError:  # the server is being stopped
                    return
                except Exception:
                    LOG.exception("a fault while reading a conversation")
                    self.live.free()
                    return

    async def _answer(self, answer: Answer) -> None:
        began_s = time.monotonic()
        self._tell(type="answering", id=answer.number, at=answer.at_s, others=self._device.others(self))
        try:
            async with self._one_at_a_time:
                timeline = self.timeline.copied()
                made = await self._made(answer, lambda: answer.begin(self.live, timeline, self._chunk))
                while made and not answer.over:
                    ahead_s = answer.until_s - answer.asked_s - (time.monotonic() - began_s)
                    await self._wait(answer, ahead_s - _AHEAD_S)
                    made = await self._made(answer, lambda: answer.more(self.live, self._chunk))
            if self.answer is answer:
                self._over(answer.over or "ended")
        except (GenerationError, WebError) as error:
            self._fail(answer, str(error))
        except Exception:
            LOG.exception("a fault while answering")
            self.live.free()
            self._fail(answer, "the server made a mistake; its log has more")
        finally:
            self.read_on()

    async def _made(self, answer: Answer, work: Callable[[], list[Any]]) -> bool:
        """Make the next events of an answer and send them; false if nobody wants them any more."""
        if self.answer is not answer:
            return False
        events = await self._device.run(self, work)
        if self.answer is not answer:
            return False
        self.timeline.answered += events
        written = [event(*each) for each in events]
        self._tell(type="music", id=answer.number, events=written, until=round(answer.until_s, 4))
        return self.answer is answer

    async def _wait(self, answer: Answer, wait_s: float) -> None:
        if wait_s > 0 and self.answer is answer:
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _fail(self, answer: Answer, reason: str) -> None:
        if self.answer is answer:
            self._tell(type="error", code="failed", message=reason)
            self._over("failed")

    def _silence(self, heard_s: float) -> None:
        """End the latest answer at a time, if it reaches beyond that."""
        latest = self.latest
        if latest is None or not (self.answer is latest or heard_s < self.timeline.last_answered_s):
            return
        heard_s = max(heard_s, latest.asked_s)  # earlier answers are not cut
        self.timeline.cut(heard_s, latest.first)
        self._over("silenced", heard_s)

    def _over(self, why: str, at_s: float | None = None) -> None:
        """End the answer under way: at a time, or where it is."""
        answer, self.answer = self.answer, None
        if answer is None:
            return
        self._changed.set()
        self._changed = asyncio.Event()
        if at_s is None:
            at_s = answer.until_s
            self.timeline.cut(at_s, answer.first)
        LOG.info("answer of %.1f s: %s", max(at_s - answer.at_s, 0.0), why)
        self._tell(type="end", id=answer.number, at=round(at_s, 4), why=why)

    def _tell(self, **message: Any) -> None:
        if self.post is not None:
            self.post(message)
