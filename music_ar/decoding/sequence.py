"""`Sequence`: the tokens of one piece as they are generated. Each token is processed once, however many follow."""

import dataclasses
import math
from collections.abc import Sequence as Many
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from music_ar.decoding.gap_request import GapRequest
from music_ar.midi.performance import Performance
from music_ar.midi.prompt_file import PromptFile
from music_ar.tokens import gaps, vocabulary
from music_ar.tokens.codec import event_steps, length_steps, lowest_velocity, pair_notes, quantize, velocity_bins


class _Columns(NamedTuple):
    """Some notes: onset and offset in seconds, pitch and velocity."""

    onset_s: np.ndarray
    offset_s: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray

    @classmethod
    def joined(cls, parts: "Many[_Columns]") -> "_Columns":
        numbers = np.zeros(0, np.int64)
        none = cls(np.zeros(0), np.zeros(0), numbers, numbers)
        return cls(*(np.concatenate(columns) for columns in zip(none, *parts, strict=True)))

    def select(self, kept: np.ndarray) -> "_Columns":
        return _Columns(*(column[kept] for column in self))

    def ended(self, step: int | np.ndarray) -> "_Columns":
        """The notes with their ends at a time step, but at least one step long."""
        offset_step = np.maximum(step, quantize(self.onset_s) + 1)
        return self._replace(offset_s=offset_step / vocabulary.STEPS_PER_SECOND)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Notes:
    """The notes of a piece at one moment; later tokens do not change them. Taking them costs the same at any length.

    Attributes:
        final_s: notes that begin before this time are complete, and later moments have them, too.
        join_s: where the prompt ends.
    """

    final_s: float
    join_s: float
    _final: list[_Columns]  # final notes in the order in which they became so; the sequence appends to it
    _count: int  # of its members at this moment
    _open: _Columns
    _prompt_file: PromptFile | None
    _gap: GapRequest | None

    def performance(self, until_s: float = math.inf, *, continuation_only: bool = False) -> Performance:
        """The piece: the prompt's own notes, then the generated ones. Notes that are held end at the last event.

        If the piece fills a gap, it is not cut, and what comes after the gap follows, unless that is left out.

        Args:
            until_s: cut the piece at this time.
            continuation_only: leave out what begins before `join_s`, and count time from there.
        """
        piece = self._performance([*self._final[: self._count], self._open], until_s, continuation_only)
        return piece if self._gap is None or continuation_only else self._gap.filled(piece)

    def added(
        self, earlier: "Notes | None", until_s: float = math.inf, *, continuation_only: bool = False
    ) -> Performance:
        """The notes that have become final since an earlier moment, or ever; see `performance`."""
        first = 0 if earlier is None else earlier._count
        return self._performance(self._final[first : self._count], until_s, continuation_only)

    def open(self, until_s: float = math.inf, *, continuation_only: bool = False) -> Performance:
        """The notes that are not final; see `performance`."""
        return self._performance([self._open], until_s, continuation_only)

    def _performance(self, parts: list[_Columns], until_s: float, continuation_only: bool) -> Performance:
        notes = _Columns.joined(parts)
        piece = Performance(
            onset_s=notes.onset_s,
            offset_s=notes.offset_s,
            pitch=notes.pitch,
            velocity=notes.velocity,
            prompt_file=None if continuation_only else self._prompt_file,
        )
        return piece.crop(self.join_s if continuation_only else 0, until_s if self._gap is None else math.inf)


