"""Reading and writing MIDI: exact notes, pedal rules, limits, and `MidiError` alone for damaged input."""

import io
from pathlib import Path

import mido
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from music_ar.midi import MidiError, Performance, read_midi, write_midi
from music_ar.midi.sustain import Instrument, merge

DATA = Path(__file__).parent / "data"
GOLDENS = np.load(DATA / "goldens.npz")
PIECES = sorted({name.split("/")[0] for name in GOLDENS.files})

ON, OFF, PEDAL, PROGRAM = 0x90, 0x80, 0xB0, 0xC0
DOWN, UP = 127, 0


def wait(ticks: int) -> bytes:
    """Encode a delta time as a variable-length quantity."""
    digits = [ticks & 127]
    while ticks := ticks >> 7:
        digits.append(ticks & 127 | 128)
    return bytes(reversed(digits))


def chunk(kind: bytes, body: bytes) -> bytes:
    return kind + len(body).to_bytes(4) + body


def track(*events: tuple[int, bytes], end: bytes = b"\x00\xff\x2f\x00") -> bytes:
    """Build a track chunk from (tick, event bytes) in time order."""
    ticks = [0] + [tick for tick, _ in events]
    body = b"".join(wait(tick - last) + data for last, (tick, data) in zip(ticks, events, strict=False))
    return chunk(b"MTrk", body + end)


def midi(*chunks: bytes, midi_format: int = 1, division: bytes = b"\x01\xf4") -> bytes:
    """Build a MIDI file; by default a tick is 1 ms (500 ticks per quarter note at 120 quarter notes per minute)."""
    tracks = sum(piece[:4] == b"MTrk" for piece in chunks)
    return chunk(b"MThd", midi_format.to_bytes(2) + tracks.to_bytes(2) + division) + b"".join(chunks)


def tempo(microseconds: int) -> bytes:
    return b"\xff\x51\x03" + microseconds.to_bytes(3)


def pedal(value: int, channel: int = 0) -> bytes:
    return bytes([PEDAL | channel, 64, value])


def on(pitch: int, velocity: int = 64, channel: int = 0) -> bytes:
    return bytes([ON | channel, pitch, velocity])


def off(pitch: int, channel: int = 0) -> bytes:
    return bytes([OFF | channel, pitch, 0])


def notes(performance: Performance) -> list[tuple[float, float, int, int]]:
    """Rows of (onset, offset, pitch, velocity), times rounded to 1 µs."""
    onset_s, offset_s = performance.onset_s.round(6).tolist(), performance.offset_s.round(6).tolist()
    return list(zip(onset_s, offset_s, performance.pitch.tolist(), performance.velocity.tolist(), strict=True))


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


def test_notes_without_length_or_note_off_are_dropped():
    data = midi(track((0, on(60)), (0, off(60)), (10, on(61)), (20, off(61)), (30, on(62)), (900, pedal(UP))))
    assert notes(read_midi(data)) == [(0.01, 0.02, 61, 64)]


@pytest.mark.parametrize(
    ("case", "events", "offsets"),
    [
        ("no pedal", [(0, on(60)), (100, off(60))], [0.1]),
        ("held until the pedal comes up", [(0, pedal(DOWN)), (10, on(60)), (20, off(60)), (90, pedal(UP))], [0.09]),
        ("64 is down, 63 is up", [(0, pedal(64)), (10, on(60)), (20, off(60)), (90, pedal(63))], [0.09]),
        ("pedal down after the key came up", [(0, on(60)), (10, off(60)), (20, pedal(DOWN)), (90, pedal(UP))], [0.01]),
        ("key held longer than the pedal", [(0, pedal(DOWN)), (0, on(60)), (50, pedal(UP)), (70, off(60))], [0.07]),
        ("pedal up as the key comes up", [(0, pedal(DOWN)), (0, on(60)), (50, off(60)), (50, pedal(UP))], [0.05]),
        ("pedal down as the key comes up", [(0, on(60)), (50, off(60)), (50, pedal(DOWN)), (80, pedal(UP))], [0.08]),
        (
            "pedal down and up at the same time is up",
            [(0, on(60)), (50, pedal(UP)), (50, pedal(DOWN)), (50, off(60))],
            [0.05],
        ),
        (
            "same pitch again cuts",
            [(0, pedal(DOWN)), (0, on(60)), (10, off(60)), (40, on(60)), (50, off(60)), (90, pedal(UP))],
            [0.04, 0.09],
        ),
        (
            "another pitch does not cut",
            [(0, pedal(DOWN)), (0, on(60)), (10, off(60)), (40, on(61)), (50, off(61)), (90, pedal(UP))],
            [0.09, 0.09],
        ),
        (
            "pedal never up: until the last event",
            [(0, pedal(DOWN)), (0, on(60)), (10, off(60)), (70, pedal(100))],
            [0.07],
        ),
    ],
)
def test_sustain_pedal(case, events, offsets):
    assert read_midi(midi(track(*events))).offset_s.round(6).tolist() == offsets, case


def test_the_pedal_acts_on_its_own_channel():
    data = midi(
        track(
            (0, pedal(DOWN, 0)), (0, on(60)), (0, on(70, channel=1)), (10, off(60)), (10, off(70, 1)), (90, pedal(UP))
        )
    )
    assert notes(read_midi(data)) == [(0, 0.09, 60, 64), (0, 0.01, 70, 64)]


