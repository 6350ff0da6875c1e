"""Transposition, stretch and velocity shift of tokens beside the same done to notes, on pieces and on windows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.augmentation.transforms import (
    PIANO_HIGH,
    PIANO_LOW,
    Augmentation,
    shift_velocity,
    stretch,
    transpose,
)
from music_ar.midi.performance import Performance
from music_ar.tokens.codec import decode, encode
from music_ar.tokens.vocabulary import END, NOTE_OFF, NOTE_ON, PAD, START, TIME_SHIFT, VELOCITY, EventError

# Factors that put no time exactly between two steps, where seconds and steps may round differently.
FACTORS = st.integers(0, 99).map(lambda percent: 0.9 + 0.002 * percent + 0.000246913)


def on(pitch):
    return NOTE_ON + pitch


def off(pitch):
    return NOTE_OFF + pitch


def shift(steps):
    return TIME_SHIFT + steps - 1


def velocity(number):
    return VELOCITY + number - 1


@st.composite
def performances(draw, lowest=0, highest=127):
    """Notes on the 10 ms grid, as dense as real ones: chords, repeated notes, silences of more than a second."""
    count = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gaps = rng.choice([0, 0, 1, 1, 2, 3, 9, 40, 100, 101, 250], count)
    onset = np.cumsum(gaps)
    pitch = rng.integers(lowest, highest, min(count, 12), np.int32, endpoint=True)[
        rng.integers(0, min(count, 12), count)
    ]
    length = rng.choice([1, 1, 2, 3, 10, 50, 150], count)
    # No pitch sounds twice at a time: tokens cannot say which of two notes of a pitch ends first.
    for key in np.unique(pitch):
        same = np.flatnonzero(pitch == key)
        onset[same] = onset[same] + np.arange(len(same)) * 4
        length[same[:-1]] = np.minimum(length[same[:-1]], np.diff(onset[same]))
    return Performance(
        onset_s=onset / 100,
        offset_s=(onset + length) / 100,
        pitch=pitch,
        velocity=rng.choice(np.array([1, 40, 64, 127], np.int32), count),
    )


@st.composite
def windows(draw):
    tokens = encode(draw(performances()))
    start, stop = sorted((draw(st.integers(0, len(tokens))), draw(st.integers(0, len(tokens)))))
    return tokens[start:stop]


def with_pitch(performance, pitch):
    return Performance(
        onset_s=performance.onset_s, offset_s=performance.offset_s, pitch=pitch, velocity=performance.velocity
    )


def stretch_tokens(tokens, factor):
    return stretch(tokens, factor)[0]


def slowed(performance, factor):
    return Performance(
        onset_s=performance.onset_s * factor,
        offset_s=performance.offset_s * factor,
        pitch=performance.pitch,
        velocity=performance.velocity,
    )


# --- transposition ---------------------------------------------------------------------------------------------------


@given(performances(PIANO_LOW + 6, PIANO_HIGH - 6), st.integers(-6, 6))
def test_transposing_tokens_is_transposing_notes_and_back_is_the_identity(performance, semitones):
    tokens = encode(performance)
    moved = transpose(tokens, semitones)
    np.testing.assert_array_equal(moved, encode(with_pitch(performance, performance.pitch + np.int32(semitones))))
    np.testing.assert_array_equal(transpose(moved, -semitones), tokens)


@given(performances(PIANO_LOW, PIANO_HIGH), st.integers(-87, 87))
def test_transposition_is_clipped_to_the_piano(performance, semitones):
    moved_tokens = transpose(encode(performance), semitones)
    pitch = moved_tokens[moved_tokens < TIME_SHIFT] % 128
    assert pitch.min() >= PIANO_LOW
    assert pitch.max() <= PIANO_HIGH
    moved = int(pitch.min()) - int(performance.pitch.min())
    reaches_the_edge = pitch.min() == PIANO_LOW if semitones < 0 else pitch.max() == PIANO_HIGH
    assert moved == semitones or (reaches_the_edge and abs(moved) < abs(semitones))


def test_notes_off_the_piano_may_not_move_further_out():
    tokens = np.array([velocity(9), on(15), shift(5), off(15)])
    np.testing.assert_array_equal(transpose(tokens, -2), tokens)
    np.testing.assert_array_equal(transpose(tokens, 2), [velocity(9), on(17), shift(5), off(17)])


def test_transposition_changes_only_notes():
    tokens = np.array([PAD, START, velocity(3), on(60), shift(100), off(60), END, PAD], np.uint16)
    moved = transpose(tokens, 5)
    assert moved.dtype == np.uint16
    np.testing.assert_array_equal(moved, [PAD, START, velocity(3), on(65), shift(100), off(65), END, PAD])
    silence = np.array([PAD, shift(3)])
    np.testing.assert_array_equal(transpose(silence, 5), silence)


# --- stretch ---------------------------------------------------------------------------------------------------------


@given(performances(), FACTORS)
def test_stretching_tokens_is_stretching_notes(performance, factor):
    np.testing.assert_array_equal(stretch_tokens(encode(performance), factor), encode(slowed(performance, factor)))


@given(windows())
def test_factor_one_changes_no_window(tokens):
    stretched, source = stretch(tokens, 1.0)
    np.testing.assert_array_equal(stretched, tokens)
    is_event = (tokens < TIME_SHIFT) | (tokens >= VELOCITY)
    np.testing.assert_array_equal(source[is_event], np.flatnonzero(is_event))


@given(windows(), FACTORS)
def test_stretching_a_window_keeps_its_events_and_returns_their_sources(tokens, factor):
    stretched, source = stretch(tokens, factor)
    assert stretched.shape == source.shape
    is_shift = (stretched >= TIME_SHIFT) & (stretched < VELOCITY)
    np.testing.assert_array_equal(stretched[~is_shift], tokens[source[~is_shift]])
    events = np.flatnonzero((tokens < TIME_SHIFT) | (tokens >= VELOCITY))
    np.testing.assert_array_equal(np.sort(source[~is_shift]), events)
    # A time shift has the source of the next event; the last shifts lead to an event beyond the window.
    followed = is_shift[:-1]
    inside = np.flatnonzero(followed)[source[:-1][followed] < len(tokens) - 1]
    np.testing.assert_array_equal(source[inside], source[inside + 1])


@given(windows(), FACTORS)
def test_a_stretched_window_is_as_much_longer_as_it_should_be(tokens, factor):
    def steps(events):
        return sum(int(event) - TIME_SHIFT + 1 for event in events if TIME_SHIFT <= event < VELOCITY)

    lost = 100 if len(tokens) and tokens[-1] == shift(100) else 0  # a cut silence keeps only full shifts
    assert factor * steps(tokens) - 1 - lost <= steps(stretch_tokens(tokens, factor)) <= factor * steps(tokens) + 1


@pytest.mark.parametrize(
    ("factor", "tokens", "expected"),
    [
        # Steps 5 and 6 both become 3: the note-off moves before the note-on of that step.
        (
            0.5,
            [velocity(9), on(60), shift(5), on(62), shift(1), off(60), shift(4), off(62)],
            [velocity(9), on(60), shift(3), off(60), on(62), shift(2), off(62)],
        ),
        # Note-offs of one step come in the order of their onsets.
        (
            0.5,
            [velocity(9), on(60), on(62), shift(5), off(62), shift(1), off(60)],
            [velocity(9), on(60), on(62), shift(3), off(60), off(62)],
        ),
        # A note lasts at least one step.
        (0.5, [velocity(9), on(60), shift(1), off(60)], [velocity(9), on(60), shift(1), off(60)]),
        (0.5, [velocity(9), shift(3), on(60), shift(1), off(60)], [velocity(9), shift(2), on(60), shift(1), off(60)]),
        # Across the longest shift, in both directions.
        (2.0, [shift(60), on(60), shift(10), off(60)], [shift(100), shift(20), on(60), shift(20), off(60)]),
        (0.5, [shift(100), shift(20), on(60)], [shift(60), on(60)]),
        # The window ends in a silence, whose length is known unless the last shift is a full one.
        (0.9, [on(60), shift(100), shift(50)], [on(60), shift(100), shift(35)]),
        (0.9, [on(60), shift(100), shift(100)], [on(60), shift(100)]),
        # The note-offs of notes that began before the window have no onset.
        (
            0.5,
            [off(70), shift(1), off(71), on(60), shift(2), off(60)],
            [off(70), shift(1), off(71), on(60), shift(1), off(60)],
        ),
        # Of two notes of one pitch the older ends first, here the one from before the window.
        (0.1, [on(60), shift(1), off(60), shift(9), off(60)], [off(60), on(60), shift(1), off(60)]),
    ],
)
def test_stretch_by_hand(factor, tokens, expected):
    np.testing.assert_array_equal(stretch_tokens(np.array(tokens), factor), expected)


def test_stretch_leaves_the_ends_in_place():
    events = encode(
        Performance(
            onset_s=np.array([0.0, 1.0]),
            offset_s=np.array([1.2, 2.4]),
            pitch=np.array([60, 64], np.int32),
            velocity=np.array([64, 80], np.int32),
        )
    )
    tokens = np.concatenate([[PAD, PAD, START], events, [END, PAD]]).astype(np.uint16)
    stretched, source = stretch(tokens, 0.9)
    assert stretched.dtype == np.uint16
    np.testing.assert_array_equal(stretched, [PAD, PAD, START, *stretch_tokens(events, 0.9), END, PAD])
    np.testing.assert_array_equal(tokens[source[[0, 1, 2, -2, -1]]], [PAD, PAD, START, END, PAD])
    nothing = np.array([PAD, START, END])
    np.testing.assert_array_equal(stretch_tokens(nothing, 0.9), nothing)
    np.testing.assert_array_equal(stretch_tokens(nothing[:0], 0.9), nothing[:0])


def test_stretch_refuses_impossible_arguments():
    with pytest.raises(EventError, match="PAD, START or END between events"):
        stretch(np.array([on(60), END, START, on(60)]), 1.1)
    for factor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"factor above 0, got {factor}"):
            stretch(np.array([on(60)]), factor)


# --- velocity --------------------------------------------------------------------------------------------------------


def test_velocity_shift_by_hand():
    piece = np.array([START, velocity(30), on(60), shift(5), velocity(3), on(64), END], np.uint16)
    for bins, softest, loudest in ((1, 4, 31), (2, 5, 32), (3, 5, 32), (-1, 2, 29), (-2, 1, 28), (-9, 1, 28)):
        expected = piece.copy()
        expected[1], expected[4] = velocity(loudest), velocity(softest)
        np.testing.assert_array_equal(shift_velocity(piece, bins), expected)
        assert shift_velocity(piece, bins).dtype == np.uint16


@given(performances(), st.integers(-31, 31))
def test_shifted_velocities_are_a_canonical_encoding(performance, bins):
    tokens = encode(performance)
    changed = shift_velocity(tokens, bins)
    np.testing.assert_array_equal(encode(decode(changed)), changed)
    np.testing.assert_array_equal(changed[tokens < VELOCITY], tokens[tokens < VELOCITY])


# --- the draw --------------------------------------------------------------------------------------------------------


def test_draws_are_uniform_and_reach_both_ends():
    rng = np.random.default_rng(0)
    draws = [Augmentation().draw(rng) for _ in range(6000)]
    semitones, factors = np.array([draw[0] for draw in draws]), np.array([draw[1] for draw in draws])
    values, counts = np.unique(semitones, return_counts=True)
    np.testing.assert_array_equal(values, np.arange(-5, 7))
    assert counts.min() > 400
    assert counts.max() < 600
    counts, _ = np.histogram(factors, bins=10, range=(0.9, 1.1))
    assert {draw[2] for draw in draws} == {0}
    bins = [Augmentation(velocity_bins=2).draw(rng)[2] for _ in range(1000)]
    values, sizes = np.unique(bins, return_counts=True)
    np.testing.assert_array_equal(values, np.arange(-2, 3))
    assert sizes.min() > 130
    assert counts.sum() == 6000
    assert counts.min() > 500
    assert counts.max() < 700


@pytest.mark.parametrize(
    "fields",
    [
        {"min_semitones": 1},
        {"max_semitones": -1},
        {"max_semitones": 88},
        {"min_stretch": 1.05},
        {"max_stretch": 3.0},
        {"velocity_bins": -1},
        {"velocity_bins": 32},
    ],
)
def test_an_impossible_augmentation_is_refused(fields):
    with pytest.raises(ValueError, match=r"must be .* got"):
        Augmentation(**fields)
