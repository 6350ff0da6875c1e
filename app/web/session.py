"""One user's session: the prompt, the results so far, the chosen variation, the run in progress."""

import dataclasses
import math
import secrets

from app.console import clock
from app.web.settings import MAX_PROMPT_SECONDS, Settings, WebError
from music_ar import MidiError, Performance
from music_ar.midi import read_prompt

MAX_PROMPT_BYTES = 2 * 2**20
MAX_PROMPT_NOTES = 50_000
_MAX_NAME_LENGTH = 200  # it becomes part of links
_MAX_REVISIONS = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Revision:
    """A result, finished or not. Undo returns to the previous one.

    Attributes:
        number: the run of the session that generated it, counted from 1.
        piece: number of the first revision of this piece. An extension keeps it, so that playback continues.
        pieces: one performance for each variation, prompt included.
        until_s: for each variation, the length known so far.
        final_s: for each variation, the time before which all notes have their final form.
        join_s: end of the prompt.
        seeds: one for each variation.
        latents: latent budget used.
        settings: what was asked for, with the seed used.
        takes: names of the variations, if the browser has named them; see `Session.take`.
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
    takes: tuple[str, ...] = ()

    @property
    def from_s(self) -> float:
        """Where the shown part of `pieces` begins."""
        return self.join_s if self.settings.continuation_only else 0.0

    def shown(self, variation: int) -> Performance:
        """The part of a variation that is shown, played and downloaded."""
        return self.pieces[variation].crop(self.from_s)

    def length_s(self, variation: int) -> float:
        """The length of the part of a variation that is shown, rounded as the player gets it."""
        return round(max(0.0, self.until_s[variation] - self.from_s), 3)

    def ended(self) -> "Revision":
        """This revision as the last one of its run: each piece ends with its last note, and all notes are final."""
        lengths_s = tuple(piece.duration_s for piece in self.pieces)
        return dataclasses.replace(self, until_s=lengths_s, final_s=(math.inf,) * len(self.pieces))

    def cut(self, variation: int, at_s: float) -> "Revision":
        """One variation, cut at a time of its shown part, to be continued from there.

        Raises:
            WebError: there is no note before.
        """
        until_s = at_s + self.from_s
        piece = self.pieces[variation].crop(0, until_s)
        if not len(piece):
            raise WebError("there is no note before the place to continue from: move the playhead further on")
        return dataclasses.replace(
            self,
            number=0,
            pieces=(piece,),
            until_s=(until_s,),
            final_s=(math.inf,),
            join_s=min(self.join_s, until_s),
            seeds=self.seeds[variation : variation + 1],
            takes=(),
        )

    def summary(self) -> str:
        """Lengths, latent budget and seeds in words."""
        lengths = " / ".join(clock(self.length_s(n)) for n in range(len(self.pieces)))
        return f"{lengths} of music, {self.latents} latents, {seeds_in_words(self.seeds)}."


def prompt_revision(prompt: Performance, settings: Settings, number: int) -> Revision:
    """The revision to show while the prompt is read: the prompt alone, so that it can be heard meanwhile.

    Args:
        prompt: the part of the prompt that is used; empty for a new piece.
        settings: what was asked for, with the seed.
        number: number of the run.
    """
    return Revision(
        number=number,
        piece=number,
        pieces=(prompt,) * settings.variations,
        until_s=(prompt.duration_s,) * settings.variations,
        final_s=(0.0,) * settings.variations,
        join_s=prompt.duration_s,
        seeds=tuple((settings.seed or 0) + row for row in range(settings.variations)),
        latents=settings.latents,
        settings=settings,
    )


def seeds_in_words(seeds: tuple[int, ...]) -> str:
    """One seed, or the first and the last of several."""
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"


class Session:
    """One tab of the page, or one API client.

    Attributes:
        name: part of the names of its takes; different for each session.
        prompt: the whole prompt; None for a new piece.
        prompt_name: its name.
        revisions: results; the last one is shown.
        chosen: the variation that is played, extended and downloaded.
        reading: revision shown while the prompt is read; None once music is generated.
        status: what is happening, or what happened last, in words.
        run: number of the run in progress, or None. A run ends when this is no longer its own number.
        runs: number of runs so far.
        begins_s: where the music of the run in progress begins in its piece.
        left_s: estimated seconds until the run in progress ends; None if not known.
        run_s: estimated seconds that it takes in all.
        calls: how often the page or the client has used this session.
        left: `calls` when its tab or client left, and the time, by the monotonic clock.
        closed: whether the tab is closed, or the session forgotten.
    """

    def __init__(self) -> None:
        self.name = secrets.token_hex(6)
        self.prompt: Performance | None = None
        self.prompt_name = ""
        self.revisions: list[Revision] = []
        self.chosen = 0
        self.reading: Revision | None = None
        self.status = ""
        self.run: int | None = None
        self.runs = 0
        self.begins_s = 0.0
        self.left_s: float | None = None
        self.run_s = 0.0
        self.calls = 0
        self.left: tuple[int, float] = (-1, 0.0)
        self.closed = False
        self._adopted = 0
        self._chosen_at_ms = 0.0
        self._chosen_before: dict[int, int] = {}  # by the number of a run: the variation chosen when it began

    @property
    def generating(self) -> bool:
        """Whether a run is in progress."""
        return self.run is not None

    @property
    def revision(self) -> Revision:
        """The revision that is shown.

        Raises:
            WebError: there is none yet.
        """
        if not self.revisions:
            raise WebError("there is no music yet: press Generate first")
        return self.revisions[-1]

    def set_prompt(self, data: bytes | None, name: str = "") -> None:
        """Use a MIDI file as the prompt, or none.

        Raises:
            WebError: it is not a usable MIDI file.
        """
        if data is None:
            self.prompt, self.prompt_name = None, ""
            return
        try:
            self.prompt = read_prompt(
                data, max_bytes=MAX_PROMPT_BYTES, max_notes=MAX_PROMPT_NOTES, max_seconds=MAX_PROMPT_SECONDS
            )
        except MidiError as error:
            raise WebError(
                f"“{name}” cannot be used: {error}. Choose a standard MIDI file (.mid) with piano notes."
            ) from error
        self.prompt_name = name[:_MAX_NAME_LENGTH]

    def cropped_prompt(self, settings: Settings) -> tuple[Performance | None, float | None]:
        """The prompt from `settings.start_s`, and how many seconds of it to use; None for all.

        To fill a part of it, all of the prompt, and the seconds before that part.

        Raises:
            WebError: no note begins in that part, or there is no prompt to fill a part of.
        """
        prompt = self.prompt
        if settings.fill:
            if prompt is None:
                raise WebError("there is no piece to fill a part of: choose one first")
            return prompt, settings.start_s
        if prompt is None:
            return None, None
        end_s = prompt.duration_s if settings.end_s is None else settings.end_s
        if settings.start_s == 0 and end_s >= prompt.duration_s:
            return prompt, None
        if settings.start_s >= prompt.duration_s:
            raise WebError(
                f"the prompt is {prompt.duration_s:.1f} s long, and the chosen part starts at {settings.start_s:g} s; "
                "let it start earlier"
            )
        rest, length_s = prompt.crop(settings.start_s), end_s - settings.start_s
        if not len(rest.crop(0, length_s)):
            raise WebError(
                f"no note begins between {settings.start_s:g} s and {end_s:g} s of the prompt; choose a part with notes"
            )
        return rest, length_s

    def begin(self, status: str) -> int:
        """Begin a run and return its number. This ends any run in progress."""
        self.runs += 1
        self.run, self.status, self.left_s = self.runs, status, None
        self._chosen_before[self.runs] = self.chosen
        return self.runs

    def end(self, run: int) -> None:
        """End a run, if it is still the one in progress."""
        if self.run == run:
            self._end_music()
            self.run, self.reading, self.status = None, None, ""

    def show(self, revision: Revision) -> None:
        """Show a revision. It replaces the newest one if that is from the same run."""
        kept = [earlier for earlier in self.revisions if earlier.number != revision.number]
        self.revisions, self.reading = [*kept[-_MAX_REVISIONS:], revision], None

    def stop(self) -> None:
        """End the run at its next chunk, and keep the music generated so far."""
        if self.generating:
            self._end_music()
            self.run = self.reading = None
            self.status = "Stopped." + (f" {self.revision.summary()}" if self.revisions else "")

    def _end_music(self) -> None:
        if self.revisions and self.revisions[-1].number == self.run:
            self.revisions[-1] = self.revisions[-1].ended()

    def undo(self) -> None:
        """Return to the previous revision, and to the variation that was chosen then.

        Raises:
            WebError: there is none, or a run is in progress.
        """
        if self.generating:
            raise WebError("music is being generated: press Stop first")
        if len(self.revisions) < 2:
            raise WebError("there is nothing to undo")
        undone = self.revisions.pop()
        self.chosen = min(self._chosen_before.pop(undone.number, 0), len(self.revision.pieces) - 1)
        self.status = f"Undone. {self.revision.summary()}"

    def take(self, revision: Revision, variation: int) -> str:
        """The name of a variation, under which the browser keeps it."""
        return revision.takes[variation] if revision.takes else f"{self.name}-{revision.number}-{variation}"

    def show_take(self, take: str) -> bool:
        """Show the revision that has this take again, and choose the take. False if there is none."""
        for revision in reversed(self.revisions):
            for variation in range(len(revision.pieces)):
                if self.take(revision, variation) == take:
                    self._show_last(revision, variation)
                    return True
        return False

    def adopt(self, revision: Revision) -> None:
        """Show music that the browser has kept, made in this session or an earlier one. Undo returns from it.

        Raises:
            WebError: a run is in progress.
        """
        if self.generating:
            raise WebError("music is being generated: press Stop first")
        if not self.show_take(self.take(revision, 0)):
            self._adopted += 1  # a number of its own, which is none of a run
            self._show_last(dataclasses.replace(revision, number=-self._adopted, piece=-self._adopted), 0)
        self.status = self.revision.summary()

    def _show_last(self, revision: Revision, variation: int) -> None:
        others = [each for each in self.revisions if each.number != revision.number]
        self.revisions = [*others[-_MAX_REVISIONS:], revision]
        self.chosen = variation

    def choose(self, variation: int, at_ms: float = math.inf) -> None:
        """Choose a variation of the revision shown, also while its prompt is still being read.

        Args:
            variation: its number, from 0.
            at_ms: when it was chosen, by the page's clock. Choices may arrive in any order; the latest wins.
        """
        if at_ms < self._chosen_at_ms:
            return
        self._chosen_at_ms = at_ms if at_ms < math.inf else self._chosen_at_ms
        shown = self.reading or (self.revisions[-1] if self.revisions else None)
        if shown is not None and 0 <= variation < len(shown.pieces):
            self.chosen = variation
