"""What the web page does with music, without the page: sessions, takes, files. `app.web` shows it.

One `Studio` owns the generator, and so the device; each browser tab or API client has a `Session` of its own. Whoever
calls `generate` or `extend` sees to it that only one of them runs at a time, as Gradio's queue does.
"""

import dataclasses
import io
import json
import math
import secrets
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlencode

import jax
import numpy as np

from app.console import clock
from app.web.memory import give_back
from music_ar import Generator, MidiError, Performance, read_midi, write_midi
from music_ar.audio.synthesis import write_audio
from music_ar.decoding import decoder as decoding
from music_ar.decoding.sampling import SamplingOptions
from music_ar.generator import DEFAULT_SPEED, MAESTRO_TOKENS_PER_S, MAX_SEED, Chunk, Composition
from music_ar.tokens.codec import decode, encode

AUTO = 0
"""The latent budget that stands for "auto"."""
MAX_VARIATIONS = 8
MAX_SECONDS = 3600.0
MAX_SESSIONS = 500  # what the server remembers; the longest unused are forgotten
MAX_PROMPT_BYTES = 2 * 2**20
MAX_PROMPT_NOTES = 50_000
MAX_PROMPT_SECONDS = 3600.0
MAX_SOUND_SECONDS = 1800.0  # a sound file of this length takes half a gigabyte to render

FileKind = Literal["mid", "wav", "mp3", "zip"]

_BUDGETS = (256, 512, 1024, 2048)  # that "auto" may take; with 64 it is hardly faster, and costs 0.16 nats a token
_LIKELY_NOTES = (100, 50, 800, 1600, 20)  # of prompts, one for each size that is compiled beside the examples
_LIKELY_VARIATIONS = (1, 2, 4, 3, 8, 6, 5, 7)  # in the order in which they are measured
_MOST_PROGRAMS = 6  # each that is compiled holds 50 to 140 MB
_LIVE_COMPOSITIONS = 4
_MAX_TAKES = 30
_SECONDS_BETWEEN_TAKES = 0.4  # a small model is faster than a page can draw


class StudioError(ValueError):
    """Something the page was asked for and cannot do; the message is shown to the person."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a person can choose, as it is stored beside the music and in links.

    Attributes:
        seconds: music to make after the prompt.
        latents: the latent budget, or `AUTO`.
        variations: pieces to make at once.
        temperature, top_p, top_k, min_p, steadiness: see `music_ar.sampling`.
        seed: of the first variation; None takes a random one.
        start_s, end_s: the part of the prompt to use; None is its end.
        continuation_only: leave the prompt out of what is shown and downloaded.
        prompt: what the prompt is called; a new piece has none.
    """

    seconds: float = 60.0
    latents: int = AUTO
    variations: int = 1
    temperature: float = 1.0
    top_p: float = 0.97
    top_k: int = 0
    min_p: float = 0.0
    steadiness: float = 0.25
    seed: int | None = None
    start_s: float = 0.0
    end_s: float | None = None
    continuation_only: bool = False
    prompt: str = ""

    def __post_init__(self) -> None:
        # They come from a browser or a file, so whole numbers may be 4.0 and anything may be anything.
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _read(field.name, getattr(self, field.name)))
        _expect("seconds", "seconds", self.seconds, 1, MAX_SECONDS)
        _expect("variations", "", self.variations, 1, MAX_VARIATIONS)
        _expect("start_s", "seconds", self.start_s, 0, MAX_PROMPT_SECONDS)
        if self.end_s is not None and not self.start_s < self.end_s:
            raise StudioError(f"the prompt must end after it starts, got {self.start_s:g} s to {self.end_s:g} s")
        if self.seed is not None:
            _expect("seed", "", self.seed, 0, MAX_SEED - MAX_VARIATIONS)

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Settings":
        """From a settings file or a link; what is not told keeps its default, and unknown names are ignored.

        Raises:
            StudioError: a value is impossible.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def link(self) -> str:
        """The query that brings these settings back when it is added to the page's address."""
        default = Settings()
        told = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        return "?" + urlencode(told)

    def sampling(self) -> SamplingOptions:
        """How tokens are drawn."""
        return SamplingOptions.of(vars(self))


