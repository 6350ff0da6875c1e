"""Conversion to and from pretty_midi and note-seq, which also judge what `read_midi` reads."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from midi_files import midi, notes, off, on, track

from music_ar.midi import MidiError, Performance, read_midi
from music_ar.midi.interop import from_note_sequence, from_pretty_midi, to_note_sequence, to_pretty_midi

DATA = Path(__file__).parent / "data"
PIECES = sorted(path.name for path in DATA.glob("*.midi"))


@pytest.fixture(scope="module")
def pretty_midi():
    return pytest.importorskip("pretty_midi")


@pytest.fixture(scope="module")
def midi_io():
    """note-seq's reader; importing it warns of a missing ffmpeg."""
    with warnings.catch_warnings(action="ignore"):
        return pytest.importorskip("note_seq.midi_io")


@st.composite
def performances(draw):
    """Notes of few pitches, so that many of one pitch overlap; sometimes none."""
    columns = st.tuples(st.integers(0, 4000), st.integers(1, 3000), st.integers(58, 62), st.integers(1, 127))
    rows = np.array(draw(st.lists(columns, max_size=40)), int).reshape(-1, 4)
    onset_s = rows[:, 0] / 1000
    return Performance(onset_s=onset_s, offset_s=onset_s + rows[:, 1] / 1000, pitch=rows[:, 2], velocity=rows[:, 3])


@pytest.mark.usefixtures("pretty_midi")
@given(performances())
def test_pretty_midi_round_trip(performance):
    assert from_pretty_midi(to_pretty_midi(performance)) == performance


@pytest.mark.parametrize("name", PIECES)
def test_pretty_midi_reads_the_same_notes(pretty_midi, name):
    assert from_pretty_midi(pretty_midi.PrettyMIDI(str(DATA / name))) == read_midi(DATA / name)


@given(
    st.lists(
        st.tuples(st.sampled_from([0, 0, 1, 7]), st.sampled_from([60, 61]), st.sampled_from([0, 0, 1, 99])),
        min_size=1,
        max_size=20,
    )
)
@example([(0, 60, 1), (1, 60, 1), (0, 60, 0), (0, 60, 1)])
def test_pretty_midi_pairs_note_ons_and_note_offs_alike(pretty_midi, events):
    ticks = np.cumsum([delta for delta, _, _ in events]).tolist()
    played = [(tick, on(pitch, velocity)) for tick, (_, pitch, velocity) in zip(ticks, events, strict=True)]
    data = midi(track(*played, *[(ticks[-1] + 5, off(pitch)) for pitch in (60, 61)]))
    expected = from_pretty_midi(pretty_midi.PrettyMIDI(io.BytesIO(data)))
    if len(expected):
        assert sorted(notes(read_midi(data))) == sorted(notes(expected))


@pytest.mark.usefixtures("midi_io")
@given(performances())
def test_note_sequence_round_trip(performance):
    assert from_note_sequence(to_note_sequence(performance)) == performance


@pytest.mark.parametrize("name", PIECES)
def test_note_seq_reads_the_same_notes(midi_io, name):
    assert from_note_sequence(midi_io.midi_file_to_note_sequence(str(DATA / name))) == read_midi(DATA / name)


def test_drums_are_dropped_and_each_pedal_acts_on_its_own_instrument(pretty_midi):
    midi = pretty_midi.PrettyMIDI()
    for program, is_drum, pitch in ((0, False, 60), (40, False, 70), (0, True, 36)):
        player = pretty_midi.Instrument(program, is_drum=is_drum)
        player.notes = [pretty_midi.Note(64, pitch, 0.0, 1.0)]
        midi.instruments.append(player)
    midi.instruments[0].control_changes = [
        pretty_midi.ControlChange(64, 127, 0.5),
        pretty_midi.ControlChange(64, 0, 2.0),
    ]
    performance = from_pretty_midi(midi)
    assert performance.pitch.tolist() == [60, 70]
    assert performance.offset_s.tolist() == [2.0, 1.0]


def test_impossible_notes_are_refused(pretty_midi):
    midi = pretty_midi.PrettyMIDI()
    midi.instruments = [pretty_midi.Instrument(0)]
    midi.instruments[0].notes = [pretty_midi.Note(0, 60, 0.0, 1.0)]
    with pytest.raises(MidiError, match="velocity"):
        from_pretty_midi(midi)
