"""The events of a Standard MIDI File as they are: their bytes, track by track, in the order of the file.

`io.read_midi` says what a file sounds like; this module is for writing files that keep another file's events.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from music_ar.midi.clock import Clock
from music_ar.midi.events import TEMPO
from music_ar.midi.performance import MidiError
from music_ar.midi.smf import open_file, read_division

NOTE_OFF, NOTE_ON, CONTROL, PROGRAM = 0x80, 0x90, 0xB0, 0xC0
SYSEX, META = 0xF0, 0xFF
TRACK_NAME, END_OF_TRACK = 0x03, 0x2F

_ESCAPE = 0xF7
_ONE_DATA_BYTE = (0xC0, 0xD0)
_MAX_DELTA = 2**28 - 1


class Event(NamedTuple):
    """An event: its time in ticks, and its bytes, beginning with the status byte."""

    tick: int
    data: bytes

    @property
    def kind(self) -> int:
        """The kind of a channel message, without its channel; `META` and the kinds of SysEx as they are."""
        return self.data[0] & 0xF0 if self.data[0] < SYSEX else self.data[0]

    @property
    def channel(self) -> int:
        """The channel of a channel message, 0..15."""
        return self.data[0] & 0x0F

    @property
    def is_note_on(self) -> bool:
        """Whether it strikes a key."""
        return self.kind == NOTE_ON and self.data[2] > 0

    @property
    def is_note_off(self) -> bool:
        """Whether it releases a key; a note-on of velocity 0 does."""
        return self.kind == NOTE_OFF or (self.kind == NOTE_ON and self.data[2] == 0)

    @property
    def meta(self) -> tuple[int, bytes] | None:
        """Type and contents of a meta event; None for others."""
        return (self.data[1], self.data[_number(self.data, 2)[1] :]) if self.data[0] == META else None


def meta_event(tick: int, kind: int, contents: bytes) -> Event:
    """Build a meta event."""
    return Event(tick, bytes([META, kind]) + _encoded(len(contents)) + contents)


@dataclass(frozen=True)
class RawFile:
    """A file: the division field of its header, and the events of each track, without their ends."""

    division: bytes
    tracks: list[list[Event]]

    @classmethod
    def parse(cls, data: bytes) -> "RawFile":
        """Split a file into its events. RIFF wrappers are opened, unknown chunks skipped.

        Raises:
            MidiError: it is not a MIDI file, or damaged.
        """
        file = open_file(data)
        return cls(file.division, [_read_track(bytes(track)) for track in file.tracks])

    def finer(self, factor: int) -> "RawFile":
        """Divide each tick into `factor` ticks; nothing moves."""
        if self.division[0] < 128:
            division = (int.from_bytes(self.division) * factor).to_bytes(2)
        else:
            division = bytes([self.division[0], self.division[1] * factor])
        tracks = [[Event(event.tick * factor, event.data) for event in track] for track in self.tracks]
        return RawFile(division, tracks)

    def finest(self) -> int:
        """The largest factor that `finer` takes."""
        if self.division[0] < 128:
            return (2**15 - 1) // int.from_bytes(self.division)
        return 255 // self.division[1]

    def clock(self) -> Clock:
        """The clock that the header and the tempo events of all tracks set."""
        ticks_per_quarter, tick_s = read_division(self.division)
        if tick_s is not None:
            return Clock.constant(tick_s)
        tempos = [
            (event.tick, int.from_bytes(found[1][:3]))
            for track in self.tracks
            for event in track
            if (found := event.meta) is not None and found[0] == TEMPO and len(found[1]) >= 3
        ]
        tempos.sort(key=lambda tempo: tempo[0])
        tick, microseconds = np.array(tempos, np.int64).reshape(-1, 2).T
        return Clock.of_tempos(tick, microseconds, ticks_per_quarter or 1)

    def to_bytes(self) -> bytes:
        """Write a file of format 1; of events at one tick, the first in a track comes first."""
        chunks = [_chunk(b"MThd", b"\x00\x01" + len(self.tracks).to_bytes(2) + self.division)]
        return b"".join(chunks + [_chunk(b"MTrk", _track_bytes(track)) for track in self.tracks])


def _chunk(name: bytes, contents: bytes) -> bytes:
    return name + len(contents).to_bytes(4) + contents


def _track_bytes(events: Iterable[Event]) -> bytes:
    pieces, now = [], 0
    for event in events:
        pieces += [_encoded(event.tick - now), event.data]
        now = event.tick
    return b"".join([*pieces, b"\x00", bytes([META, END_OF_TRACK, 0])])


def _read_track(data: bytes) -> list[Event]:
    events, position, tick, running = [], 0, 0, 0
    try:
        while position < len(data):
            delta, position = _number(data, position)
            tick += delta
            status = running
            if data[position] >= 128:
                status, position = data[position], position + 1
            if status < SYSEX:
                running = status  # other events do not end the running status, though the standard says so
            end = _end_of_event(data, position, status)
            if end > len(data):
                raise MidiError("a track ends in the middle of an event")
            if status == META and data[position] == END_OF_TRACK:
                break
            events.append(Event(tick, bytes([status]) + data[position:end]))
            position = end
    except IndexError:
        raise MidiError("a track ends in the middle of an event") from None
    return events


def _end_of_event(data: bytes, position: int, status: int) -> int:
    """Where the data bytes of an event end, which begin at `position`."""
    if status in (META, SYSEX, _ESCAPE):
        length, start = _number(data, position + (status == META))
        return start + length
    end = position + (1 if status & 0xF0 in _ONE_DATA_BYTE else 2)
    if not NOTE_OFF <= status < SYSEX or max(data[position:end], default=0) >= 128:
        raise MidiError("a track has a damaged event")
    return end


def _number(data: bytes, position: int) -> tuple[int, int]:
    """Read a number of variable length; return it and where it ends."""
    number = 0
    while True:
        byte = data[position]
        number, position = number << 7 | byte & 127, position + 1
        if byte < 128:
            return number, position


def _encoded(number: int) -> bytes:
    """Write a number of variable length."""
    if number > _MAX_DELTA:
        raise MidiError("two events are too far apart for a MIDI file")
    groups = [number & 127]
    while number := number >> 7:
        groups.append(number & 127 | 128)
    return bytes(reversed(groups))
