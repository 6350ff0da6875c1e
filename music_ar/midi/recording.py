"""What a MIDI file says about a performance, before the pedal is folded into the notes."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32

from music_ar.midi.clock import Clock
from music_ar.midi.events import CONTROL, DEVICE_NAME, DRUM_CHANNEL, NOTE_ON, PORT, TEMPO, Events, Messages, read_events
from music_ar.midi.keys import NoteEvents, press_keys
from music_ar.midi.performance import MidiError, Performance
from music_ar.midi.smf import MidiFile, open_file
from music_ar.midi.sustain import Controls, Keys, fold

_MAX_PORT = 255  # as many as the meta-event for ports can count


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """The contents of a MIDI file, as far as they matter to a piano. Times are in ticks.

    Attributes:
        keys: the notes as played, without drums, in the order of their note-ons.
        controls: what the sustain pedal did, and other controllers that end notes (`events.CONTROLLERS`).
        clock: ticks -> seconds.
    """

    keys: Keys
    controls: Controls
    clock: Clock

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
    is_note = (kind != CONTROL) & (channel % 16 != DRUM_CHANNEL)
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
    return Recording(keys=press_keys(notes, events.end_tick), controls=controls, clock=_clock(file, events))


def _clock(file: MidiFile, events: Events) -> Clock:
    """Ticks -> seconds. Tempos of fewer than three bytes are ignored, and further bytes too."""
    if file.tick_s is not None:
        return Clock.constant(file.tick_s)
    assert file.ticks_per_quarter is not None
    metas = events.metas.select((events.metas.kind == TEMPO) & (events.metas.length >= 3))
    metas = metas.select(np.argsort(metas.tick, kind="stable"))
    data = np.frombuffer(events.data, np.uint8)
    high, middle, low = (data[metas.start + byte].astype(np.int64) for byte in range(3))
    return Clock.of_tempos(metas.tick, high << 16 | middle << 8 | low, file.ticks_per_quarter)


def _channels(events: Events) -> Int32[np.ndarray, " n"]:
    """The channel of every message: 16 times the number of its port, plus 0..15.

    A port is set for the rest of the track, by its number or by the name of a device. Without either it is port 0. So
    is the first device named in the file, since such files often name it in some of their tracks only.
    """
    channel = (events.messages.status & 15).astype(np.int32)
    metas = events.metas.select((events.metas.kind == PORT) & (events.metas.length == 1))
    position, port = metas.position.tolist(), [events.data[start] for start in metas.start.tolist()]
    devices: dict[bytes, int] = {}
    named = events.metas.select(events.metas.kind == DEVICE_NAME)
    _, first = np.unique(np.searchsorted(events.track_start, named.position, side="right"), return_index=True)
    for _, where, _, start, length in zip(*(column.tolist() for column in named.select(first)), strict=True):
        position.append(where)
        port.append(devices.setdefault(events.data[start : start + length], min(len(devices), _MAX_PORT)))
    if not any(port):
        return channel
    position = np.concatenate([events.track_start, np.array(position, np.int64)])
    port = np.concatenate([np.zeros(len(events.track_start), np.int32), np.array(port, np.int32)])
    order = np.argsort(position, kind="stable")
    last = np.searchsorted(position[order], events.messages.position, side="right") - 1
    return channel + 16 * port[order][last]
