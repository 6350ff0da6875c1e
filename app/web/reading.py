"""`Reading`: the timeline of a conversation as the model reads it."""

import numpy as np
from jaxtyping import Float64, Int32

from app.web.timeline import Timeline, paired
from music_ar import Performance, encode
from music_ar.midi.live import LiveNotes
from music_ar.tokens import vocabulary
from music_ar.tokens.codec import event_steps, length_steps, quantize

LONGEST_REST_S = 4.0
"""Longer rests are told to the model as this long: pianists in recordings do not wait longer."""
_LATER_S = 100.0  # after everything: where notes end that still sound, for the encoder


class Reading:
    """A timeline as the model reads it: tokens, in a time that leaves out the rest of long rests.

    Args:
        timeline: the timeline.

    Attributes:
        tokens: `vocabulary.START`, and the tokens of all events.
        end_step: time of the last of them, in steps.
        last_s: its time in the timeline.
        sounding: for each note that still sounds, its pitch.
    """

    def __init__(self, timeline: Timeline):
        onset_s, offset_s, pitch, velocity = self._heard(timeline)
        times_s = np.unique(np.concatenate([onset_s, offset_s[np.isfinite(offset_s)]]))
        left_out_s = np.cumsum(np.maximum(np.diff(times_s, prepend=0.0) - LONGEST_REST_S, 0.0))
        self.last_s = float(times_s[-1]) if len(times_s) else 0.0
        self._left_out_s = float(left_out_s[-1]) if len(times_s) else 0.0

        def told(seconds: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
            return seconds - left_out_s[np.searchsorted(times_s, seconds)] if len(seconds) else seconds

        sounds = np.isinf(offset_s)
        ends_s = np.full(len(offset_s), self.last_s + _LATER_S)
        ends_s[~sounds] = told(offset_s[~sounds])
        piece = Performance(onset_s=told(onset_s), offset_s=ends_s, pitch=pitch, velocity=velocity)
        tokens = encode(piece)
        steps = event_steps(tokens)
        end_step = int(quantize(np.array([self.last_s - self._left_out_s]))[0])
        # A note shorter than a step ends a step after the last event.
        known = np.flatnonzero(vocabulary.is_note(tokens) & (steps <= end_step + 1))
        count = known[-1] + 1 if len(known) else 0
        self._tokens, self._steps = tokens[:count], steps[:count]
        self.end_step = int(self._steps[-1]) if count else 0
        self.sounding = pitch[sounds].tolist()

    @property
    def tokens(self) -> Int32[np.ndarray, " T"]:
        """See the class."""
        return _begun(self._tokens)

    @property
    def settled(self) -> Int32[np.ndarray, " T"]:
        """The tokens before the last time step, whose order no later event of that step can change."""
        is_before = vocabulary.is_note(self._tokens) & (self._steps < self.end_step - 1)
        last = np.flatnonzero(is_before)
        return _begun(self._tokens[: last[-1] + 1 if len(last) else 0])

    def step(self, seconds: float) -> int:
        """A time after the last event, in steps of the model's time. A long rest before it is cut to its longest."""
        rest_s = min(max(seconds - self.last_s, 0.0), LONGEST_REST_S)
        told_s = self.last_s - self._left_out_s + rest_s
        return max(int(quantize(np.array([told_s]))[0]), self.end_step)

    @staticmethod
    def _heard(timeline: Timeline) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All notes: onset, offset (infinite if they still sound), pitch and velocity."""
        hands = LiveNotes()
        for touch in timeline.played:
            hands.add(touch)
        onset_s, offset_s = np.array(hands.onset_s), np.array(hands.offset_s)
        pitch, velocity = np.array(hands.pitch, np.int32), np.array(hands.velocity, np.int32)
        for time_s, kind, released, _ in timeline.answered:
            if kind == "release":
                sounds = (pitch == released) & (onset_s < time_s) & (time_s < offset_s)
                offset_s[np.flatnonzero(sounds)[:1]] = time_s
        before, answers = timeline.notes, paired(timeline.answered)
        columns = [
            np.concatenate(parts)
            for parts in zip(
                (before.onset_s, before.offset_s, before.pitch, before.velocity),
                (onset_s, offset_s, pitch, velocity),
                answers,
                strict=True,
            )
        ]
        has_length = columns[1] > columns[0]
        onset_s, offset_s, pitch, velocity = (column[has_length] for column in columns)
        return onset_s, offset_s, pitch, velocity


def rest_tokens(steps: int) -> Int32[np.ndarray, " T"]:
    """A rest as `encode` writes it: whole shifts, then what is left."""
    if steps <= 0:
        return np.zeros(0, np.int32)
    whole, left = divmod(steps - 1, vocabulary.MAX_SHIFT_STEPS)
    longest = vocabulary.TIME_SHIFT + vocabulary.MAX_SHIFT_STEPS - 1
    tokens = np.array([*[longest] * whole, vocabulary.TIME_SHIFT + left], np.int32)
    assert length_steps(tokens) == steps
    return tokens


def _begun(tokens: Int32[np.ndarray, " T"]) -> Int32[np.ndarray, " T1"]:
    return np.concatenate([[vocabulary.START], tokens]).astype(np.int32)
