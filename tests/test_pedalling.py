"""`write_midi(..., pedal=True)`: key releases and pedal that sound like the notes, and look like a pianist's."""

import io

import numpy as np
import pytest
from conftest import make_performance
from event_tokens import performance_of
from hypothesis import given
from hypothesis import strategies as st
from midi_playback import assert_sounds_alike, messages, played

from music_ar.midi import MidiError, Performance, read_midi, write_midi
from music_ar.midi.pedalling import unfold

TICK_S = 0.0005


def written(performance: Performance) -> bytes:
    buffer = io.BytesIO()
    write_midi(performance, buffer, pedal=True)
    return buffer.getvalue()


def pedal_of(data: bytes) -> list[tuple[float, int]]:
    """When the pedal moves, in seconds, and to which value."""
    return [
        (round(time_s, 4), message.value)
        for time_s, _, message in messages(data)
        if message.type == "control_change" and message.control == 64
    ]


def releases_of(data: bytes) -> list[tuple[float, int]]:
    """When keys are released, in seconds, and which."""
    return [(round(time_s, 4), message.note) for time_s, _, message in messages(data) if message.type == "note_off"]


@st.composite
def pedalled(draw) -> Performance:
    """Notes of a few pitches that end at a few moments, so that many end together or where they are struck again."""
    moments = draw(st.lists(st.integers(1, 1000), min_size=1, max_size=12, unique=True))
    onsets = st.integers(0, 900) | st.sampled_from(moments)
    notes = draw(
        st.lists(st.tuples(onsets, st.sampled_from(moments), st.integers(60, 66), st.integers(1, 127)), max_size=40)
    )
    rows = [(on / 100, end / 100, pitch, velocity) for on, end, pitch, velocity in notes if on < end]
    return performance_of(rows or [(0.0, 1.0, 60, 64)])


@given(pedalled())
def test_it_sounds_like_the_notes(performance):
    """As we read it, and as a player that knows nothing of us plays it."""
    data = written(performance)
    assert_sounds_alike(read_midi(data), performance, within_s=TICK_S)
    assert_sounds_alike(played(data), performance, within_s=TICK_S)


@given(pedalled(), st.floats(0, 0.009))
def test_times_off_the_grid_are_kept_to_half_a_tick(performance, by_s):
    assert_sounds_alike(read_midi(written(performance.shift(by_s))), performance.shift(by_s), within_s=TICK_S)


@given(pedalled())
def test_pedal_intervals_do_not_overlap_and_keys_are_released_within_their_notes(performance):
    onset, offset = (np.rint(times * 2000).astype(np.int64) for times in (performance.onset_s, performance.offset_s))
    key_up, down, up = unfold(onset, offset, performance.pitch, 2000.0)
    assert ((onset < key_up) & (key_up <= offset)).all()
    assert (down < up).all()
    assert (up[:-1] < down[1:]).all()


def test_notes_that_end_together_are_released_by_the_pedal():
    chord = [(0.0, 2.0, 48, 60), (0.5, 2.0, 60, 60), (1.0, 2.0, 64, 60)]
    data = written(performance_of([*chord, (2.0, 2.3, 65, 60)]))
    assert pedal_of(data) == [(0.04, 127), (2.0, 0)]
    assert releases_of(data) == [(0.2, 48), (0.7, 60), (1.2, 64), (2.3, 65)]


def test_single_short_notes_are_released_by_their_keys():
    scale = [(0.2 * number, 0.2 * number + 0.19, 60 + number, 60) for number in range(8)]
    data = written(performance_of(scale))
    assert pedal_of(data) == []
    assert [time_s for time_s, _ in releases_of(data)] == [round(end_s, 4) for _, end_s, _, _ in scale]


def test_a_note_that_is_struck_again_without_a_gap_is_under_the_pedal():
    """Its key is released before, so that it can be struck again."""
    data = written(performance_of([(0.0, 1.0, 60, 60), (1.0, 1.5, 60, 60), (0.2, 1.5, 64, 60)]))
    assert pedal_of(data) == [(0.04, 127), (1.5, 0)]
    assert releases_of(data) == [(0.2, 60), (0.4, 64), (1.2, 60)]


def test_the_pedal_does_not_cover_the_end_of_a_note():
    """The bass would be sustained beyond its end."""
    data = written(performance_of([(0.0, 1.0, 40, 60), (0.0, 2.0, 60, 60), (0.0, 2.0, 64, 60)]))
    assert pedal_of(data) == [(1.04, 127), (2.0, 0)]


def test_more_notes_of_a_pitch_than_channels_are_written_without_pedal():
    many = performance_of([(0.1 * number, 9.0, 60, 60) for number in range(20)])
    assert pedal_of(written(many)) == []
    assert len(written(many)) > 0


def test_without_notes_there_is_no_file():
    with pytest.raises(MidiError, match="without notes"):
        written(Performance.empty())


def pianist(seed: int) -> bytes:
    """A file of somebody who plays chords and runs with legato pedalling, off any grid."""
    import mido

    rng = np.random.default_rng(seed)
    events: list[tuple[int, int, mido.Message]] = []
    now = 0
    for _ in range(60):
        bar = int(rng.integers(300, 2500))
        pitches = rng.choice(np.arange(30, 90), rng.integers(1, 7), replace=False).tolist()
        for pitch in pitches:
            start = now + int(rng.integers(0, 30))
            for strike in range(int(rng.integers(1, 4))):
                begin = start + strike * bar // 4
                length = int(rng.integers(20, max(bar // 5, 21)))
                events.append((begin, 2, mido.Message("note_on", note=pitch, velocity=int(rng.integers(20, 110)))))
                events.append((begin + length, 0, mido.Message("note_off", note=pitch)))
        if rng.random() < 0.7:
            events.append((now + int(rng.integers(40, 200)), 1, mido.Message("control_change", control=64, value=100)))
            events.append((now + bar, 1, mido.Message("control_change", control=64, value=0)))
        now += bar
    track, last = mido.MidiTrack(), 0
    for tick, _, message in sorted(events, key=lambda event: event[:2]):
        track.append(message.copy(time=tick - last))
        last = tick
    file, buffer = mido.MidiFile(ticks_per_beat=500), io.BytesIO()
    file.tracks.append(track)
    file.save(file=buffer)
    return buffer.getvalue()


def down(data: bytes, frames: int) -> np.ndarray:
    """Whether the pedal is down in each millisecond."""
    is_down = np.zeros(frames, bool)
    for time_s, value in pedal_of(data):
        is_down[round(time_s * 1000) :] = value >= 64
    return is_down


@pytest.mark.parametrize("seed", range(4))
def test_the_pedal_of_a_pianist_is_found(seed):
    data = pianist(seed)
    read = read_midi(data)
    found, real = (down(each, round(read.duration_s * 1000)) for each in (written(read), data))
    f1 = 2 * (found & real).sum() / (found.sum() + real.sum())
    assert f1 > 0.85
    assert f1 > 2 * real.mean() / (1 + real.mean())  # better than a pedal that is always down


@pytest.mark.slow
def test_what_a_pianist_plays_sounds_the_same():
    """Thousands of notes off the grid, with every coincidence of onsets, ends and pedal that comes about."""
    for seed in range(60):
        for performance in (read_midi(pianist(seed)), make_performance(seed, notes=2000)):
            data = written(performance)
            assert_sounds_alike(read_midi(data), performance, within_s=2 * TICK_S)
            assert_sounds_alike(played(data), performance, within_s=2 * TICK_S)
