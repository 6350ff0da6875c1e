"""`Timeline`: everything that was played in a conversation, as clients send it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from app.web.settings import WebError, in_words
from music_ar import Performance
from music_ar.midi.live import Touch, duet_file
from music_ar.tokens import vocabulary

MAX_NOTES = 20_000
MAX_SECONDS = 4 * 3600.0
_MAX_EVENTS = 4 * MAX_NOTES
_DECIMALS = 4


class Refused(WebError):
    """A message that is not taken.

    Args:
        code: what kind of mistake it is, for programs.
        reason: what was expected and what came, in words.
    """

    def __init__(self, code: str, reason: str):
        super().__init__(reason)
        self.code = code


class Timeline:
    """What a conversation began with, what a person has played since, and what was heard of the answers.

    Attributes:
        notes: what it began with.
        played: events of the person, in order.
        answered: events of the answers, in order: "on" and "off", and "release" where for the model a note of the
            person ends.
    """

    def __init__(self) -> None:
        self.notes = Performance.empty()
        self.played: list[Touch] = []
        self.answered: list[tuple[float, str, int, int]] = []

    @classmethod
    def read(cls, values: object) -> "Timeline":
        """Read what a client has kept.

        Raises:
            Refused: it is not a timeline, or too long.
        """
        if not isinstance(values, Mapping):
            raise Refused("message", f"the timeline must be an object, got {in_words(values)}")
        timeline = cls()
        timeline.notes = _notes(_list(values, "notes"))
        timeline.play(_list(values, "played"))
        for number, value in enumerate(_list(values, "answered")):
            timeline.answered.append(_event(value, number, ("on", "off", "release")))
        _check_order([time_s for time_s, *_ in timeline.answered], 0.0)
        timeline.check_size()
        return timeline

    def copied(self) -> "Timeline":
        """A copy, which stays as it is."""
        copy = Timeline()
        copy.notes, copy.played, copy.answered = self.notes, list(self.played), list(self.answered)
        return copy

    def flat(self) -> dict[str, Any]:
        """The timeline for a client; `read` takes it."""
        columns = (self.notes.onset_s, self.notes.offset_s, self.notes.pitch, self.notes.velocity)
        return {
            "notes": [list(note) for note in zip(*(column.tolist() for column in columns), strict=True)],
            "played": [event(*touch) for touch in self.played],
            "answered": [event(*each) for each in self.answered],
        }

    def play(self, values: object) -> list[Touch]:
        """Add events of the person, and return them; all of them or none.

        Raises:
            Refused: one is malformed or too early, or they are too many.
        """
        if not isinstance(values, list):
            raise Refused("message", f"events must be a list, got {in_words(values)}")
        touches = [Touch(*_event(value, number, ("on", "off", "pedal"))) for number, value in enumerate(values)]
        _check_order([touch.time_s for touch in touches], self.played[-1].time_s if self.played else 0.0)
        self.check_size(len(touches))
        self.played += touches
        return touches

    def check_size(self, more: int = 0) -> None:
        """Check that so many more events fit.

        Raises:
            Refused: they do not.
        """
        if len(self.notes) > MAX_NOTES or len(self.played) + len(self.answered) + more > _MAX_EVENTS:
            raise Refused("size", f"a conversation may have at most {MAX_NOTES:,} notes; save it and start another")

    @property
    def last_s(self) -> float:
        """The time of the last event."""
        ends = [events[-1][0] for events in (self.played, self.answered) if events]
        return max([self.notes.duration_s, *ends])

    @property
    def last_answered_s(self) -> float:
        """The time of the last event of an answer."""
        return self.answered[-1][0] if self.answered else 0.0

    def cut(self, heard_s: float, first: int) -> None:
        """Keep of an answer what was heard: its events up to a time. Its notes that sound then end then.

        Args:
            heard_s: the time.
            first: number of the first event of the answer.
        """
        kept = [each for each in self.answered[first:] if each[0] <= heard_s]
        sounding: list[int] = []
        for _, kind, pitch, _ in kept:
            if kind == "on":
                sounding.append(pitch)
            elif kind == "off" and pitch in sounding:
                sounding.remove(pitch)
        self.answered[first:] = [*kept, *((heard_s, "off", pitch, 0) for pitch in sounding)]

    def answers(self) -> Performance:
        """The notes of the answers; those that still sound end at the last event."""
        onset_s, offset_s, pitch, velocity = paired(self.answered)
        last_s = self.last_s
        offset_s = np.maximum(np.where(np.isinf(offset_s), last_s, offset_s), onset_s + 1 / vocabulary.STEPS_PER_SECOND)
        return Performance(onset_s=onset_s, offset_s=offset_s, pitch=pitch, velocity=velocity)

    def midi(self) -> bytes:
        """The timeline as a MIDI file.

        Raises:
            MidiError: it has no notes.
        """
        return duet_file(self.notes, self.played, self.answers())


def event(time_s: float, kind: str, number: int, velocity: int = 0) -> list[Any]:
    """An event as clients write it."""
    return [round(time_s, _DECIMALS), kind, number, *([velocity] if kind == "on" else [])]


def seconds(value: object, name: str, most: float = MAX_SECONDS) -> float:
    """Check a time.

    Raises:
        Refused: it is not a number of seconds from 0 to the longest.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise Refused("message", f"{name} must be a number of seconds from 0 to {most:g}, got {in_words(value)}")
    return float(value)


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    value = values.get(name, [])
    if not isinstance(value, list):
        raise Refused("message", f"{name} must be a list, got {in_words(value)}")
    if len(value) > _MAX_EVENTS:
        raise Refused("size", f"a conversation may have at most {MAX_NOTES:,} notes; save it and start another")
    return value