class Sequence:
    """A piece in progress: its prompt, the tokens generated so far, and their notes.

    Args:
        prompt: tokens that it continues, beginning with `vocabulary.START`.
        performance: the notes of those tokens as they were played, and perhaps more that follow; default: as decoded.
        gap: the gap that the piece fills, whose tokens are the prompt; None if it fills none.

    Attributes:
        prompt: its tokens.
        prompt_time: time of their end, in steps of 10 ms from the start of the piece.
        time: of the last token.
        count: tokens generated.
        ended: whether it has ended on its own.
    """

    def __init__(
        self,
        prompt: Int[np.ndarray, " P"],
        performance: Performance | None = None,
        gap: GapRequest | None = None,
    ):
        self.prompt, self._gap = prompt, gap
        before = gaps.before_part(prompt)
        self.time = self.prompt_time = length_steps(before) if gap is None else gap.begin_step
        self.count, self.ended = 0, False
        self._tokens: list[np.ndarray] = []
        self._nats: list[np.ndarray] = []
        self._unread: list[np.ndarray] = []
        self._read_time, self._velocity_bin = self.time - length_steps(before), vocabulary.DEFAULT_VELOCITY_BIN
        self._final: list[_Columns] = []
        self._complete = self._held = _Columns.joined([])  # notes that are not final: with their ends, and still held
        self._prompt_file = None
        self._read_tokens(before)
        if performance is not None:
            self._take_prompt(performance)

    def add(
        self,
        tokens: Int[np.ndarray, " T"],
        nats: Float[np.ndarray, " T"] | None = None,
        *,
        limit_steps: int | None = None,
        max_tokens: int | None = None,
    ) -> bool:
        """Append tokens up to the one that reaches a limit, wherever chunks begin; `PAD` is skipped.

        Args:
            tokens: the next tokens.
            nats: -log p of each.
            limit_steps: most music after the prompt, in steps.
            max_tokens: most generated tokens.

        Returns:
            Whether a limit was reached or the piece ended.
        """
        real = tokens != vocabulary.PAD
        tokens = tokens[real]
        after = self.time + event_steps(np.append(tokens, vocabulary.PAD))[1:]  # the time after each token
        last = tokens == vocabulary.END
        if limit_steps is not None:
            last = last | (after - self.prompt_time >= limit_steps)
        if max_tokens is not None:
            last = last | (self.count + 1 + np.arange(len(tokens)) >= max_tokens)
        kept = int(last.argmax()) + 1 if last.any() else len(tokens)
        self._tokens.append(tokens[:kept])
        self._unread.append(tokens[:kept])
        if nats is not None:
            self._nats.append(nats[real][:kept])
        if kept:
            self.time, self.count = int(after[kept - 1]), self.count + kept
            self.ended = self.ended or bool(tokens[kept - 1] == vocabulary.END)
        return bool(last.any())

    @property
    def tokens(self) -> Int[np.ndarray, " T"]:
        """The generated tokens."""
        return np.concatenate([np.zeros(0, np.int32), *self._tokens])

    @property
    def nats(self) -> Float[np.ndarray, " T"]:
        """-log p of each generated token."""
        return np.concatenate([np.zeros(0, np.float32), *self._nats])

    @property
    def generated_steps(self) -> int:
        """Music after the prompt, in steps."""
        return self.time - self.prompt_time

    def notes(self) -> Notes:
        """The notes of the piece so far."""
        if self._unread:
            self._read_tokens(np.concatenate(self._unread))
            self._unread = []
        final_s = min([self.time / vocabulary.STEPS_PER_SECOND, *self._held.onset_s.tolist()])
        final = self._complete.onset_s < final_s
        if final.any():
            self._final.append(self._complete.select(final))
            self._complete = self._complete.select(~final)
        return Notes(
            final_s=final_s,
            join_s=self.prompt_time / vocabulary.STEPS_PER_SECOND,
            _final=self._final,
            _count=len(self._final),
            _open=_Columns.joined([self._complete, self._held.ended(self.time)]),
            _prompt_file=self._prompt_file,
            _gap=self._gap,
        )

    def _take_prompt(self, played: Performance) -> None:
        """Put the prompt's own notes in place of those of its tokens."""
        onset_step = quantize(played.onset_s)
        offset_step = np.maximum(quantize(played.offset_s), onset_step + 1)
        notes = _Columns(played.onset_s, played.offset_s, played.pitch, played.velocity)
        # A gap begins with the notes that its first step has; a prompt ends after those of its last.
        last_step = self.prompt_time if self._gap is None else self.prompt_time - 1
        begun, complete = onset_step <= last_step, offset_step <= self.prompt_time
        self._complete, self._held = notes.select(begun & complete), notes.select(begun & ~complete)
        file = played.prompt_file
        if file is not None:
            end_s = min(file.end_s, last_step / vocabulary.STEPS_PER_SECOND)
            self._prompt_file = dataclasses.replace(file, end_s=end_s)

    def _read_tokens(self, new: Int[np.ndarray, " T"]) -> None:
        """Turn tokens into notes; held notes are put before them as note-ons."""
        new, held = new.astype(np.int64), self._held
        tokens = np.concatenate([vocabulary.NOTE_ON + held.pitch, new])
        step = self._read_time + event_steps(new)
        onset_s = np.concatenate([held.onset_s, step / vocabulary.STEPS_PER_SECOND])
        velocity = np.concatenate([held.velocity, lowest_velocity(velocity_bins(new, self._velocity_bin))])
        pairs = pair_notes(tokens)
        on, pitch = pairs.on, tokens[pairs.on] - vocabulary.NOTE_ON
        notes = _Columns(onset_s[on], onset_s[on], pitch, velocity[on])
        is_held = pairs.off < 0
        off_step = step[pairs.off[~is_held] - len(held.pitch)]
        self._complete = _Columns.joined([self._complete, notes.select(~is_held).ended(off_step)])
        self._held = notes.select(is_held)
        self._read_time += length_steps(new)
        velocities = new[vocabulary.is_velocity(new)]
        if len(velocities):
            self._velocity_bin = int(velocities[-1]) - (vocabulary.VELOCITY - 1)
