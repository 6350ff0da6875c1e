"""Keys and pedal as they are being played -> notes, and the file of a duet."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from music_ar.midi.clock import MICROSECONDS_PER_QUARTER
from music_ar.midi.events import TEMPO
from music_ar.midi.performance import MidiError, Performance
from music_ar.midi.raw_events import CONTROL, NOTE_OFF, NOTE_ON, PROGRAM, TRACK_NAME, Event, RawFile, meta_event
from music_ar.midi.sustain import PEDAL_DOWN_VALUE, SUSTAIN_CONTROLLER
from music_ar.midi.tracks import PIANO_CHANNELS, TickNotes, note_tracks

_TICKS_PER_QUARTER = 1000
_TICKS_PER_S = _TICKS_PER_QUARTER * 1_000_000 // MICROSECONDS_PER_QUARTER
_PIANO = 0  # the program of an acoustic grand piano
_RELEASE_VELOCITY = 64


class Touch(NamedTuple):
    """A key that goes down or comes up, or a movement of the sustain pedal.

    Attributes:
        time_s: when.
        kind: "on", "off" or "pedal".
        number: the pitch, 0..127; the position of the pedal, 0..127.
        velocity: of a note-on, 1..127; otherwise 0.
    """

    time_s: float
    kind: Literal["on", "off", "pedal"]
    number: int
    velocity: int = 0


class LiveNotes:
    """The notes of a person who plays, with the pedal folded in by the rules of `sustain.fold`.

    Attributes:
        onset_s, pitch, velocity: one entry for each note, in the order in which they began.
        offset_s: infinite while a note sounds.
    """

    def __init__(self) -> None:
        self.onset_s: list[float] = []
        self.offset_s: list[float] = []
        self.pitch: list[int] = []
        self.velocity: list[int] = []
        self._down: dict[int, int] = {}  # by pitch, the note whose key is down
        self._ringing: dict[int, int] = {}  # the note that only the pedal holds
        self._pedal_is_down = False

    def add(self, touch: Touch) -> None:
        """Play on. Times must not go backward."""
        if touch.kind == "pedal":
            self._pedal_is_down = touch.number >= PEDAL_DOWN_VALUE
            if not self._pedal_is_down:
                self._end(self._ringing.values(), touch.time_s)
                self._ringing.clear()
        elif touch.kind == "off":
            note = self._down.pop(touch.number, None)
            if note is not None and self._pedal_is_down:
                self._ringing[touch.number] = note
            elif note is not None:
                self._end([note], touch.time_s)
        else:
            before = (self._down.pop(touch.number, None), self._ringing.pop(touch.number, None))
            self._end([note for note in before if note is not None], touch.time_s)
            self._down[touch.number] = len(self.onset_s)
            self.onset_s.append(touch.time_s)
            self.offset_s.append(math.inf)
            self.pitch.append(touch.number)
            self.velocity.append(touch.velocity)

    def _end(self, notes: Iterable[int], time_s: float) -> None:
        for note in notes:
            self.offset_s[note] = time_s


def duet_file(before: Performance, touches: Sequence[Touch], answers: Performance) -> bytes:
    """A MIDI file of a duet at 120 quarter notes per minute, 0.5 ms per tick, with a track or more for each part.

    Args:
        before: what the duet began with.
        touches: what the person played, in order; it is written as it is. Keys that are still down come up at the end.
        answers: the notes of the model. They are written as keys and pedal; see `pedalling`.

    Raises:
        MidiError: there are no notes at all, or more of one pitch sound at once than a file has channels for.
    """
    if not len(before) and not len(answers) and not any(touch.kind == "on" for touch in touches):
        raise MidiError("nothing has been played yet, and a MIDI file without notes cannot be read back")
    end_s = max([before.duration_s, answers.duration_s, *(touch.time_s for touch in touches[-1:])])
    played, *others = PIANO_CHANNELS
    half = len(others) // 2  # channels of notes of one pitch that overlap
    tracks = [[meta_event(0, TEMPO, MICROSECONDS_PER_QUARTER.to_bytes(3))]]
    if touches:
        tracks.append(_played_track(touches, played, end_s))
    for piece, channels, name in ((before, others[:half], "Before"), (answers, others[half:], "Answers")):
        if len(piece):
            tracks += note_tracks(
                _in_ticks(piece),
                channels=channels,
                name=name,
                program=_PIANO,
                pedal_ticks_per_s=float(_TICKS_PER_S),
            )
    return RawFile(_TICKS_PER_QUARTER.to_bytes(2), tracks).to_bytes()


def _played_track(touches: Sequence[Touch], channel: int, end_s: float) -> list[Event]:
    events = [meta_event(0, TRACK_NAME, b"Played"), Event(0, bytes([PROGRAM | channel, _PIANO]))]
    down: dict[int, None] = {}
    pedal = 0
    for touch in touches:
        events.append(Event(_tick(touch.time_s), _message(touch, channel)))
        if touch.kind == "pedal":
            pedal = touch.number
        elif touch.kind == "on":
            down[touch.number] = None
        else:
            down.pop(touch.number, None)
    end = max(_tick(end_s), events[-1].tick + 1)
    events += [Event(end, _message(Touch(end_s, "off", pitch), channel)) for pitch in down]
    if pedal:
        events.append(Event(end, _message(Touch(end_s, "pedal", 0), channel)))
    return events


def _message(touch: Touch, channel: int) -> bytes:
    if touch.kind == "pedal":
        return bytes([CONTROL | channel, SUSTAIN_CONTROLLER, touch.number])
    if touch.kind == "on":
        return bytes([NOTE_ON | channel, touch.number, touch.velocity])
    return bytes([NOTE_OFF | channel, touch.number, _RELEASE_VELOCITY])


def _tick(time_s: float) -> int:
    return round(time_s * _TICKS_PER_S)


def _in_ticks(piece: Performance) -> TickNotes:
    onset = np.rint(piece.onset_s * _TICKS_PER_S).astype(np.int64)
    offset = np.maximum(np.rint(piece.offset_s * _TICKS_PER_S).astype(np.int64), onset + 1)
    return TickNotes(onset, offset, piece.pitch, piece.velocity)
