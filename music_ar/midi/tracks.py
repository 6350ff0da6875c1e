"""Notes -> tracks of a MIDI file, with or without sustain pedal."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int64

from music_ar.midi.events import DRUM_CHANNEL, TEMPO
from music_ar.midi.pedalling import Playing, unfold
from music_ar.midi.performance import MidiError
from music_ar.midi.raw_events import (
    CONTROL,
    NOTE_OFF,
    NOTE_ON,
    PROGRAM,
    TRACK_NAME,
    Event,
    RawFile,
    meta_event,
)
from music_ar.midi.sustain import SUSTAIN_CONTROLLER
from music_ar.midi.voices import voices

PIANO_CHANNELS = tuple(channel for channel in range(16) if channel != DRUM_CHANNEL)

# Order of the events at one tick: notes end before the pedal comes up, and begin after it has gone down.
_RELEASE, _PEDAL_UP, _PEDAL_DOWN, _STRIKE = range(4)
_RELEASE_VELOCITY = 64
_PIANO = 0  # the program of an acoustic grand piano


class TickNotes(NamedTuple):
    """Notes in ticks, sorted by onset, each at least a tick long."""

    onset: Int64[np.ndarray, " n"]
    offset: Int64[np.ndarray, " n"]
    pitch: Int[np.ndarray, " n"]
    velocity: Int[np.ndarray, " n"]

    def select(self, kept: Bool[np.ndarray, " n"]) -> "TickNotes":
        """Return the notes where `kept` is true."""
        return TickNotes(*(column[kept] for column in self))


def note_tracks(
    notes: TickNotes,
    *,
    channels: Sequence[int],
    name: str,
    program: int | None,
    pedal_ticks_per_s: float | None,
    sounding: int = 0,
) -> list[list[Event]]:
    """Write notes as a track for each voice.

    Args:
        notes: the notes.
        channels: a channel for each voice.
        name: name of the tracks.
        program: their instrument; None keeps the channels' own.
        pedal_ticks_per_s: length of a tick, to unfold the notes into key releases and pedal; None writes no pedal.
        sounding: so many notes, the first, sound already and are ended elsewhere. The pedal respects their ends.

    Raises:
        MidiError: there are more voices than channels.
    """
    voice = voices(notes.onset, notes.offset, notes.pitch)
    count = int(voice.max(initial=0)) + 1
    if count > len(channels):
        raise MidiError(f"{count} notes of one pitch sound at once; a MIDI file has channels for {len(channels)}")
    written = np.arange(len(notes.pitch)) >= sounding
    tracks = []
    for number, channel in enumerate(channels[:count]):
        chosen = voice == number
        # The pedal is for the first voice alone: the others are rare, and each would need a pedal of its own.
        playing = _playing(notes.select(chosen), pedal_ticks_per_s if number == 0 else None)
        tracks.append(
            [
                meta_event(0, TRACK_NAME, name.encode()),
                *([] if program is None else [Event(0, bytes([PROGRAM | channel, program]))]),
                *_events(notes.select(chosen), playing, channel, written[chosen]),
            ]
        )
    return tracks


def piano_file(notes: TickNotes, *, ticks_per_quarter: int, ticks_per_s: int) -> bytes:
    """Write a file of one piano that plays with the pedal. Notes of one pitch that overlap have further channels."""
    tracks = note_tracks(
        notes, channels=PIANO_CHANNELS, name="Piano", program=_PIANO, pedal_ticks_per_s=float(ticks_per_s)
    )
    tempo = meta_event(0, TEMPO, (1_000_000 * ticks_per_quarter // ticks_per_s).to_bytes(3))
    return RawFile(ticks_per_quarter.to_bytes(2), [[tempo, *tracks[0]], *tracks[1:]]).to_bytes()


def _playing(notes: TickNotes, ticks_per_s: float | None) -> Playing:
    if ticks_per_s is None or not len(notes.pitch):
        never = np.zeros(0, np.int64)
        return Playing(notes.offset, never, never)
    return unfold(notes.onset, notes.offset, notes.pitch, ticks_per_s)


def _events(notes: TickNotes, playing: Playing, channel: int, written: Bool[np.ndarray, " n"]) -> list[Event]:
    on, off, pedal = NOTE_ON | channel, NOTE_OFF | channel, CONTROL | channel
    pressed, released = ((pedal, SUSTAIN_CONTROLLER, value) for value in (127, 0))
    pitch, velocity = notes.pitch[written].tolist(), notes.velocity[written].tolist()
    releases = zip(playing.key_up[written].tolist(), pitch, strict=True)
    timed = [(tick, _RELEASE, (off, key, _RELEASE_VELOCITY)) for tick, key in releases]
    timed += [(tick, _PEDAL_UP, released) for tick in playing.pedal_up.tolist()]
    timed += [(tick, _PEDAL_DOWN, pressed) for tick in playing.pedal_down.tolist()]
    strikes = zip(notes.onset[written].tolist(), pitch, velocity, strict=True)
    timed += [(tick, _STRIKE, (on, key, force)) for tick, key, force in strikes]
    return [Event(tick, bytes(data)) for tick, _, data in sorted(timed)]
