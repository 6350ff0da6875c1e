"""`Answer`: what the model plays after a person has paused, from tokens to events."""

from collections import Counter
from typing import Any

import numpy as np
from jaxtyping import Int32

from app.web.reading import Reading, rest_tokens
from app.web.timeline import Timeline
from music_ar import GenerationError
from music_ar.decoding.interface import shared_options
from music_ar.decoding.live import LiveState, aligned
from music_ar.decoding.request import stuck_error
from music_ar.decoding.sampling import SamplingOptions
from music_ar.tokens import vocabulary
from music_ar.tokens.codec import event_steps, length_steps, lowest_velocity

LONGEST_S = 120.0
_LATEST_STEPS = 5  # of the first note after the beginning; a longer rest is left out
_MOST_REST_STEPS = 400  # in which a first note is looked for
_ATTEMPTS = 3  # with other seeds, if the model would rather end the piece


def read_settled(live: LiveState, timeline: Timeline) -> int:
    """Let the model read what is new in a timeline, but for the latest moment; the number of tokens read."""
    return live.follow(aligned(live.tokens, Reading(timeline).settled))


class Answer:
    """An answer, and the place that it continues from. `begin` and `more` use the device.

    Args:
        number: the number that the client gave it.
        asked_s: when it was asked for, by the client's clock.
        at_s: when it begins.
        seconds: how long it may be.
        sampling: how tokens are drawn.
        seed: of the draws.
        first: number of its first event among those of all answers.

    Attributes:
        number, asked_s, at_s, first: as given.
        until_s: later events begin at this time or after it.
        over: why it is over: "enough" or "ended"; None before.
    """

    def __init__(
        self,
        *,
        number: int,
        asked_s: float,
        at_s: float,
        seconds: float,
        sampling: SamplingOptions,
        seed: int,
        first: int,
    ):
        self.number, self.asked_s, self.at_s, self.first = number, asked_s, round(at_s, 4), first
        self.until_s = self.at_s
        self.over: str | None = None
        self._end_s, self._seed = round(at_s + seconds, 4), seed
        self._options = shared_options(sampling)
        self._start_step = self._step = self._end_step = 0
        self._velocity = int(lowest_velocity(np.array([vocabulary.DEFAULT_VELOCITY_BIN]))[0])
        self._count = 0
        self._before = np.zeros(0, np.int32)  # the tokens of what was played before
        self._theirs: Counter[int] = Counter()  # notes of the person that sound for the model, by pitch
        self._own: Counter[int] = Counter()

    def begin(self, live: LiveState, timeline: Timeline, chunk: int) -> list[Any]:
        """Read what is new in a timeline, and make the first notes.

        Args:
            live: the model's state.
            timeline: what was played so far.
            chunk: tokens to decode at once.
        """
        reading = Reading(timeline)
        self._start_step = self._step = reading.step(self.at_s)
        self._end_step = self._start_step + round((self._end_s - self.at_s) * vocabulary.STEPS_PER_SECOND)
        self._theirs.update(reading.sounding)
        self._before = aligned(live.tokens, reading.tokens)
        live.follow(self._before)
        live.mark()
        self._take_velocities(self._before[vocabulary.is_velocity(self._before)])
        for _ in range(_ATTEMPTS):
            found = self._first_notes(live, reading, chunk)
            if len(found):
                return self._events(found)
            self._seed += 1
        return self._ended("ended")

    def more(self, live: LiveState, chunk: int) -> list[Any]:
        """Make the next events; none once it is over.

        Raises:
            GenerationError: the model writes notes without letting time pass.
        """
        if self.over:
            return []
        tokens = live.sample(self._options, length=chunk, until_step=self._end_step, seed=self._seed)
        self._count += len(tokens)
        if (error := stuck_error(self._count, self._step - self._start_step)) is not None:
            raise GenerationError(error)
        return self._events(tokens)

    def _first_notes(self, live: LiveState, reading: Reading, chunk: int) -> Int32[np.ndarray, " T"]:
        """The tokens from the beginning of the answer to at least its first note; none if it has none."""
        rest = self._start_step - reading.end_step
        live.follow(np.concatenate([self._before, rest_tokens(rest)]))
        tokens = np.zeros(0, np.int32)
        while not vocabulary.is_note_on(tokens).any():
            new = live.sample(
                self._options, length=chunk, until_step=self._start_step + _MOST_REST_STEPS, seed=self._seed
            )
            tokens = np.concatenate([tokens, new])
            if not len(new) or new[-1] == vocabulary.END:
                break
        notes = np.flatnonzero(vocabulary.is_note_on(tokens))
        if not len(notes):
            return tokens[:0]
        before, after = tokens[: notes[0]], tokens[notes[0] :]
        late = min(length_steps(before), _LATEST_STEPS)
        kept = np.concatenate([before[vocabulary.is_note(before)], before[vocabulary.is_velocity(before)][-1:]])
        live.follow(np.concatenate([self._before, rest_tokens(rest + late), kept, after]))
        self._step += late
        self._count = len(after)
        return np.concatenate([kept, after])

    def _events(self, tokens: Int32[np.ndarray, " T"]) -> list[Any]:
        """Turn the next tokens into events, as tuples (time, kind, pitch, velocity)."""
        steps = self._step + event_steps(np.append(tokens, vocabulary.PAD))
        events = []
        for token, step in zip(tokens.tolist(), steps.tolist(), strict=False):
            if vocabulary.is_velocity(token):
                self._take_velocities(np.array([token]))
            elif vocabulary.is_note(token):
                events += self._note(token, self._time_s(step))
        self._step = int(steps[-1])
        self.until_s = min(self._time_s(self._step), self._end_s)
        if len(tokens) and tokens[-1] == vocabulary.END:
            return events + self._ended("ended")
        return events + (self._ended("enough") if self._step >= self._end_step else [])

    def _note(self, token: int, time_s: float) -> list[Any]:
        pitch = token % vocabulary.PITCHES
        if vocabulary.is_note_on(token):
            self._own[pitch] += 1
            return [(time_s, "on", pitch, self._velocity)]
        for sounding, kind in ((self._theirs, "release"), (self._own, "off")):  # the oldest note of a pitch ends
            if sounding[pitch]:
                sounding[pitch] -= 1
                return [(time_s, kind, pitch, 0)]
        return []

    def _ended(self, why: str) -> list[Any]:
        """End the answer and all of its notes."""
        self.over = why
        offs = [(self.until_s, "off", pitch, 0) for pitch in sorted(self._own.elements())]
        self._own.clear()
        return offs

    def _take_velocities(self, tokens: np.ndarray) -> None:
        if len(tokens):
            self._velocity = int(lowest_velocity(tokens[-1:].astype(np.int64) - (vocabulary.VELOCITY - 1))[0])

    def _time_s(self, step: int) -> float:
        return round(self.at_s + (step - self._start_step) / vocabulary.STEPS_PER_SECOND, 4)