def _notes(values: list[Any]) -> Performance:
    rows = []
    for number, value in enumerate(values):
        if not isinstance(value, list) or len(value) != 4:
            raise Refused("message", f"note {number} must be [onset, offset, pitch, velocity], got {in_words(value)}")
        onset_s, offset_s = (
            seconds(value[0], f"the onset of note {number}"),
            seconds(value[1], f"the end of note {number}"),
        )
        if not onset_s < offset_s:
            raise Refused("message", f"note {number} must end after it begins, got {onset_s:g} s to {offset_s:g} s")
        rows.append((onset_s, offset_s, _whole(value[2], 0, "the pitch"), _whole(value[3], 1, "the velocity")))
    if not rows:
        return Performance.empty()
    onset, offset, pitch, velocity = (np.array(column) for column in zip(*rows, strict=True))
    return Performance(onset_s=onset, offset_s=offset, pitch=pitch, velocity=velocity)


def _event(value: object, number: int, kinds: Sequence[str]) -> Any:
    """An event as (time, kind, number, velocity)."""
    kind = value[1] if isinstance(value, list) and len(value) >= 2 else None
    if not isinstance(value, list) or kind not in kinds or len(value) != (4 if kind == "on" else 3):
        last = "[time, “pedal”, position]" if "pedal" in kinds else "[time, “release”, pitch]"
        raise Refused(
            "message", f"event {number} must be [time, “on”, pitch, velocity], [time, “off”, pitch] or {last}"
        )
    time_s = seconds(value[0], f"the time of event {number}")
    about = "the position of the pedal" if kind == "pedal" else "the pitch"
    return (
        time_s,
        kind,
        _whole(value[2], 0, about),
        _whole(value[3], 1, "the velocity") if kind == "on" else 0,
    )


def _whole(value: object, least: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 127:
        raise Refused("message", f"{name} must be a whole number from {least} to 127, got {in_words(value)}")
    return value


def _check_order(times_s: Sequence[float], before_s: float) -> None:
    for time_s in times_s:
        if time_s < before_s:
            raise Refused(
                "order", f"events must be in the order of time, got one at {time_s:g} s after one at {before_s:g} s"
            )
        before_s = time_s


def paired(answered: Sequence[tuple[float, str, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The notes of answers: onset, offset (infinite if they still sound), pitch and velocity."""
    rows: list[list[float]] = []
    sounding: dict[int, list[int]] = {}
    for time_s, kind, pitch, velocity in answered:
        if kind == "on":
            sounding.setdefault(pitch, []).append(len(rows))
            rows.append([time_s, math.inf, pitch, velocity])
        elif kind == "off" and sounding.get(pitch):
            rows[sounding[pitch].pop(0)][1] = time_s
    columns = np.array(rows, np.float64).reshape(-1, 4).T
    return columns[0], columns[1], columns[2].astype(np.int32), columns[3].astype(np.int32)
