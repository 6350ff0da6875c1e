"""The sessions of all tabs and API clients, and the one generator they share."""

import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from app.console import clock
from app.web.log import LOG
from app.web.session import Revision, Session, prompt_revision, seeds_in_words
from app.web.settings import AUTO, MAX_VARIATIONS, Settings, WebError
from app.web.turns import Turns
from app.web.warmup import Activity, Machine
from music_ar import Chunk, Performance
from music_ar import Session as Generation
from music_ar.decoding.request import MAX_SEED

MAX_SESSIONS = 500  # beyond that, the least recently used is forgotten
_MAX_GENERATIONS = 4  # whose caches stay on the device, so that their music can be extended from there
LONG_RUN_S = 120.0  # of the device: a run that has had more ends if others wait for their first turn
STOPPING = "the server is being stopped: try again when it is back"
_STAYS_S = 60.0  # a session whose tab is closed: the browser may ask, and the user may stay
_SECONDS_BETWEEN_REVISIONS = 0.4  # a small model generates faster than a page can draw


class SessionManager:
    """Generates music for all sessions.

    Several may call `generate` or `extend` at once: their runs take turns on the device, chunk by chunk.

    Args:
        machine: the generator, and its speed on this machine.

    Attributes:
        activity: whether a session is generating music.
        others_wait: number of requests for music that have not begun.
        stopping: whether the server is being stopped; runs then end with an error.
    """

    def __init__(self, machine: Machine):
        self.machine = machine
        self.activity = Activity(lambda: bool(self._guests or self.in_progress()))
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        # Each belongs to the newest revision of its session and continues from there.
        self._generations: OrderedDict[Session, Generation] = OrderedDict()
        self._lock = threading.Lock()
        self._turns = Turns()
        self._guests: set[object] = set()
        self.others_wait: Callable[[], int] = lambda: 0
        self.stopping = False

    def settings(self, values: Mapping[str, Any], *, text: bool = True) -> Settings:
        """Read settings that this model can meet; see `Settings.read`.

        Raises:
            WebError: a value has the wrong type, or is out of range.
        """
        return Settings.read(values, text=text, most_latents=self.machine.most_latents)

    def session(self, name: str) -> Session:
        """The session with this name; a new one if there is none."""
        with self._lock:
            session = self._sessions.setdefault(name, Session())
            session.calls += 1
            self._sessions.move_to_end(name)
            forgotten = self._least_wanted() if len(self._sessions) > MAX_SESSIONS else None
        if forgotten is not None:
            self.forget(forgotten)
        return session

    def _least_wanted(self) -> str | None:
        """The session to forget: the one used least recently, rather one without music, never one that makes some."""
        idle = [name for name, session in list(self._sessions.items())[:-1] if not session.generating]
        empty = (name for name in idle if not (self._sessions[name].revisions or self._sessions[name].prompt))
        return next(empty, idle[0] if idle else None)

    def leave(self, name: str) -> None:
        """Stop a session's run, and forget the session if it is not used again soon."""
        with self._lock:
            session = self._sessions.get(name)
        if session is None:
            return
        generating = session.generating
        session.stop()
        if not generating:  # otherwise they are in use until the chunk in progress ends
            self.free_caches(session)
        session.left = session.calls, time.monotonic()

    def forget_left(self) -> None:
        """Forget the sessions that were left and not used again since. The server calls this now and then."""
        latest_s = time.monotonic() - _STAYS_S
        with self._lock:
            gone = [
                name for name, each in self._sessions.items() if each.left[0] == each.calls and each.left[1] < latest_s
            ]
        for name in gone:
            self.forget(name)

    def forget(self, name: str) -> None:
        """End a session's run and free everything it holds."""
        with self._lock:
            session = self._sessions.pop(name, None)
        if session is not None:
            session.closed = True
            generating, session.run = session.generating, None
            if not generating:  # otherwise the run frees its caches when it ends
                self.free_caches(session)

    def generate(self, session: Session, settings: Settings, again: Performance | None = None) -> Iterator[Revision]:
        """Generate new pieces from the prompt of a session, revision by revision; each replaces the one before it.

        The first revision comes at once. It holds the prompt alone, or nothing if the prompt is to be left out.

        Args:
            session: gets the music.
            settings: what was asked for.
            again: the prompt of an earlier piece, to be used in place of that of the session, empty for none; or the
                piece itself, to fill a part of it.

        Raises:
            WebError, GenerationError: it cannot be done as asked.
        """
        asked = f"{settings.seconds:g} s, variations: {settings.variations}"
        with self._run(session, "Reading the prompt …" if session.prompt else "Starting …", asked) as run:
            prompt, prompt_seconds = session.cropped_prompt(settings) if again is None else _earlier(again, settings)
            seed = secrets.randbelow(MAX_SEED - MAX_VARIATIONS + 1) if settings.seed is None else settings.seed
            name = session.prompt_name if again is None else settings.prompt
            settings = settings.model_copy(update={"prompt": name, "seed": seed})
            part = prompt if prompt is None or prompt_seconds is None else prompt.crop(0, prompt_seconds)
            session.chosen = 0  # from now on the user may choose
            session.reading = prompt_revision(part or Performance.empty(), settings, run)
            session.begins_s = session.reading.join_s
            yield session.reading
            if settings.latents == AUTO and not self.machine.knows(settings.rows):
                session.status = f"Timing {settings.rows} pieces at once on this machine, once: a minute or two …"
                yield session.reading
            with self._turns.turn((session, run)):
                if session.run != run:
                    return
                self.free_caches(session)
                latents = settings.latents
                if latents == AUTO:
                    latents = self.machine.auto_budget(part, settings.rows)
                self.machine.make_room(latents, settings.rows)
                generation = self.machine.generator.session(
                    self.machine.spend(settings.request(prompt, prompt_seconds, latents))
                )
                self._keep_caches(session, generation)
            yield from self._revisions(session, run, generation, settings, generation.prompt_s, run)

    def extend(self, session: Session, seconds: float, at_s: float | None = None) -> Iterator[Revision]:
        """Continue the chosen variation. The first revision yielded is the one being continued.

        Args:
            session: has the music.
            seconds: length of the music to add.
            at_s: where to cut the shown part of the music before; None continues at its end.

        Raises:
            WebError, GenerationError: there is no music yet, or it cannot be done as asked.
        """
        revision, chosen = session.revision, session.chosen
        if at_s is not None:
            revision, chosen = revision.cut(chosen, at_s), 0
        seed = revision.seeds[chosen]
        settings = revision.settings.model_copy(
            update={"seconds": seconds, "variations": 1, "seed": seed, "fill": False}
        )
        continues = session.runs == revision.number and not revision.settings.fill
        with self._run(session, "Continuing …", f"{seconds:g} s more") as run:
            session.begins_s = revision.until_s[chosen]
            if at_s is not None:  # shown as what the new music replaces, which is kept
                session.reading, session.chosen = revision, 0
            yield revision
            with self._turns.turn((session, run)):
                if session.run != run:
                    return
                self.machine.make_room(revision.latents, settings.rows)
                generation = self._generations.get(session)
                if continues and generation is not None and not generation.ended[chosen]:
                    generation.keep([chosen])
                else:  # the caches are gone, the piece has ended by itself, or the user pressed Undo: read it again
                    self.free_caches(session)
                    another_seed = seed + len(session.revisions)  # the same one would sample the same notes again
                    request = settings.model_copy(update={"seed": another_seed})
                    generation = self.machine.generator.session(
                        self.machine.spend(request.request(revision.pieces[chosen], None, revision.latents))
                    )
                self._keep_caches(session, generation)
            session.chosen = 0
            yield from self._revisions(session, run, generation, settings, revision.join_s, revision.piece)

    def free_caches(self, session: Session) -> None:
        """Free the caches of a session. Its music can still be extended, after being read again."""
        with self._lock:
            generation = self._generations.pop(session, None)
        if generation is not None:
            generation.close()

    @contextmanager
    def guest(self) -> Iterator[None]:
        """Use the device outside of a run, for no longer than a chunk takes; wait for it if need be."""
        guest = object()
        self._guests.add(guest)
        self.activity.runs += 1
        self._turns.begin(guest)
        try:
            with self._turns.turn(guest):
                yield
        finally:
            self._turns.end(guest)
            self._guests.discard(guest)

    def in_progress(self) -> list[Session]:
        """The sessions that generate music."""
        with self._lock:
            return [session for session in self._sessions.values() if session.generating]

    def _sharing(self) -> str:
        """What makes a run slower than usual, in words."""
        others = len(self.in_progress()) - 1
        if others == 1:
            return " · sharing the machine with 1 other"
        return f" · sharing the machine with {others} others" if others > 1 else ""

    @contextmanager
    def _run(self, session: Session, status: str, asked: str) -> Iterator[int]:
        """Begin a run and end it, however it ends; its number."""
        if self.stopping:
            raise WebError(STOPPING)
        self.activity.runs += 1
        run, began_s, ended = session.begin(status), time.monotonic(), "ended by an error"
        session.status += self._sharing()
        self._turns.begin((session, run))
        try:
            yield run
            ended = "stopped" if session.run is None and session.status.startswith("Stopped") else "done"
        except GeneratorExit:
            ended = "left by its client"
            raise
        finally:
            self._turns.end((session, run))
            session.end(run)
            if session.closed:
                self.free_caches(session)
            LOG.info("job of %s: %s in %.1f s", asked, ended, time.monotonic() - began_s)

    def _keep_caches(self, session: Session, generation: Generation) -> None:
        with self._lock:
            self._generations[session] = generation
            self._generations.move_to_end(session)
            idle = [each for each in self._generations if not each.generating]
            surplus = idle[: max(0, len(self._generations) - _MAX_GENERATIONS)]
        for each in surplus:
            self.free_caches(each)

    def _revisions(
        self, session: Session, run: int, generation: Generation, settings: Settings, join_s: float, piece: int
    ) -> Iterator[Revision]:
        began_s, shown_s, used_s = time.monotonic(), -math.inf, 0.0
        chunks = generation.extend(settings.seconds)
        while session.run == run:  # otherwise stopped, or the tab was closed: the last revision shown stays
            if self.stopping:
                raise WebError(STOPPING)
            with self._turns.turn((session, run)):
                turn_s = time.monotonic()
                chunk = next(chunks, None) if session.run == run else None
                used_s += time.monotonic() - turn_s
            if chunk is None or session.run != run:
                return
            session.left_s, session.run_s = chunk.eta_s, time.monotonic() - began_s + chunk.eta_s
            over_long = used_s > LONG_RUN_S and not chunk.finished and self.others_wait() > 0
            last = chunk.finished or over_long
            if not last and time.monotonic() < shown_s + _SECONDS_BETWEEN_REVISIONS:
                continue
            shown_s = time.monotonic()
            revision = Revision(
                number=run,
                piece=piece,
                pieces=chunk.performances,
                until_s=tuple(
                    min(max(made.duration_s, final_s), generation.prompt_s + chunk.seconds_wanted)
                    for made, final_s in zip(chunk.performances, chunk.final_s, strict=True)
                ),
                final_s=chunk.final_s,
                join_s=join_s,
                seeds=chunk.seeds,
                latents=self.machine.budget_of(generation.setting),
                settings=settings,
            )
            session.show(revision)
            session.status = (
                _progress(chunk, generation.setting.in_words(self.machine.generator.config)) + self._sharing()
            )
            if last:
                session.end(run)
                revision = session.revision
                how = "Others are waiting, so it ended early; Extend goes on. " if over_long else ""
                session.status = f"{how}Done in {clock(time.monotonic() - began_s)}. {revision.summary()}"
            yield revision


def _earlier(again: Performance, settings: Settings) -> tuple[Performance | None, float | None]:
    """What `Session.cropped_prompt` gives, for an earlier piece or its prompt."""
    return (again if len(again) else None), (settings.start_s if settings.fill else None)


def _progress(chunk: Chunk, setting: str) -> str:
    speed = (chunk.seconds_wanted - chunk.seconds_made) / chunk.eta_s if chunk.eta_s > 0 else 0.0
    return (
        f"{clock(chunk.seconds_made)} of {clock(chunk.seconds_wanted)} of music · {clock(chunk.eta_s)} left · "
        f"{speed:.1f}× as fast as it plays · {setting} · {seeds_in_words(chunk.seeds)}"
    )