def _read(name: str, value: Any) -> Any:
    whole = name in ("latents", "variations", "top_k", "seed")
    if value in (None, "", "None") and name in ("seed", "end_s"):
        return None
    if name == "prompt":
        return str(value)[:200]
    if name == "continuation_only":
        return value in (True, "True", "true", "1")
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (whole and number != int(number)):
        got = "nothing" if value in (None, "") else repr(value)
        raise StudioError(f"{_IN_WORDS.get(name, name)} must be a {'whole ' * whole}number, got {got}")
    return int(number) if whole else number


_IN_WORDS = {
    "seconds": "the length",
    "latents": "the latent budget",
    "variations": "the number of variations",
    "top_p": "top-p",
    "top_k": "top-k",
    "min_p": "min-p",
    "seed": "the seed",
    "start_s": "the start of the prompt",
    "end_s": "the end of the prompt",
}


def _expect(name: str, unit: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise StudioError(f"{_IN_WORDS[name]} must lie in {least:g} to {most:g} {unit}".rstrip() + f", got {value:g}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Take:
    """A result, finished or not: what `undo` goes back to.

    Attributes:
        number: which run of the session made it.
        piece: what it extends has the same number, so that the sound goes on through an extension.
        pieces: one a variation, with the prompt.
        until_s: one a variation: until when it is known.
        final_s: one a variation: notes that begin before are as they will stay.
        join_s: where the prompt ends.
        seeds: one a variation.
        latents: the budget that was used.
        settings: what was asked for, with the seed that was used.
    """

    number: int
    piece: int
    pieces: tuple[Performance, ...]
    until_s: tuple[float, ...]
    final_s: tuple[float, ...]
    join_s: float
    seeds: tuple[int, ...]
    latents: int
    settings: Settings

    def shown(self, variation: int) -> Performance:
        """What is shown, heard and downloaded of a variation."""
        return self.pieces[variation].crop(self.from_s)

    @property
    def from_s(self) -> float:
        """When what is shown begins, in the time of `pieces`."""
        return self.join_s if self.settings.continuation_only else 0.0


class Session:
    """One tab of the page, or one API client.

    Attributes:
        prompt: the whole prompt, None for a new piece.
        prompt_name: what it is called.
        takes: what was made, the last one shown.
        chosen: the variation that is heard, extended and downloaded.
        chosen_at: when it was chosen last, by the page's clock.
        reading: what is shown and heard while the prompt is read: the prompt; None once something is made.
        status: what is going on or was done, in words.
        run: the run that goes on, None if none does.
        runs: how many there were.
        gone: the tab is closed.
    """

    def __init__(self) -> None:
        self.prompt: Performance | None = None
        self.prompt_name = ""
        self.takes: list[Take] = []
        self.chosen = 0
        self.chosen_at = 0.0
        self.reading: Take | None = None
        self.status = ""
        self.run: object | None = None
        self.runs = 0
        self.gone = False

    @property
    def making(self) -> bool:
        """Whether a run goes on."""
        return self.run is not None

    @property
    def take(self) -> Take:
        """The take that is shown.

        Raises:
            StudioError: nothing was made yet.
        """
        if not self.takes:
            raise StudioError("there is no music yet: press Generate first")
        return self.takes[-1]

    def set_prompt(self, data: bytes | None, name: str = "") -> None:
        """Takes a MIDI file as the prompt, or none.

        Raises:
            StudioError: it is not a usable MIDI file.
        """
        if data is None:
            self.prompt, self.prompt_name = None, ""
            return
        try:
            self.prompt = read_midi(
                data, max_bytes=MAX_PROMPT_BYTES, max_notes=MAX_PROMPT_NOTES, max_seconds=MAX_PROMPT_SECONDS
            )
        except MidiError as error:
            raise StudioError(
                f"“{name}” cannot be used: {error}. Please give a standard MIDI file (.mid) with piano notes."
            ) from error
        self.prompt_name = name

    def stop(self) -> None:
        """Ends the run at its next chunk, and keeps what is there."""
        if self.run is not None:
            self.run = self.reading = None
            self.status = "Stopped." + (f" {_told(self.take)}" if self.takes else "")

    def undo(self) -> None:
        """Goes back to the take before.

        Raises:
            StudioError: there is none.
        """
        if self.making:
            raise StudioError("press Stop first: music is being made")
        if len(self.takes) < 2:
            raise StudioError("there is nothing to undo")
        self.takes.pop()
        self.chosen = min(self.chosen, len(self.take.pieces) - 1)
        self.status = f"Undone. {_told(self.take)}"

    def choose(self, variation: int, at: float = math.inf) -> None:
        """Chooses a variation of the take.

        Args:
            variation: its number, from 0.
            at: when it was chosen, by the page's own clock; choices may arrive in any order, and the latest counts.
        """
        if at < self.chosen_at:
            return
        self.chosen_at = at if at < math.inf else self.chosen_at
        if self.takes and 0 <= variation < len(self.take.pieces):
            self.chosen = variation


class Studio:
    """The generator, and what the machine can do with it.

    Args:
        generator: makes the music.
        curve: rows of `curve.json`: the nats a token that each latent budget costs, if they are known.

    Attributes:
        warm: whether `warm_up_further` is through.
    """

    def __init__(self, generator: Generator, curve: list[dict[str, Any]] | None = None):
        self.generator = generator
        self.most_latents = generator.model.config.latents
        self._nats = {
            int(row["latents"]): float(row["nats_per_token"])
            for row in curve or []
            if row.get("mode", "sliding") == "sliding"
        }
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        # Each belongs to the session's newest take and can go on from where that stands.
        self._live: OrderedDict[Session, Composition] = OrderedDict()
        self._lock = threading.Lock()
        self.warm = False
        self._measuring = threading.Lock()
        self._measured = {1}
        self._runs = 0
        self._programs: set[tuple[int, int]] = set()

    def session(self, name: str) -> Session:
        """The session of this name, a new one if need be; the one longest unused is forgotten."""
        with self._lock:
            session = self._sessions.setdefault(name, Session())
            self._sessions.move_to_end(name)
            oldest = None if len(self._sessions) <= MAX_SESSIONS else next(iter(self._sessions))
        if oldest is not None:
            self.forget(oldest)
        return session

    def forget(self, name: str) -> None:
        """Ends what a session does, and lets go of all that it holds."""
        with self._lock:
            session = self._sessions.pop(name, None)
        if session is not None:
            session.gone = True
            running, session.run = session.making, None
            if not running:  # or else the run lets go, once it sees that it is to end
                self._let_go(session)

    def warm_up(self, prompts: Iterable[Path] = ()) -> None:
        """Measures this machine, and compiles what new pieces and prompts like these need, so that nobody waits for it.

        Prompts of half their length and dense or calm ones of their length are covered, too.
        """
        whole = list(map(read_midi, prompts))
        for prompt in (None, *whole, *(prompt.crop(0, prompt.duration_s / 2) for prompt in whole)):
            for latents in {self._auto(None, 1), self._auto(prompt, 1)}:
                self._try(prompt, latents)

    def warm_up_further(self, prompts: Iterable[Path], ended: threading.Event) -> None:
        """The same for other prompts and for more variations, whenever nobody makes music, until `ended` is set.

        What was compiled is let go of again, since it takes much memory, but for what `warm_up` does. It lies in JAX's
        cache on the disk and is loaded from there when it is needed.
        """
        for notes in _LIKELY_NOTES:
            if self._wait_until_idle(ended):
                self._try(_steady(notes), self._auto(None, 1))
        for variations in _LIKELY_VARIATIONS:
            for latents in sorted({min(budget, self.most_latents) for budget in (64, *_BUDGETS)}):
                while self._wait_until_idle(ended):
                    runs = self._runs
                    with self._measuring:
                        self._make_room(latents, variations)
                        self.generator.seconds_per_token(latents, variations, again=True)
                    if self._runs == runs:  # or else somebody's music took its share of the machine meanwhile
                        break
            if not ended.is_set():
                self._measured.add(variations)
        if self._wait_until_idle(ended):
            self._let_go_of_programs()
            self.warm_up(prompts)
            self.warm = True

    def _make_room(self, latents: int, variations: int) -> None:
        """Lets go of what was compiled for other budgets and numbers of variations, if it is much."""
        program = decoding.ring_size(latents), variations
        if program not in self._programs and len(self._programs) >= _MOST_PROGRAMS:
            self._let_go_of_programs()
        self._programs.add(program)

    def _let_go_of_programs(self) -> None:
        self._programs.clear()
        jax.clear_caches()
        give_back()

    def _wait_until_idle(self, ended: threading.Event) -> bool:
        """Waits until nobody makes music; False once `ended` is set."""
        while not ended.is_set():
            with self._lock:
                busy = any(session.making for session in self._sessions.values())
            if not busy:
                return True
            ended.wait(0.5)
        return False

    def _try(self, prompt: Performance | None, latents: int) -> None:
        self._make_room(latents, 1)
        for _ in self.generator.stream(prompt, seconds=0.01, latents=latents, seed=0):
            pass

    def _auto(self, prompt: Performance | None, variations: int) -> int:
        """The largest budget that keeps ahead of playback, even if the music gets denser than its prompt."""
        with self._measuring if variations not in self._measured else nullcontext():
            budget = self.generator.calibrate(DEFAULT_SPEED, variations=variations)
            if prompt is not None:
                budget = min(budget, self.generator.calibrate(DEFAULT_SPEED, encode(prompt), variations=variations))
        self._measured.add(variations)
        return max(budget, min(_BUDGETS[0], self.most_latents))

    def knows(self, variations: int) -> bool:
        """Whether it is known how fast so many variations are made at once."""
        return variations in self._measured

    def tokens_per_s(self, latents: int, variations: int = 1) -> float:
        """About how fast each of some variations is made with a latent budget, by what was measured."""
        least, most = min(64, self.most_latents), self.most_latents
        slow_s, fast_s = (self.generator.seconds_per_token(n, variations) for n in (most, least))
        share = (latents - least) / max(most - least, 1)
        return 1 / max(fast_s + share * (slow_s - fast_s), 0.5 * fast_s)

    def cost(self, latents: int, variations: int = 1, prompt: Performance | None = None) -> str:
        """What a latent budget costs and gives here, in a line; "auto" depends on how dense the prompt is."""
        if not self.knows(variations):
            return f"What {variations} variations at once cost here is being measured …"
        budget = self._auto(prompt, variations) if latents == AUTO else max(2, latents)
        each = self.tokens_per_s(budget, variations)
        text = f"{budget} latents: about {variations * each:.0f} tokens/s, {each / MAESTRO_TOKENS_PER_S:.1f}× real time"
        if variations > 1:
            text += f" in each of {variations} variations"
        if self._nats:
            known = min(self._nats, key=lambda n: abs(math.log(n / budget)))
            more = self._nats[known] - min(self._nats.values())
            text += f", NLL {more:+.2f}" if more >= 0.005 else ", NLL at its best"
        if each < MAESTRO_TOKENS_PER_S:
            text += "; playback will have to wait for it"
        if latents == AUTO:
            return f"**auto** — as coherent as possible while staying ahead of playback; here {text}"
        return text

    def generate(self, session: Session, settings: Settings) -> Iterator[Take]:
        """Makes new pieces from the session's prompt, take by take; each replaces the one before it.

        The first take is there at once and has the prompt alone, or nothing if the prompt is to be left out.

        Raises:
            StudioError, GenerationError: it cannot be done as asked.
        """
        run = self._begin(session)
        try:
            session.status = "Reading the prompt …" if session.prompt else "Beginning …"
            self._let_go(session)
            settings = dataclasses.replace(settings, prompt=session.prompt_name)
            prompt, cut_s = _cropped(session.prompt, settings)
            if settings.seed is None:
                settings = dataclasses.replace(settings, seed=secrets.randbelow(MAX_SEED - MAX_VARIATIONS + 1))
            part = prompt if prompt is None or cut_s is None else prompt.crop(0, cut_s)
            session.reading = _heard_first(part or Performance.empty(), settings, session.runs)
            yield session.reading
            latents = self._auto(part, settings.variations) if settings.latents == AUTO else settings.latents
            self._make_room(latents, settings.variations)
            composition = self.generator.compose(
                prompt,
                prompt_seconds=cut_s,
                latents=latents,
                options=settings.sampling(),
                seed=settings.seed,
                variations=settings.variations,
            )
            session.chosen = 0
            yield from self._stream(session, run, composition, settings, composition.prompt_s, session.runs)
        finally:
            self._end(session, run)

    def extend(self, session: Session, seconds: float) -> Iterator[Take]:
        """Goes on with the chosen variation, from its caches if they still live; the first take is what there was.

        Raises:
            StudioError, GenerationError: there is nothing to go on with, or it cannot be done as asked.
        """
        take, chosen = session.take, session.chosen
        settings = dataclasses.replace(take.settings, seconds=seconds, variations=1, seed=take.seeds[chosen])
        run = self._begin(session)
        try:
            session.status = "Going on …"
            yield take
            self._make_room(take.latents, 1)
            composition = self._live.get(session)
            goes_on = composition is not None and session.runs - 1 == take.number
            if goes_on and composition is not None and not composition.ended[chosen]:
                composition.keep([chosen])
            else:  # its caches are gone, or the person went back, or the piece had ended: it is read again
                self._let_go(session)
                composition = self.generator.compose(
                    take.pieces[chosen],
                    latents=take.latents,
                    options=settings.sampling(),
                    seed=(settings.seed or 0) + len(session.takes),  # or else it would draw the same again
                )
            session.chosen = 0
            yield from self._stream(session, run, composition, settings, take.join_s, take.piece)
        finally:
            self._end(session, run)

    def _begin(self, session: Session) -> object:
        self._runs += 1
        session.run = object()  # a run that still goes on sees it and ends
        session.runs += 1
        return session.run

    def _end(self, session: Session, run: object) -> None:
        if session.run is run:
            session.run = session.reading = None
        if session.gone:
            self._let_go(session)

    def _let_go(self, session: Session) -> None:
        with self._lock:
            composition = self._live.pop(session, None)
        if composition is not None:
            composition.close()

    def _stream(
        self,
        session: Session,
        run: object,
        composition: Composition,
        settings: Settings,
        join_s: float,
        piece: int,
    ) -> Iterator[Take]:
        with self._lock:
            self._live[session] = composition
            self._live.move_to_end(session)
            crowd = [] if len(self._live) <= _LIVE_COMPOSITIONS else [next(iter(self._live))]
        for other in crowd:
            self._let_go(other)
        before = list(session.takes)[-_MAX_TAKES:]
        began_s, shown_s = time.monotonic(), -math.inf
        for chunk in composition.stream(settings.seconds):
            if session.run is not run:  # stopped, or the page is gone; what was shown last stays
                return
            if not chunk.finished and time.monotonic() < shown_s + _SECONDS_BETWEEN_TAKES:
                continue
            shown_s = time.monotonic()
            take = Take(
                number=session.runs,
                piece=piece,
                pieces=chunk.performances,
                until_s=tuple(map(max, (made.duration_s for made in chunk.performances), chunk.final_s)),
                final_s=(math.inf,) * len(chunk.seeds) if chunk.finished else chunk.final_s,
                join_s=join_s,
                seeds=chunk.seeds,
                latents=composition.latents,
                settings=settings,
            )
            session.takes, session.reading = [*before, take], None
            session.status = _progress(chunk, composition.latents) if not chunk.finished else ""
            if chunk.finished:
                session.run = None
                session.status = f"Done in {clock(time.monotonic() - began_s)}. {_told(take)}"
            yield take


def _steady(notes: int) -> Performance:
    """Some notes, one after another; each makes four tokens."""
    onset_s = 0.2 * np.arange(notes)
    pitch = 60 + np.arange(notes) % 12
    return Performance(onset_s=onset_s, offset_s=onset_s + 0.1, pitch=pitch, velocity=np.full(notes, 64))


def _heard_first(prompt: Performance, settings: Settings, number: int) -> Take:
    """A take of the prompt alone: it sounds while it is read, and what is made will go on from it."""
    notes = decode(encode(prompt))  # with the times that the take after it will give them
    return Take(
        number=number,
        piece=number,
        pieces=(notes,) * settings.variations,
        until_s=(notes.duration_s,) * settings.variations,
        final_s=(0.0,) * settings.variations,
        join_s=notes.duration_s,
        seeds=tuple((settings.seed or 0) + row for row in range(settings.variations)),
        latents=settings.latents,
        settings=settings,
    )


def _cropped(prompt: Performance | None, settings: Settings) -> tuple[Performance | None, float | None]:
    """The prompt from where it is to begin, and how much of it to use, None for all."""
    if prompt is None:
        return None, None
    whole = settings.start_s == 0 and (settings.end_s is None or settings.end_s >= prompt.duration_s)
    if whole:
        return prompt, None
    part = prompt.crop(settings.start_s)
    end_s = prompt.duration_s if settings.end_s is None else settings.end_s
    if not len(part.crop(0, end_s - settings.start_s)):
        raise StudioError(
            f"no note begins between {settings.start_s:g} s and {end_s:g} s of the prompt; choose a part with notes"
        )
    return part, end_s - settings.start_s


def _progress(chunk: Chunk, latents: int) -> str:
    pace = (chunk.seconds_wanted - chunk.seconds_made) / chunk.eta_s if chunk.eta_s > 0 else 0.0
    return (
        f"{chunk.seconds_made:.0f} of {chunk.seconds_wanted:.0f} s · {chunk.tokens_per_s:.0f} tokens/s · "
        f"{pace:.1f}× real time · {clock(chunk.eta_s)} left · {latents} latents · {_seeds(chunk.seeds)}"
    )


def _told(take: Take) -> str:
    lengths = " / ".join(clock(take.shown(n).duration_s) for n in range(len(take.pieces)))
    return f"{lengths} of music, {take.latents} latents, {_seeds(take.seeds)}."


def _seeds(seeds: tuple[int, ...]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"


def write_file(session: Session, kind: str, folder: Path) -> Path:
    """Writes the chosen variation, or with "zip" all of them with the settings, into a folder of its own.

    Raises:
        StudioError: there is no music, or too much for a sound file.
    """
    if kind not in get_args(FileKind):
        raise StudioError(f"a download is one of {', '.join(get_args(FileKind))}, got {kind!r}")
    take = session.take
    if kind == "zip":
        path = folder / f"music-ar-{take.seeds[0]}.zip"
        path.write_bytes(_zipped(take))
        return path
    piece, seed = take.shown(session.chosen), take.seeds[session.chosen]
    if not len(piece):
        raise StudioError("there are no notes in this variation yet")
    path = folder / f"music-ar-{seed}.{kind}"
    if kind == "mid":
        write_midi(piece, path)
        return path
    if piece.duration_s > MAX_SOUND_SECONDS:
        raise StudioError(f"sound is made of at most {MAX_SOUND_SECONDS:g} s of music; download the MIDI file")
    write_audio(piece, path, title=f"Music AR, seed {seed}", comment=f"seed {seed}, {take.latents} latents")
    return path


def _zipped(take: Take) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as files:
        settings = vars(take.settings) | {"latents_used": take.latents, "seeds": take.seeds}
        files.writestr("settings.json", json.dumps(settings, indent=2))
        for number, seed in enumerate(take.seeds):
            piece = take.shown(number)
            if not len(piece):
                continue
            midi, sound = io.BytesIO(), io.BytesIO()
            write_midi(piece, midi)
            files.writestr(f"{number + 1}-seed-{seed}.mid", midi.getvalue())
            if piece.duration_s <= MAX_SOUND_SECONDS:
                write_audio(piece, sound, format="mp3", title=f"Music AR, seed {seed}")
                files.writestr(f"{number + 1}-seed-{seed}.mp3", sound.getvalue())
    return archive.getvalue()
