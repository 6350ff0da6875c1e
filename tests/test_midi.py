"""Reading and writing MIDI: exact notes, pedal rules, limits, and `MidiError` alone for damaged input."""

import io
from pathlib import Path
from typing import Any

import mido
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from midi_files import PROGRAM, chunk, midi, notes, off, on, tempo, track

from music_ar.midi import MidiError, Performance, read_midi, write_midi

DATA = Path(__file__).parent / "data"
GOLDENS = np.load(DATA / "goldens.npz")
PIECES = sorted({name.split("/")[0] for name in GOLDENS.files})


@st.composite
def performances(draw: st.DrawFn, *, most: int = 40) -> Performance:
    count = draw(st.integers(1, most))
    columns = st.tuples(st.integers(0, 4000), st.integers(1, 3000), st.integers(58, 62), st.integers(1, 127))
    rows = np.array(draw(st.lists(columns, min_size=count, max_size=count)))
    onset_s = rows[:, 0] / 1000
    return Performance(onset_s=onset_s, offset_s=onset_s + rows[:, 1] / 1000, pitch=rows[:, 2], velocity=rows[:, 3])


@pytest.mark.parametrize("name", PIECES)
def test_real_pieces_match_note_seq_bit_for_bit(name):
    performance = read_midi(DATA / name)
    golden = GOLDENS[f"{name}/notes"]
    columns = [performance.onset_s, performance.offset_s, performance.pitch, performance.velocity]
    assert np.array_equal(np.stack(columns, axis=1), golden)


def test_a_path_bytes_and_an_open_file_give_the_same_notes():
    path = DATA / PIECES[0]
    with path.open("rb") as file:
        assert read_midi(file) == read_midi(path) == read_midi(str(path)) == read_midi(path.read_bytes())


@pytest.mark.parametrize("midi_format", [0, 1])
def test_formats_0_and_1_running_status_and_note_on_with_velocity_zero(midi_format):
    events = track((0, on(60, 10)), (100, bytes([62, 20])), (200, bytes([60, 0])), (300, bytes([62, 0])))
    assert notes(read_midi(midi(events, midi_format=midi_format))) == [(0, 0.2, 60, 10), (0.1, 0.3, 62, 20)]


def test_tracks_channels_and_instruments_merge_into_one_piano_without_drums():
    violin = track((0, bytes([PROGRAM | 1, 40])), (0, on(70, 30, channel=1)), (50, off(70, channel=1)))
    drums = track((0, on(36, 99, channel=9)), (50, off(36, channel=9)))
    others = [track((tick, on(40, 1, channel=3)), (tick + 1, off(40, channel=3))) for tick in range(100, 120)]
    performance = read_midi(midi(violin, drums, *others))
    assert notes(performance)[0] == (0, 0.05, 70, 30)
    assert len(performance) == 1 + 20
    assert set(performance.pitch.tolist()) == {40, 70}


def test_tempo_changes_apply_to_everything_after_them():
    tempos = track((0, tempo(1_000_000)), (500, tempo(250_000)), (1000, tempo(250_000)))
    played = track((250, on(60)), (500, off(60)), (1000, on(62)), (2000, off(62)))
    # 500 ticks of 2 ms, then ticks of 0.5 ms.
    assert notes(read_midi(midi(tempos, played))) == [(0.5, 1.0, 60, 64), (1.25, 1.75, 62, 64)]


@pytest.mark.parametrize(
    ("division", "seconds_per_tick"),
    [(bytes([256 - 25, 40]), 0.001), (bytes([256 - 24, 10]), 1 / 240), (bytes([256 - 29, 100]), 1001 / 3_000_000)],
)
def test_smpte_time_ignores_tempos(division, seconds_per_tick):
    data = midi(track((0, tempo(123_456)), (1000, on(60)), (2000, off(60))), division=division)
    performance = read_midi(data)
    assert performance.onset_s[0] == pytest.approx(1000 * seconds_per_tick)
    assert performance.offset_s[0] == pytest.approx(2000 * seconds_per_tick)


def test_foreign_chunks_and_a_longer_header_are_skipped():
    played = track((0, on(60)), (100, off(60)))
    header = chunk(b"MThd", bytes([0, 1, 0, 1, 1, 0xF4]) + b"more")
    assert notes(read_midi(header + chunk(b"XFIH", b"words") + played + b"tail")) == [(0, 0.1, 60, 64)]


def test_a_note_off_ends_all_notes_of_its_pitch_and_a_missing_one_costs_no_other_note():
    both = track((0, on(60, 1)), (10, on(60, 2)), (20, off(60)), (30, on(60, 3)), (40, off(60)))
    assert notes(read_midi(midi(both))) == [(0, 0.02, 60, 1), (0.01, 0.02, 60, 2), (0.03, 0.04, 60, 3)]


