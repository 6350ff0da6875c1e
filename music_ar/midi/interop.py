"""Conversion to and from pretty_midi and note-seq objects; the extra `interop` installs both packages."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from music_ar.midi.events import CONTROLLERS
from music_ar.midi.io import ACOUSTIC_GRAND_PIANO, TICKS_PER_QUARTER
from music_ar.midi.performance import Performance
from music_ar.midi.sustain import Controls, Keys, fold

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

    Each instrument has a channel of its own. Since the object does not know the order of simultaneous events, movements
    of controllers come first, then note-ons, then note-offs, as in note-seq.

    Raises:
        MidiError: a note's pitch, velocity or time is impossible.
    """
    notes, controls = [], []
    for channel, player in enumerate(midi.instruments):
        played = [] if player.is_drum else player.notes
        notes += [(note.start, note.end, channel, note.pitch, note.velocity) for note in played]
        controls += [(event.time, channel, event.number, event.value) for event in player.control_changes]
    return _performance(notes, controls)


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
    notes = [
        (note.start_time, note.end_time, note.instrument, note.pitch, note.velocity)
        for note in sequence.notes
        if not note.is_drum
    ]
    controls = [
        (event.time, event.instrument, event.control_number, event.control_value) for event in sequence.control_changes
    ]
    return _performance(notes, controls)


def _rows(performance: Performance) -> Iterator[tuple[float, float, int, int]]:
    columns = (performance.onset_s, performance.offset_s, performance.pitch, performance.velocity)
    return zip(*(column.tolist() for column in columns), strict=True)


def _performance(
    notes: Sequence[tuple[float, float, int, int, int]], controls: Sequence[tuple[float, int, int, int]]
) -> Performance:
    """Fold the pedal into the notes.

    Args:
        notes: onset, offset, instrument, pitch, velocity.
        controls: time, instrument, number, value.
    """
    notes_nx5 = np.array(sorted(notes, key=lambda note: note[0]), np.float64).reshape(-1, 5)
    notes_nx5 = notes_nx5[notes_nx5[:, 1] != notes_nx5[:, 0]]  # zero-length notes are dropped, as in `read_midi`
    moves = sorted((move for move in controls if move[2] in CONTROLLERS), key=lambda move: move[0])
    controls_cx4 = np.array(moves, np.float64).reshape(-1, 4)
    times = (controls_cx4[:, 0], notes_nx5[:, 0], notes_nx5[:, 1])
    place = np.argsort(np.argsort(np.concatenate(times), kind="stable"))
    control_order, onset_order, release_order = np.split(place, np.cumsum([len(time) for time in times[:2]]))
    _, channel = np.unique(np.concatenate([controls_cx4[:, 1], notes_nx5[:, 2]]), return_inverse=True)
    keys = Keys(
        onset=notes_nx5[:, 0],
        release=notes_nx5[:, 1],
        onset_order=onset_order,
        release_order=release_order,
        channel=channel[len(moves) :],
        pitch=notes_nx5[:, 3].astype(np.int32),
        velocity=notes_nx5[:, 4].astype(np.int32),
    )
    folded, offset_s = fold(
        keys,
        Controls(
            time=controls_cx4[:, 0],
            order=control_order,
            channel=channel[: len(moves)],
            number=controls_cx4[:, 2].astype(np.int32),
            value=controls_cx4[:, 3].clip(0, 127).astype(np.int32),
        ),
    )
    return Performance(onset_s=folded.onset, offset_s=offset_s, pitch=folded.pitch, velocity=folded.velocity)