def slow_sustain(played: list[tuple], moves: list[tuple]) -> list[tuple]:
    """note-seq's rule, event by event, for one instrument: rows of notes, and (time, value) of the pedal."""
    alive = [{"on": on, "off": off, "row": (on, pitch, velocity)} for on, off, pitch, velocity in played]
    events = [(note["on"], 2, number) for number, note in enumerate(alive)]
    events += [(note["off"], 3, number) for number, note in enumerate(alive)]
    events += [(time, 0 if value >= 64 else 1, -1) for time, value in moves]
    events.sort(key=lambda event: event[:2])
    down, sounding, gone = False, [], set()
    for time, kind, number in events:
        if kind in (0, 1):
            down = kind == 0
            if not down:
                for note in [note for note in sounding if alive[note]["off"] < time]:
                    alive[note]["off"] = time
                    sounding.remove(note)
        elif kind == 2:
            for note in [note for note in sounding if down and alive[note]["row"][1] == alive[number]["row"][1]]:
                alive[note]["off"] = time
                sounding.remove(note)
                if alive[note]["on"] == time:
                    gone.add(note)
            sounding.append(number)
        elif not down and number in sounding:
            sounding.remove(number)
    for note in sounding:
        alive[note]["off"] = events[-1][0]
    return sorted((*note["row"], note["off"]) for number, note in enumerate(alive) if number not in gone)


@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 8), st.sampled_from([60, 61]), st.integers(1, 127)), max_size=9
    ),
    st.lists(st.tuples(st.integers(0, 20), st.sampled_from([0, 63, 64, 127])), max_size=6),
)
def test_sustain_equals_the_rule_applied_event_by_event(rows, moves):
    # The order of two simultaneous notes of one pitch is undefined, in note-seq too.
    rows = list(
        {(onset, pitch): (onset, onset + length, pitch, velocity) for onset, length, pitch, velocity in rows}.values()
    )
    played, pedal = np.array(rows, float).reshape(-1, 4), np.array(moves, float).reshape(-1, 2)
    instrument = Instrument(
        onset_s=played[:, 0],
        offset_s=played[:, 1],
        pitch=played[:, 2].astype(np.int32),
        velocity=played[:, 3].astype(np.int32),
        pedal_s=pedal[:, 0],
        pedal_down=pedal[:, 1] >= 64,
    )
    ours = merge([instrument])
    columns = (ours.onset_s, ours.pitch, ours.velocity, ours.offset_s)
    assert sorted(zip(*(column.tolist() for column in columns), strict=True)) == slow_sustain(rows, moves)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"MThd\x00\x00", "truncated"),
        (b"RIFF" + bytes(40), "not a MIDI file"),
        (midi(track()), "no notes"),
        (midi(track((0, on(40, channel=9)), (5, off(40, 9)))), "no notes"),
        (midi(), "no tracks"),
        (midi(track((0, on(60)), (100, off(60))))[:-3], "truncated"),
        (midi(track((0, on(60)), (100, off(60))), midi_format=2), "format 2"),
        (midi(track((0, on(60)), (100, off(60))), division=b"\x00\x00"), "0 ticks"),
        (midi(track((0, on(60)), (100, off(60))), division=b"\x99\x04"), "SMPTE"),
        (midi(track((0, b"\x01\x02\x03"))), "cannot be parsed"),
        (midi(track((0, on(60)), (2**28 - 1, off(60)))), "no notes"),
        (midi(track((2**28 - 1, on(60)), (2**28, off(60)))), "delta times"),
    ],
    ids=lambda value: value if isinstance(value, str) else "bytes",
)
def test_errors_say_what_is_wrong_with_the_bytes(data, message):
    with pytest.raises(MidiError, match=message):
        read_midi(data)


def test_too_many_tracks_are_refused():
    with pytest.raises(MidiError, match="at most 4096 tracks"):
        read_midi(midi(*[track((0, on(60)), (100, off(60)))] * 4097))


def test_unreadable_paths_are_midi_errors(tmp_path):
    for path in (tmp_path / "missing.mid", tmp_path, "null\0character"):
        with pytest.raises(MidiError, match="cannot read"):
            read_midi(path)


def test_limits_on_bytes_notes_and_seconds():
    data = (DATA / PIECES[0]).read_bytes()
    performance = read_midi(data)
    exact = {"max_bytes": len(data), "max_notes": len(performance), "max_seconds": performance.duration_s}
    assert read_midi(data, **exact) == performance
    for name, limit in exact.items():
        with pytest.raises(MidiError, match=name):
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


@given(performances(), st.integers(0, 1000))
def test_written_files_read_back_within_a_tick(performance, late_us):
    performance = performance.shift(late_us / 1e6)
    file = io.BytesIO()
    write_midi(performance, file)
    again = read_midi(file.getvalue())
    assert len(again) == len(performance)
    # Onsets that round to the same tick may change order, so compare each column by itself.
    assert np.allclose(np.sort(again.onset_s), np.sort(performance.onset_s), rtol=0, atol=0.0003)
    assert np.allclose(np.sort(again.offset_s), np.sort(performance.offset_s), rtol=0, atol=0.0008)
    assert sorted(zip(again.pitch, again.velocity, strict=True)) == sorted(
        zip(performance.pitch, performance.velocity, strict=True)
    )


def test_thirty_overlapping_notes_of_one_pitch_survive_writing():
    onset_s = np.arange(30) / 100
    pile = Performance(onset_s=onset_s, offset_s=2 - onset_s, pitch=np.full(30, 60), velocity=np.arange(1, 31))
    file = io.BytesIO()
    write_midi(pile, file)
    assert notes(read_midi(file.getvalue())) == notes(pile)


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
    with pytest.raises(MidiError, match=message):
        Performance(**{name: np.array(given) for name, given in {**columns, column: value}.items()})


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
