"""The events of a MIDI file's tracks: their times, messages, and the meta-events that matter to a performance."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from music_ar.midi.event_starts import (
    ENDS_RUNNING_STATUS,
    IS_MESSAGE,
    IS_SHORT,
    MARGIN,
    META,
    TELLS_LENGTH,
    event_starts,
    read_numbers,
)
from music_ar.midi.performance import MidiError

NOTE_OFF, NOTE_ON, CONTROL = 0x8, 0x9, 0xB
"""Kinds of messages that are read: the upper half of the status byte."""
DRUM_CHANNEL = 9
"""Channel 10, as musicians count."""
CONTROLLERS = (64, 120, 121, 123, 124, 125, 126, 127)
"""Controllers that are read: sustain pedal, all sound off, reset all controllers, those that turn all notes off."""
DEVICE_NAME, PORT, TEMPO = 0x09, 0x21, 0x51
"""Kinds of meta-events that are read."""

_IS_READ_CONTROLLER = np.isin(np.arange(256), CONTROLLERS)
_IS_READ_META = np.isin(np.arange(256), (DEVICE_NAME, PORT, TEMPO))
_IS_UNDEFINED = np.isin(np.arange(256), (0xF4, 0xF5, 0xF9, 0xFD))
_SETS_STATUS = IS_MESSAGE | ENDS_RUNNING_STATUS
_BLOCK = 2**16  # events at a time: bounds the memory


class Messages(NamedTuple):
    """Notes and controllers.

    Attributes:
        tick: time.
        position: where the event begins in `Events.data`.
        status: the kind of message (upper half) and the channel (lower half).
        data1: pitch, or number of the controller.
        data2: velocity, or value of the controller.
    """

    tick: Int64[np.ndarray, " n"]
    position: Int64[np.ndarray, " n"]
    status: UInt8[np.ndarray, " n"]
    data1: UInt8[np.ndarray, " n"]
    data2: UInt8[np.ndarray, " n"]

    def select(self, index: np.ndarray) -> "Messages":
        """Return some of the messages, by a mask or by indices."""
        return Messages(*(column[index] for column in self))


class Metas(NamedTuple):
    """Meta-events; their contents are the `length` bytes from `start` in `Events.data`."""

    tick: Int64[np.ndarray, " n"]
    position: Int64[np.ndarray, " n"]
    kind: UInt8[np.ndarray, " n"]
    start: Int64[np.ndarray, " n"]
    length: Int64[np.ndarray, " n"]

    def select(self, index: np.ndarray) -> "Metas":
        """Return some of the meta-events, by a mask or by indices."""
        return Metas(*(column[index] for column in self))


@dataclass(frozen=True, kw_only=True)
class Events:
    """Notes, controllers and meta-events, each in the order of the file.

    Attributes:
        messages: notes and controllers.
        metas: meta-events.
        data: the contents of all tracks, joined.
        track_start: where each track begins in `data`.
        end_tick: time of the last event of the longest track.
    """

    messages: Messages
    metas: Metas
    data: bytes
    track_start: Int64[np.ndarray, " t"]
    end_tick: int


def read_events(tracks: Sequence[bytes | memoryview]) -> Events:
    """Read the contents of all track chunks. What follows an end-of-track event is not read.

    Raises:
        MidiError: an event is damaged or not complete.
    """
    joined = b"".join([*tracks, bytes(MARGIN)])
    data = np.frombuffer(joined, np.uint8)
    track_end = np.cumsum([len(track) for track in tracks], dtype=np.int64)
    track_start = np.concatenate([[0], track_end[:-1]])
    starts, end = event_starts(data, track_end)
    if not len(starts):
        raise MidiError("the tracks of the MIDI file are empty")
    reader = _Reader(data, np.unique(track_start[track_start < track_end]))
    blocks = [reader.read(starts[first : first + _BLOCK].astype(np.int64)) for first in range(0, len(starts), _BLOCK)]
    reader.check_end(end)
    return Events(
        messages=Messages(*map(np.concatenate, zip(*(messages for messages, _ in blocks), strict=True))),
        metas=Metas(*map(np.concatenate, zip(*(metas for _, metas in blocks), strict=True))),
        data=joined,
        track_start=track_start,
        end_tick=reader.end_tick,
    )


class _Reader:
    """Reads the events block by block, and remembers what the next block depends on.

    Args:
        data: the joined tracks.
        track_start: where each track with events begins.
    """

    def __init__(self, data: UInt8[np.ndarray, " n"], track_start: Int64[np.ndarray, " t"]) -> None:
        self.end_tick = 0
        self._data, self._track_start = data, track_start
        self._tracks_begun, self._tick, self._running_status = 0, 0, 0

    def read(self, starts: Int64[np.ndarray, " e"]) -> tuple[Messages, Metas]:
        """The messages and the meta-events among the events that begin at `starts`."""
        begins_track = self._begin_tracks(starts)
        delta, delta_bytes = read_numbers(self._data, starts)
        status_at = starts + delta_bytes
        byte = self._data.take(status_at)
        status = self._statuses(byte, begins_track)
        data_at = status_at + (byte >= 0x80)
        data1, data2 = self._data.take(data_at), self._data.take(data_at + 1)
        _check(delta_bytes, status, data1, data2)
        tick = self._ticks(delta, begins_track)
        kind = status >> 4
        is_note = (kind == NOTE_ON) | (kind == NOTE_OFF)
        kept = np.flatnonzero(is_note | ((kind == CONTROL) & _IS_READ_CONTROLLER.take(data1)))
        messages = Messages(tick, starts, status, data1, data2).select(kept)
        metas = self._metas(np.flatnonzero(TELLS_LENGTH.take(status)), tick, starts, data_at)
        return messages, metas

    def check_end(self, end: int) -> None:
        """Refuse a file whose last event ends elsewhere than its last track."""
        if self._tracks_begun < len(self._track_start) or end > len(self._data) - MARGIN:
            raise MidiError(_damage("an event runs over the end of its track"))

    def _begin_tracks(self, starts: Int64[np.ndarray, " e"]) -> Int64[np.ndarray, " b"]:
        """Indices of the events with which tracks begin."""
        stop = int(np.searchsorted(self._track_start, starts[-1], side="right"))
        begun = self._track_start[self._tracks_begun : stop]
        begins_track = np.searchsorted(starts, begun)
        if not np.array_equal(starts[begins_track], begun):
            raise MidiError(_damage("an event runs over the end of its track"))
        self._tracks_begun = stop
        return begins_track

    def _ticks(self, delta: Int64[np.ndarray, " e"], begins_track: Int64[np.ndarray, " b"]) -> Int64[np.ndarray, " e"]:
        """Times from the beginning of each event's track."""
        tick = np.cumsum(delta) + self._tick
        parts = np.concatenate([[0], begins_track, [len(delta)]])
        tick -= np.repeat(np.concatenate([[0], (tick - delta)[begins_track]]), np.diff(parts))
        self._tick, self.end_tick = int(tick[-1]), max(self.end_tick, int(tick.max()))
        return tick

    def _statuses(
        self, byte: UInt8[np.ndarray, " e"], begins_track: Int64[np.ndarray, " b"]
    ) -> UInt8[np.ndarray, " e"]:
        """Status bytes, with the running status where there is none; 0 if that has ended."""
        sets_status = _SETS_STATUS.take(byte)
        sets_status[begins_track] = True
        setters = np.flatnonzero(sets_status)
        settings = np.where(IS_MESSAGE.take(byte[setters]), byte[setters], 0)
        parts = np.diff(np.concatenate([[0], setters, [len(byte)]]))
        running = np.repeat(np.concatenate([[self._running_status], settings]).astype(np.uint8), parts)
        self._running_status = running[-1]
        return np.where(byte >= 0x80, byte, running)

    def _metas(
        self,
        long: Int64[np.ndarray, " k"],
        tick: Int64[np.ndarray, " e"],
        starts: Int64[np.ndarray, " e"],
        data_at: Int64[np.ndarray, " e"],
    ) -> Metas:
        """The meta-events among the events that tell their length."""
        is_meta = self._data[data_at[long] - 1] == META
        length_at = data_at[long] + is_meta
        length, length_bytes = read_numbers(self._data, length_at)
        if (length_bytes > 4).any():
            raise MidiError(_damage("an event's length has more than four bytes"))
        kind = self._data[data_at[long]]
        kept = is_meta & _IS_READ_META.take(kind)
        return Metas(tick[long], starts[long], kind, length_at + length_bytes, length).select(kept)


def _check(
    delta_bytes: Int64[np.ndarray, " e"],
    status: UInt8[np.ndarray, " e"],
    data1: UInt8[np.ndarray, " e"],
    data2: UInt8[np.ndarray, " e"],
) -> None:
    """Refuse damaged events."""
    is_odd = (delta_bytes > 4) | ((data1 | data2) >= 0x80) | (status < 0x80) | (status >= 0xF0)
    if not is_odd.any():
        return
    delta_bytes, status, data1, data2 = delta_bytes[is_odd], status[is_odd], data1[is_odd], data2[is_odd]
    has_high_data = (data1 | np.where(IS_SHORT[status], 0, data2)) >= 0x80
    rules = {
        "a delta time has more than four bytes": delta_bytes > 4,
        "an event has no status byte, and none is running": status < 0x80,
        "a status byte has no meaning in MIDI": _IS_UNDEFINED[status],
        "a note or controller has a value above 127": IS_MESSAGE[status] & has_high_data,
    }
    broken = [(int(np.argmax(breaks)), rule) for rule, breaks in rules.items() if breaks.any()]
    if broken:
        raise MidiError(_damage(min(broken)[1]))


def _damage(what: str) -> str:
    return f"the file is damaged: {what}; export it again or get another copy"
