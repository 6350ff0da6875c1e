"""Conversion to and from pretty_midi and note-seq objects; the extra `interop` installs both packages."""

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from music_ar.midi.io import ACOUSTIC_GRAND_PIANO, TICKS_PER_QUARTER
from music_ar.midi.performance import Performance
from music_ar.midi.sustain import PEDAL_DOWN_VALUE, SUSTAIN_CONTROLLER, Instrument, merge

if TYPE_CHECKING:
    import pretty_midi

_QUARTERS_PER_MINUTE = 120.0


def to_pretty_midi(performance: Performance) -> "pretty_midi.PrettyMIDI":
    """Convert the notes to a pretty_midi object with one piano."""
    import pretty_midi

    piano = pretty_midi.Instrument(program=ACOUSTIC_GRAND_PIANO, name="Piano")
    piano.notes = [
        pretty_midi.Note(start=onset_s, end=offset_s, pitch=pitch, velocity=velocity)
        for onset_s, offset_s, pitch, velocity in _rows(performance)
    ]
    midi = pretty_midi.PrettyMIDI(resolution=TICKS_PER_QUARTER, initial_tempo=_QUARTERS_PER_MINUTE)
    midi.instruments.append(piano)
    return midi


def from_pretty_midi(midi: "pretty_midi.PrettyMIDI") -> Performance:
    """Convert a pretty_midi object to what `read_midi` would read from its file: no drums, pedal folded into the notes.

    Raises:
        MidiError: a note's pitch, velocity or time is impossible.
    """
    instruments = []
    for player in midi.instruments:
        notes = [] if player.is_drum else [(note.start, note.end, note.pitch, note.velocity) for note in player.notes]
        pedal = [(event.time, event.value) for event in player.control_changes if event.number == SUSTAIN_CONTROLLER]
        instruments.append(_instrument(notes, pedal))
    return merge(instruments)


def to_note_sequence(performance: Performance) -> Any:
    """Convert the notes to a `note_seq.NoteSequence`."""
    from note_seq.protobuf import music_pb2  # pyright: ignore[reportMissingImports]

    sequence = music_pb2.NoteSequence(ticks_per_quarter=TICKS_PER_QUARTER, total_time=performance.duration_s)
    sequence.tempos.add(qpm=_QUARTERS_PER_MINUTE)
    for onset_s, offset_s, pitch, velocity in _rows(performance):
        sequence.notes.add(start_time=onset_s, end_time=offset_s, pitch=pitch, velocity=velocity)
    return sequence


def from_note_sequence(sequence: Any) -> Performance:
    """Convert a `note_seq.NoteSequence` in the same way as `from_pretty_midi`.

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
    return merge([_instrument(notes[number], pedals[number]) for number in sorted({*notes, *pedals})])


def _rows(performance: Performance) -> Iterator[tuple[float, float, int, int]]:
    columns = (performance.onset_s, performance.offset_s, performance.pitch, performance.velocity)
    return zip(*(column.tolist() for column in columns), strict=True)


def _instrument(notes: list[tuple[float, float, int, int]], pedal: list[tuple[float, int]]) -> Instrument:
    notes_nx4 = np.array(notes, np.float64).reshape(-1, 4)
    notes_nx4 = notes_nx4[notes_nx4[:, 1] != notes_nx4[:, 0]]  # zero-length notes are dropped, as in `read_midi`
    pedal_px2 = np.array(pedal, np.float64).reshape(-1, 2)
    return Instrument(
        onset_s=notes_nx4[:, 0],
        offset_s=notes_nx4[:, 1],
        pitch=notes_nx4[:, 2].astype(np.int32),
        velocity=notes_nx4[:, 3].astype(np.int32),
        pedal_s=pedal_px2[:, 0],
        pedal_down=pedal_px2[:, 1] >= PEDAL_DOWN_VALUE,
    )
