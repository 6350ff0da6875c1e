"""What a MIDI file says about a performance, before the pedal is folded into the notes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64

from music_ar.midi.clock import Clock
from music_ar.midi.events import CONTROL, DEVICE_NAME, NOTE_ON, PORT, TEMPO, TRACK_NAME, Events, Messages, read_events
from music_ar.midi.keys import NoteEvents, press_keys
from music_ar.midi.performance import MidiError, Performance
from music_ar.midi.smf import MidiFile, open_file
from music_ar.midi.sustain import Controls, Keys, fold

_DRUM_CHANNEL = 9


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """The contents of a MIDI file, as far as they matter to a piano. Times are in ticks.

    Attributes:
        keys: the notes as played, without drums, in the order of their note-ons.
        controls: what the pedals did, and other controllers that end notes (`events.CONTROLLERS`).
        clock: ticks -> seconds.
        tempo_tick: when each tempo begins.
        tempo: microseconds per quarter note.
        ticks_per_quarter: resolution; None if the ticks are parts of a second.
        track_names: of every track, in the file's own encoding; empty if it has none.
        end_tick: when the longest track ends.
    """

    keys: Keys
    controls: Controls
    clock: Clock
    tempo_tick: Int64[np.ndarray, " k"]
    tempo: Int64[np.ndarray, " k"]
    ticks_per_quarter: int | None
    track_names: tuple[bytes, ...]
    end_tick: int

    def performance(self) -> Performance:
        """Fold the pedal into the notes."""
        keys, end = fold(self.keys, self.controls)
        onset_s, offset_s = self.clock.seconds(keys.onset), self.clock.seconds(end)
        sounds = offset_s > onset_s  # false if a tick is shorter than float64 can tell
        return Performance(
            onset_s=onset_s[sounds],
            offset_s=offset_s[sounds],
            pitch=keys.pitch[sounds].astype(np.int32),
            velocity=keys.velocity[sounds].astype(np.int32),
        )


def read_recording(data: bytes, *, max_notes: int) -> Recording:
    """Read a MIDI file.

    Raises:
        MidiError: `data` is not a usable MIDI file, or has more than `max_notes` notes, not counting drums.
    """
    file = open_file(data)
    events = read_events(file.tracks)
    messages, channel = events.messages, _channels(events)
    kind = messages.status >> 4
    is_note = (kind != CONTROL) & (channel % 16 != _DRUM_CHANNEL)
    note_count = int(np.count_nonzero(is_note & (kind == NOTE_ON) & (messages.data2 > 0)))
    if note_count > max_notes:
        raise MidiError(f"at most {max_notes:,} notes are accepted, but the file has {note_count:,}; cut it into parts")
    if (np.diff(messages.tick) < 0).any():
        order = np.argsort(messages.tick, kind="stable")
        messages, channel, is_note = messages.select(order), channel[order], is_note[order]
    return _recording(file, events, messages, channel, is_note)


def _recording(
    file: MidiFile,
    events: Events,
    messages: Messages,
    channel: Int32[np.ndarray, " n"],
    is_note: Bool[np.ndarray, " n"],
) -> Recording:
    """Sort the messages, which are in the order in which they are played, into notes and controllers."""
    tempo_tick, tempo = _tempos(events)
    if file.tick_s is not None:
        clock = Clock.constant(file.tick_s)
    else:
        assert file.ticks_per_quarter is not None
        clock = Clock.of_tempos(tempo_tick, tempo, file.ticks_per_quarter)
    place = np.flatnonzero(is_note)
    played = messages.select(place)
    notes = NoteEvents(
        tick=played.tick,
        order=place,
        track=np.searchsorted(events.track_start, played.position, side="right"),
        channel=channel[place],
        pitch=played.data1,
        velocity=np.where(played.status >> 4 == NOTE_ON, played.data2, 0).astype(np.uint8),
    )
    place = np.flatnonzero(messages.status >> 4 == CONTROL)
    moved = messages.select(place)
    controls = Controls(time=moved.tick, order=place, channel=channel[place], number=moved.data1, value=moved.data2)
    return Recording(
        keys=press_keys(notes, events.end_tick),
        controls=controls,
        clock=clock,
        tempo_tick=tempo_tick,
        tempo=tempo,
        ticks_per_quarter=file.ticks_per_quarter,
        track_names=_track_names(events),
        end_tick=events.end_tick,
    )


def _tempos(events: Events) -> tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"]]:
    """Ticks and microseconds per quarter note of the tempos. Shorter meta-events are ignored, and further bytes too."""
    metas = events.metas.select((events.metas.kind == TEMPO) & (events.metas.length >= 3))
    metas = metas.select(np.argsort(metas.tick, kind="stable"))
    data = np.frombuffer(events.data, np.uint8)
    high, middle, low = (data[metas.start + byte].astype(np.int64) for byte in range(3))
    return metas.tick, high << 16 | middle << 8 | low


def _track_names(events: Events) -> tuple[bytes, ...]:
    names = [b""] * len(events.track_start)
    for track, _, name in _first_of_each_track(events, TRACK_NAME):
        names[track] = name
    return tuple(names)


def _channels(events: Events) -> Int32[np.ndarray, " n"]:
    """The channel of every message: 16 times the number of its port, plus 0..15.

    A port is set for the rest of the track, by its number or by the name of a device. Without either it is port 0. So
    is the first device named in the file, since such files often name it in some of their tracks only.
    """
    channel = (events.messages.status & 15).astype(np.int32)
    metas = events.metas.select((events.metas.kind == PORT) & (events.metas.length == 1))
    position, port = metas.position.tolist(), [events.data[start] for start in metas.start.tolist()]
    devices: dict[bytes, int] = {}
    for _, where, name in _first_of_each_track(events, DEVICE_NAME):
        position.append(where)
        port.append(devices.setdefault(name, len(devices)))
    if not any(port):
        return channel
    position = np.concatenate([events.track_start, np.array(position, np.int64)])
    port = np.concatenate([np.zeros(len(events.track_start), np.int32), np.array(port, np.int32)])
    order = np.argsort(position, kind="stable")
    last = np.searchsorted(position[order], events.messages.position, side="right") - 1
    return channel + 16 * port[order][last]


def _first_of_each_track(events: Events, kind: int) -> Iterator[tuple[int, int, bytes]]:
    """Track, position and contents of the first meta-event of this kind in each track that has one."""
    metas = events.metas.select(events.metas.kind == kind)
    tracks, first = np.unique(np.searchsorted(events.track_start, metas.position, side="right") - 1, return_index=True)
    for track, *(position, _, start, length) in zip(
        tracks.tolist(), *(column.tolist() for column in metas.select(first)[1:]), strict=False
    ):
        yield track, position, events.data[start : start + length]