def test_notes_without_length_are_dropped():
    data = midi(track((0, on(60)), (0, off(60)), (10, on(61)), (20, off(61))))
    assert notes(read_midi(data)) == [(0.01, 0.02, 61, 64)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"MThd\x00\x00", "truncated"),
        (midi(track()), "no notes"),
        (midi(track((0, on(40, channel=9)), (5, off(40, 9)))), "no notes"),
        (midi(), "no tracks"),
        (midi(track((0, on(60)), (100, off(60))))[:-3], "truncated"),
        (midi(track((0, on(60)), (100, off(60))), division=b"\x00\x00"), "0 ticks"),
        (midi(track((0, on(60)), (100, off(60))), division=b"\x99\x04"), "SMPTE"),
        (midi(chunk(b"MTrk", b"")), "empty"),
        (midi(track((0, on(60)), (2**28 - 1, off(60)))), "the last note ends at 268,435.5 s; cut the file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "bytes",
)
def test_errors_say_what_is_wrong_with_the_bytes(data, message):
    with pytest.raises(MidiError, match=message):
        read_midi(data)


def test_too_many_tracks_are_refused():
    data = midi(track((0, on(60)), (100, off(60)))) + track() * 2**16
    with pytest.raises(MidiError, match="at most 65,535 tracks"):
        read_midi(data)


def test_unreadable_paths_are_midi_errors(tmp_path):
    for path in (tmp_path / "missing.mid", tmp_path, "null\0character"):
        with pytest.raises(MidiError, match="cannot read"):
            read_midi(path)


def test_limits_on_bytes_notes_and_seconds():
    data = (DATA / PIECES[0]).read_bytes()
    performance = read_midi(data)
    exact = {"max_bytes": len(data), "max_notes": len(performance), "max_seconds": performance.duration_s}
    assert read_midi(data, **exact) == performance
    for (name, limit), unit in zip(exact.items(), ["bytes", "notes", "s of music"], strict=True):
        with pytest.raises(MidiError, match=f"at most {limit - 1:,.0f} {unit} are accepted"):
            read_midi(io.BytesIO(data), **{**exact, name: limit - 1})


def check_notes_or_midi_error(data: bytes) -> None:
    try:
        performance = read_midi(data)
    except MidiError:
        return
    assert len(performance) > 0


@given(st.binary(max_size=300))
def test_any_bytes_give_a_performance_or_a_midi_error(data):
    check_notes_or_midi_error(data)
    check_notes_or_midi_error(midi(chunk(b"MTrk", data)))


@given(
    st.sampled_from(PIECES),
    st.integers(50, 2000),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8),
    st.booleans(),
)
def test_damaged_real_files_give_a_performance_or_a_midi_error(name, length, changes, keep_frame):
    data = bytearray((DATA / name).read_bytes()[:length])
    for position, value in changes:
        data[position % len(data)] = value
    if keep_frame:  # damage the events of the track, not the length of its chunk
        start = data.rfind(b"MTrk")
        if start >= 0:
            data[start + 4 : start + 8] = (
                (len(data) - start - 8).to_bytes(4, signed=False) if len(data) >= start + 8 else b""
            )
    check_notes_or_midi_error(bytes(data))


def written_and_read(performance: Performance) -> Performance:
    file = io.BytesIO()
    write_midi(performance, file)
    return read_midi(file.getvalue())


@given(performances(), st.integers(0, 1000))
def test_written_files_read_back_within_a_tick(performance, late_us):
    performance = performance.shift(late_us / 1e6)
    again = written_and_read(performance)
    assert len(again) == len(performance)
    # Onsets that round to the same tick may change order, so compare each column by itself.
    assert np.allclose(np.sort(again.onset_s), np.sort(performance.onset_s), rtol=0, atol=0.0003)
    assert np.allclose(np.sort(again.offset_s), np.sort(performance.offset_s), rtol=0, atol=0.0008)
    assert sorted(zip(again.pitch, again.velocity, strict=True)) == sorted(
        zip(performance.pitch, performance.velocity, strict=True)
    )


@pytest.mark.parametrize("count", [30, 16_000])
def test_overlapping_notes_of_one_pitch_survive_writing(count):
    onset_s = np.arange(count) / 100
    velocity = 1 + np.arange(count) % 127
    pile = Performance(onset_s=onset_s, offset_s=2 * count / 100 - onset_s, pitch=np.full(count, 60), velocity=velocity)
    assert notes(written_and_read(pile)) == notes(pile)


