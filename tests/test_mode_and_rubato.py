"""What a variation changes and what it leaves, and how a model is told."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_maestro import random_performance

from data_pipeline.augmentation.mode_and_rubato import AS_PLAYED, VIEW_SIZE, Variation, tonic, vary, view
from music_ar.midi.performance import Performance
from music_ar.tokens.codec import decode, encode, length_steps
from music_ar.tokens.vocabulary import END, START, VELOCITY, is_velocity

MAJOR, HARMONIC_MINOR = (0, 2, 4, 5, 7, 9, 11, 12), (0, 2, 3, 5, 7, 8, 11, 12)
MELODIC_MINOR, MAJOR_WITH_LOW_SIXTH_AND_SEVENTH = (0, 2, 3, 5, 7, 9, 11, 12), (0, 2, 4, 5, 7, 8, 10, 12)
NATURAL_MINOR = (0, 2, 3, 5, 7, 8, 10, 12)


def piece(performance):
    return np.array([START, *encode(performance), END], np.uint16)


def scale(steps, key=60, velocities=(64,)):
    """A note a step, each 0.4 s long; the tonic, first and last, the longest."""
    onset_s = 0.5 * np.arange(len(steps))
    return Performance(
        onset_s=onset_s,
        offset_s=onset_s + np.where(np.isin(steps, (0, 12)), 1.6, 0.4),
        pitch=key + np.array(steps, np.int32),
        velocity=np.broadcast_to(np.array(velocities, np.int32), len(steps)),
    )


def varied(performance, seed=0, **changes):
    return vary(piece(performance), Variation(**changes), np.random.default_rng(seed))


def on_the_grid(seed, notes):
    """Random notes at whole steps; of two of one pitch the first ends first, as whatever is decoded from tokens."""
    return decode(encode(random_performance(seed, notes)))


random_pieces = st.builds(on_the_grid, st.integers(0, 2**16), st.integers(0, 60))


@given(random_pieces)
def test_as_played_nothing_changes(performance):
    tokens = piece(performance)
    unchanged = vary(tokens, AS_PLAYED, np.random.default_rng(0))
    np.testing.assert_array_equal(unchanged, tokens)
    assert unchanged.dtype == np.uint16


@given(random_pieces, st.integers(0, 2**16))
def test_a_variation_is_a_piece_of_as_many_notes(performance, seed):
    rng = np.random.default_rng(seed)
    tokens = vary(piece(performance), Variation.draw(rng), rng)
    assert (tokens[0], tokens[-1]) == (START, END)
    changed = decode(tokens)
    assert len(changed) == len(performance)
    velocities = tokens[is_velocity(tokens)]
    assert (np.diff(velocities.astype(int)) != 0).all()  # told where it changes alone


@pytest.mark.parametrize(
    ("changes", "of_major", "of_minor"),
    [
        ({"thirds": True}, MELODIC_MINOR, (0, 2, 4, 5, 7, 8, 11, 12)),
        ({"sixths": True}, MAJOR_WITH_LOW_SIXTH_AND_SEVENTH, (0, 2, 3, 5, 7, 9, 10, 12)),
        ({"thirds": True, "sixths": True}, NATURAL_MINOR, (0, 2, 4, 5, 7, 9, 10, 12)),
    ],
)
@pytest.mark.parametrize("key", [55, 60, 66])
def test_another_mode_by_hand(changes, of_major, of_minor, key):
    for steps, expected in ((MAJOR, of_major), (HARMONIC_MINOR, of_minor)):
        before = scale(steps, key)
        after = decode(varied(before, **changes))
        np.testing.assert_array_equal(after.pitch, key + np.array(expected))
        np.testing.assert_array_equal(after.onset_s, before.onset_s)
        np.testing.assert_array_equal(after.offset_s, before.offset_s)


@pytest.mark.parametrize("key", range(12))
def test_the_tonic_is_found(key):
    assert tonic(scale(MAJOR, 60 + key)) == key
    assert tonic(scale(HARMONIC_MINOR, 60 + key)) == key


def test_no_note_leaves_the_piano():
    """C8 would be a minor seventh of D that is raised."""
    performance = scale((0, 4, 7, 10, 12), 62)
    highest = Performance(
        onset_s=np.append(performance.onset_s, 9.0),
        offset_s=np.append(performance.offset_s, 9.1),
        pitch=np.append(performance.pitch, np.int32(108)),
        velocity=np.append(performance.velocity, np.int32(64)),
    )
    assert tonic(highest) == 2
    np.testing.assert_array_equal(decode(varied(highest, sixths=True)).pitch, [62, 66, 69, 73, 74, 108])


@pytest.mark.parametrize(
    ("factor", "expected"), [(1.0, (8, 12, 16, 20, 24)), (0.5, (12, 14, 16, 18, 20)), (3.0, (0, 4, 16, 28, 31))]
)
def test_contrast_by_hand(factor, expected):
    """Bins 8 to 24 lie about a mean of 16; the softest and the loudest bin are 0 and 31."""
    louder = scale((0, 4, 7, 4, 12), velocities=[33, 49, 65, 81, 97])
    tokens = varied(louder, log_contrast=np.log(factor))
    np.testing.assert_array_equal(tokens[is_velocity(tokens)] - VELOCITY, expected)


def test_velocities_that_become_one_are_told_once():
    tokens = varied(scale((0, 4, 7), velocities=[61, 65, 61]), log_contrast=np.log(0.1))
    assert is_velocity(tokens).sum() == 1


def test_rubato_moves_the_beat_and_keeps_the_order():
    performance = scale(MAJOR * 40)
    even, wavering = decode(piece(performance)), decode(varied(performance, rubato=0.1))
    np.testing.assert_array_equal(wavering.pitch, even.pitch)
    ratios = np.diff(wavering.onset_s) / np.diff(even.onset_s)
    assert 0.07 < np.log(ratios).std() < 0.13
    assert np.corrcoef(ratios[:-2], ratios[2:])[0, 1] > 0.5  # a beat is much like the one a second before
    other = varied(performance, seed=1, rubato=0.1)
    assert not np.array_equal(other, varied(performance, rubato=0.1))
    assert abs(length_steps(other) / length_steps(piece(performance)) - 1) < 0.2
    np.testing.assert_array_equal(encode(decode(other)), other[1:-1])  # as encoding it would be written


def test_draws_are_of_another_mode_and_reach_all_three():
    rng = np.random.default_rng(0)
    drawn = [Variation.draw(rng) for _ in range(300)]
    modes = [(variation.thirds, variation.sixths) for variation in drawn]
    assert {mode: round(modes.count(mode), -2) for mode in set(modes)} == {
        (True, False): 100,
        (False, True): 100,
        (True, True): 100,
    }
    numbers = np.array([variation.numbers() for variation in drawn])
    assert (numbers.min(axis=0) >= [0, 0, -1, 0]).all()
    assert (numbers.max(axis=0) <= 1).all()
    assert numbers[:, 2].min() < -0.9
    assert numbers[:, 2:].max(axis=0).min() > 0.9


def test_what_was_played_is_told_by_zeros_and_all_else_differs():
    assert not view(0, 1.0, 0, AS_PLAYED).any()
    others = [
        *(view(semitones, 1.0, 0, AS_PLAYED) for semitones in range(-12, 13) if semitones),
        view(0, 1.1, 0, AS_PLAYED),
        view(0, 0.9, 0, AS_PLAYED),
        view(0, 1.0, 1, AS_PLAYED),
        view(0, 1.0, 0, Variation(thirds=True)),
        view(0, 1.0, 0, Variation(sixths=True)),
        view(0, 1.0, 0, Variation(log_contrast=0.1)),
        view(0, 1.0, 0, Variation(rubato=0.1)),
    ]
    assert {other.shape for other in others} == {(VIEW_SIZE,)}
    assert len({other.tobytes() for other in others} | {bytes(4 * VIEW_SIZE)}) == len(others) + 1
