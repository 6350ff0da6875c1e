"""`Sequence`: the tokens of one piece as they are generated. Each token is processed once, however many follow."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from music_ar.midi.performance import Performance
from music_ar.tokens import vocabulary
from music_ar.tokens.codec import event_steps, length_steps, lowest_velocity, pair_notes, velocity_bins


class _Columns(NamedTuple):
    """Some notes: onset and offset in steps, pitch, velocity."""

    onset: np.ndarray
    offset: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray

    @classmethod
    def none(cls) -> "_Columns":
        return cls(*(np.zeros(0, np.int64) for _ in range(4)))

    def select(self, kept: np.ndarray) -> "_Columns":
        return _Columns(*(column[kept] for column in self))


@dataclasses.dataclass
class Sequence:
    """A piece in progress: its prompt, the tokens generated so far, and their notes.

    Attributes:
        prompt: tokens that it continues, beginning with `vocabulary.START`.
        time: of the last token, in steps of 10 ms from the start of the piece.
        count: tokens generated.
        ended: whether it has ended on its own.
    """

    prompt: Int[np.ndarray, " P"]

    def __post_init__(self) -> None:
        self.time = self.prompt_time = length_steps(self.prompt)
        self.count, self.ended = 0, False
        self._tokens: list[np.ndarray] = []
        self._nats: list[np.ndarray] = []
        self._unread: list[np.ndarray] = [self.prompt]
        self._read_time, self._velocity_bin = 0, vocabulary.DEFAULT_VELOCITY_BIN
        self._finished_notes: list[_Columns] = []
        self._held = _Columns.none()

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

    def performance(self) -> Performance:
        """The piece so far, with its prompt, as `decode` gives it for all tokens; held notes end at the last event."""
        self._read()
        held = self._held._replace(offset=np.full(len(self._held.onset), self.time))
        onset, offset, pitch, velocity = (
            np.concatenate(columns) for columns in zip(*self._finished_notes, held, strict=True)
        )
        return Performance(
            onset_s=onset / vocabulary.STEPS_PER_SECOND,
            offset_s=np.maximum(offset, onset + 1) / vocabulary.STEPS_PER_SECOND,
            pitch=pitch,
            velocity=velocity,
        )

    def final_until_s(self) -> float:
        """Notes that begin before this time are complete: the onset of the first held note, or the last event."""
        self._read()
        return min([self.time, *self._held.onset.tolist()]) / vocabulary.STEPS_PER_SECOND

    def _read(self) -> None:
        """Turn the unread tokens into notes; held notes are put before them as note-ons."""
        new = np.concatenate(self._unread).astype(np.int64)
        self._unread = [np.zeros(0, np.int64)]
        if not len(new):
            return
        held = self._held
        tokens = np.concatenate([vocabulary.NOTE_ON + held.pitch, new])
        time = np.concatenate([held.onset, self._read_time + event_steps(new)])
        velocity = np.concatenate([held.velocity, lowest_velocity(velocity_bins(new, self._velocity_bin))])
        pairs = pair_notes(tokens)
        notes = _Columns(time[pairs.on], time[pairs.off], tokens[pairs.on] - vocabulary.NOTE_ON, velocity[pairs.on])
        self._finished_notes.append(notes.select(pairs.off >= 0))
        self._held = notes.select(pairs.off < 0)
        self._read_time += length_steps(new)
        velocities = new[vocabulary.is_velocity(new)]
        if len(velocities):
            self._velocity_bin = int(velocities[-1]) - (vocabulary.VELOCITY - 1)
