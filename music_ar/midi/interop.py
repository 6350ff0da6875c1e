"""Conversion to and from pretty_midi and note-seq objects."""

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from music_ar.midi.io import (
    ACOUSTIC_GRAND_PIANO,
    PEDAL_DOWN_VALUE,
    SUSTAIN_CONTROLLER,
    TICKS_PER_QUARTER,
    _Instrument,
    _play,
)
from music_ar.midi.performance import Performance

if TYPE_CHECKING:
    import pretty_midi


def to_pretty_midi(performance: Performance) -> "pretty_midi.PrettyMIDI":
    """The notes as a pretty_midi object with one piano; pretty_midi must be installed."""
    import pretty_midi

    piano = pretty_midi.Instrument(program=ACOUSTIC_GRAND_PIANO, name="Piano")
    piano.notes = [
        pretty_midi.Note(start=onset_s, end=offset_s, pitch=pitch, velocity=velocity)
        for onset_s, offset_s, pitch, velocity in _rows(performance)
    ]
    midi = pretty_midi.PrettyMIDI(resolution=TICKS_PER_QUARTER, initial_tempo=120.0)
    midi.instruments.append(piano)
    return midi


def from_pretty_midi(midi: "pretty_midi.PrettyMIDI") -> Performance:
    """The notes of a pretty_midi object, drums dropped and each instrument's sustain pedal folded in.

    Raises:
      MidiError: a note's pitch, velocity or time is impossible.
    """
    instruments = []
    for player in midi.instruments:
        notes = [] if player.is_drum else [(note.start, note.end, note.pitch, note.velocity) for note in player.notes]
        pedal = [(event.time, event.value) for event in player.control_changes if event.number == SUSTAIN_CONTROLLER]
        instruments.append(_instrument_of_rows(notes, pedal))
    return _play(instruments)


def to_note_sequence(performance: Performance) -> Any:
    """The notes as a `note_seq.NoteSequence`; needs the optional package note-seq."""
    from note_seq.protobuf import music_pb2  # pyright: ignore[reportMissingImports]

    sequence = music_pb2.NoteSequence(ticks_per_quarter=TICKS_PER_QUARTER, total_time=performance.duration_s)
    sequence.tempos.add(qpm=120.0)
    for onset_s, offset_s, pitch, velocity in _rows(performance):
        sequence.notes.add(start_time=onset_s, end_time=offset_s, pitch=pitch, velocity=velocity)
    return sequence


def from_note_sequence(sequence: Any) -> Performance:
    """The notes of a `note_seq.NoteSequence`, drums dropped and each instrument's sustain pedal folded in.

    Raises:
      MidiError: a note's pitch, velocity or time is impossible.
    """
    notes, pedals = defaultdict(list), defaultdict(list)
    for note in sequence.notes:
        if not note.is_drum:
            notes[note.instrument].append((note.start_time, note.end_time, note.pitch, note.velocity))
    for event in sequence.control_changes:
        if event.control_number == SUSTAIN_CONTROLLER:
            pedals[event.instrument].append((event.time, event.control_value))
    return _play([_instrument_of_rows(notes[number], pedals[number]) for number in sorted({*notes, *pedals})])


def _rows(performance: Performance) -> Iterator[tuple[float, float, int, int]]:
    columns = (performance.onset_s, performance.offset_s, performance.pitch, performance.velocity)
    return zip(*(column.tolist() for column in columns), strict=True)


def _instrument_of_rows(notes: list[tuple[float, float, int, int]], pedal: list[tuple[float, int]]) -> _Instrument:
    notes_nx4 = np.array(notes, np.float64).reshape(-1, 4)
    notes_nx4 = notes_nx4[notes_nx4[:, 1] != notes_nx4[:, 0]]  # as a MIDI file, it has no notes of no length
    pedal_px2 = np.array(pedal, np.float64).reshape(-1, 2)
    return _Instrument(
        onset_s=notes_nx4[:, 0],
        offset_s=notes_nx4[:, 1],
        pitch=notes_nx4[:, 2].astype(np.int32),
        velocity=notes_nx4[:, 3].astype(np.int32),
        pedal_s=pedal_px2[:, 0],
        pedal_down=pedal_px2[:, 1] >= PEDAL_DOWN_VALUE,
    )