@given(
    st.lists(
        st.tuples(
            st.one_of(st.floats(0, 3), st.floats(0, 40 * 3600)), st.floats(1e-9, 1e-3), st.sampled_from([0, 60, 127])
        ),
        min_size=1,
        max_size=30,
    )
)
def test_what_is_written_can_be_read(rows):
    """However short the notes are, and however late; or it is not written."""
    onset_s, length_s, pitch = (np.array(column) for column in zip(*rows, strict=True))
    offset_s = np.maximum(onset_s + length_s, np.nextafter(onset_s, np.inf))
    piece = Performance(onset_s=onset_s, offset_s=offset_s, pitch=pitch, velocity=np.full(len(rows), 64))
    if piece.duration_s > 36 * 3600 - 1:
        with pytest.raises(MidiError, match=r"lasts at most 129,599 s, got .* s; write it in parts"):
            written_and_read(piece)
    else:
        assert np.allclose(np.sort(written_and_read(piece).onset_s), piece.onset_s, rtol=0, atol=0.0003)


def test_more_overlapping_notes_than_tracks_are_not_written():
    many = np.full(65_535, 60)
    pile = Performance(onset_s=np.zeros(len(many)), offset_s=np.ones(len(many)), pitch=many, velocity=many)
    with pytest.raises(MidiError, match="at most 65,534 notes of one pitch may overlap in a MIDI file, got 65,535"):
        write_midi(pile, io.BytesIO())


def test_other_readers_find_a_plain_piano_in_written_files(tmp_path):
    performance = read_midi(DATA / PIECES[0])
    write_midi(performance, tmp_path / "piece.mid")
    file = mido.MidiFile(tmp_path / "piece.mid")
    assert file.type == 1
    assert file.length == pytest.approx(performance.duration_s, abs=0.002)
    messages = list(file)
    assert [message.program for message in messages if message.type == "program_change"] == [0]
    assert sum(message.type == "note_on" and message.velocity > 0 for message in messages) == len(performance)


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "piece.mid"
    performance = read_midi(DATA / PIECES[0])
    write_midi(performance, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_midi(performance.crop(0, 5), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    write_midi(performance.crop(0, 5), path)
    assert path.read_bytes() != before


def test_an_empty_performance_is_not_written(tmp_path):
    with pytest.raises(MidiError, match="without notes"):
        write_midi(Performance.empty(), tmp_path / "empty.mid")


def test_notes_are_sorted_by_onset_then_pitch_and_columns_are_read_only():
    performance = Performance(
        onset_s=np.array([1.0, 0.0, 0.0]),
        offset_s=np.array([2.0, 1.0, 3.0]),
        pitch=np.array([60, 72, 48]),
        velocity=np.array([1, 2, 3]),
    )
    assert notes(performance) == [(0, 3, 48, 3), (0, 1, 72, 2), (1, 2, 60, 1)]
    assert performance.duration_s == 3
    with pytest.raises(ValueError, match="read-only"):
        performance.onset_s[0] = 5


@given(performances())
def test_notes_are_in_lexsort_order(performance):
    order = np.lexsort((performance.pitch, performance.onset_s))
    assert np.array_equal(order, np.arange(len(performance)))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("onset_s", [-0.1, 0.0], "onset_s must be finite"),
        ("onset_s", [np.nan, 0.0], "onset_s must be finite"),
        ("offset_s", [1.0, 0.0], "offset_s must be"),
        ("offset_s", [1.0, np.inf], "offset_s must be"),
        ("pitch", [128, 0], r"pitch must be in 0\.\.127"),
        ("velocity", [0, 1], r"velocity must be in 1\.\.127"),
    ],
)
def test_impossible_notes_are_refused(column, value, message):
    columns = {"onset_s": [0.0, 0.5], "offset_s": [1.0, 1.0], "pitch": [60, 61], "velocity": [1, 127]}
    arrays: dict[str, Any] = {name: np.array(given) for name, given in {**columns, column: value}.items()}
    with pytest.raises(MidiError, match=message):
        Performance(**arrays)


def test_crop_keeps_the_notes_that_begin_inside_and_cuts_them_at_the_end():
    performance = read_midi(
        midi(track((0, on(60)), (100, on(61)), (200, off(60)), (300, off(61)), (400, on(62)), (500, off(62))))
    )
    assert notes(performance.crop(0.1, 0.25)) == [(0, 0.15, 61, 64)]
    assert performance.crop() == performance
    assert len(performance.crop(9)) == 0
    assert Performance.empty().duration_s == 0


@example(0.25)
@given(st.floats(0, 100))
def test_shift_moves_all_times(seconds):
    performance = read_midi(DATA / PIECES[0])
    moved = performance.shift(seconds)
    assert np.allclose(moved.onset_s - performance.onset_s, seconds)
    assert np.allclose(moved.offset_s - performance.offset_s, seconds)
    assert np.array_equal(moved.pitch, performance.pitch)
