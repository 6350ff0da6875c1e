"""A MIDI player for tests, on top of mido: what sounds when, event by event, in the order of the file."""

import io
from typing import Any

import mido
from event_tokens import performance_of

from music_ar.midi.performance import Performance

DRUMS = 9
Message = Any
"""A message of mido, which gets its attributes at run time."""


def messages(data: bytes) -> list[tuple[float, int, Message]]:
    """All messages with their times in seconds and their tracks, as a player meets them."""
    file = mido.MidiFile(file=io.BytesIO(data))
    timed = []
    for number, track in enumerate(file.tracks):
        tick = 0
        for message in track:
            tick += message.time
            timed.append((tick, number, message))
    timed.sort(key=lambda each: each[0])
    now_s, last, tempo, found = 0.0, 0, 500_000, []
    for tick, number, message in timed:
        now_s += mido.tick2second(tick - last, file.ticks_per_beat, tempo)
        last = tick
        if message.type == "set_tempo":
            tempo = message.tempo
        found.append((now_s, number, message))
    return found


def played(data: bytes) -> Performance:
    """What a piano sounds like on which each channel has its own pedal; a key that is struck again ends its note."""
    piano = _Piano()
    for time_s, _, message in messages(data):
        piano.play(time_s, message)
    piano.end(list(piano.sounding))
    return performance_of(piano.notes)


class _Piano:
    """Notes that sound, by channel and pitch, and whether their keys are held; pedals that are down, by channel."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.sounding: dict[tuple[int, int], tuple[float, int, bool]] = {}
        self.pedals: set[int] = set()
        self.notes: list[tuple[float, float, int, int]] = []

    def play(self, time_s: float, message: Message) -> None:
        self.now_s = time_s
        if message.type == "control_change" and message.control == 64:
            self._move_pedal(message.channel, message.value >= 64)
        elif message.type in ("note_on", "note_off") and message.channel != DRUMS:
            key = message.channel, message.note
            if message.type == "note_on" and message.velocity:
                self.end([key])
                self.sounding[key] = (time_s, message.velocity, True)
            elif message.channel not in self.pedals:
                self.end([key])
            elif key in self.sounding:
                self.sounding[key] = (*self.sounding[key][:2], False)

    def end(self, keys: list[tuple[int, int]]) -> None:
        for key in keys:
            onset_s, velocity, _ = self.sounding.pop(key, (self.now_s, 0, False))
            if self.now_s > onset_s:
                self.notes.append((onset_s, self.now_s, key[1], velocity))

    def _move_pedal(self, channel: int, is_down: bool) -> None:
        (self.pedals.add if is_down else self.pedals.discard)(channel)
        if not is_down:
            self.end([key for key, note in self.sounding.items() if key[0] == channel and not note[2]])


def assert_sounds_alike(a: Performance, b: Performance, *, within_s: float) -> None:
    """Check that two performances have the same notes, in any order of nearly simultaneous ones."""
    rows = [
        sorted(
            zip(each.pitch.tolist(), each.onset_s.tolist(), each.offset_s.tolist(), each.velocity.tolist(), strict=True)
        )
        for each in (a, b)
    ]
    assert len(rows[0]) == len(rows[1])
    for (pitch, onset_s, offset_s, velocity), other in zip(*rows, strict=True):
        assert (pitch, velocity) == (other[0], other[3])
        assert abs(onset_s - other[1]) <= within_s
        assert abs(offset_s - other[2]) <= within_s
