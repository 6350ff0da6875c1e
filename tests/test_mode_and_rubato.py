"""What an augmented copy changes and what it keeps, and its augmentation label."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_maestro import random_performance

from data_pipeline.augmentation.mode_and_rubato import (
    LABEL_SIZE,
    ORIGINAL,
    PieceAugmentation,
    augmentation_label,
    augmented_copy,
    tonic,
)
from music_ar.midi.performance import Performance
from music_ar.tokens.codec import decode, encode, length_steps
from music_ar.tokens.vocabulary import END, START, VELOCITY, is_velocity

MAJOR, HARMONIC_MINOR = (0, 2, 4, 5, 7, 9, 11, 12), (0, 2, 3, 5, 7, 8, 11, 12)
MELODIC_MINOR, MAJOR_WITH_LOW_SIXTH_AND_SEVENTH = (0, 2, 3, 5, 7, 9, 11, 12), (0, 2, 4, 5, 7, 8, 10, 12)
NATURAL_MINOR = (0, 2, 3, 5, 7, 8, 10, 12)


def piece(performance):
    return np.array([START, *encode(performance), END], np.uint16)


def scale(steps, key=60, velocities=(64,)):
    """A scale, a note every 0.5 s and 0.4 s long; the tonic, first and last, is longer."""
    onset_s = 0.5 * np.arange(len(steps))
    return Performance(
        onset_s=onset_s,
        offset_s=onset_s + np.where(np.isin(steps, (0, 12)), 1.6, 0.4),
        pitch=key + np.array(steps, np.int32),
        velocity=np.broadcast_to(np.array(velocities, np.int32), len(steps)),
    )


def copy(performance, seed=0, **changes):
    return augmented_copy(piece(performance), PieceAugmentation(**changes), np.random.default_rng(seed))


def on_the_grid(seed, notes):
    """Random notes at whole steps; of two notes of one pitch the first ends first, as in decoded tokens."""
    return decode(encode(random_performance(seed, notes)))


random_pieces = st.builds(on_the_grid, st.integers(0, 2**16), st.integers(0, 60))


@given(random_pieces)
def test_without_augmentation_nothing_changes(performance):
    tokens = piece(performance)
    unchanged = augmented_copy(tokens, ORIGINAL, np.random.default_rng(0))
    np.testing.assert_array_equal(unchanged, tokens)
    assert unchanged.dtype == np.uint16


@given(random_pieces, st.integers(0, 2**16))
def test_a_copy_is_a_piece_with_as_many_notes(performance, seed):
    rng = np.random.default_rng(seed)
    tokens = augmented_copy(piece(performance), PieceAugmentation.draw(rng), rng)
    assert (tokens[0], tokens[-1]) == (START, END)
    assert len(decode(tokens)) == len(performance)
    velocities = tokens[is_velocity(tokens)]
    assert (np.diff(velocities.astype(int)) != 0).all()  # written only where it changes


@pytest.mark.parametrize(
    ("changes", "of_major", "of_minor"),
    [
        ({"swap_thirds": True}, MELODIC_MINOR, (0, 2, 4, 5, 7, 8, 11, 12)),
        ({"swap_sixths": True}, MAJOR_WITH_LOW_SIXTH_AND_SEVENTH, (0, 2, 3, 5, 7, 9, 10, 12)),
        ({"swap_thirds": True, "swap_sixths": True}, NATURAL_MINOR, (0, 2, 4, 5, 7, 9, 10, 12)),
    ],
)
@pytest.mark.parametrize("key", [55, 60, 66])
def test_another_mode_by_hand(changes, of_major, of_minor, key):
    for steps, expected in ((MAJOR, of_major), (HARMONIC_MINOR, of_minor)):
        before = scale(steps, key)
        after = decode(copy(before, **changes))
        np.testing.assert_array_equal(after.pitch, key + np.array(expected))
        np.testing.assert_array_equal(after.onset_s, before.onset_s)
        np.testing.assert_array_equal(after.offset_s, before.offset_s)


@pytest.mark.parametrize("key", range(12))
def test_the_tonic_is_found(key):
    assert tonic(scale(MAJOR, 60 + key)) == key
    assert tonic(scale(HARMONIC_MINOR, 60 + key)) == key


def test_no_note_leaves_the_piano():
    """C8 is the minor seventh of D; raised, it would leave the piano."""
    performance = scale((0, 4, 7, 10, 12), 62)
    highest = Performance(
        onset_s=np.append(performance.onset_s, 9.0),
        offset_s=np.append(performance.offset_s, 9.1),
        pitch=np.append(performance.pitch, np.int32(108)),
        velocity=np.append(performance.velocity, np.int32(64)),
    )
    assert tonic(highest) == 2
    np.testing.assert_array_equal(decode(copy(highest, swap_sixths=True)).pitch, [62, 66, 69, 73, 74, 108])


@pytest.mark.parametrize(
    ("factor", "expected"), [(1.0, (8, 12, 16, 20, 24)), (0.5, (12, 14, 16, 18, 20)), (3.0, (0, 4, 16, 28, 31))]
)
def test_contrast_by_hand(factor, expected):
    """Bins 8 to 24 have a mean of 16; the softest bin is 0 and the loudest 31."""
    crescendo = scale((0, 4, 7, 4, 12), velocities=[33, 49, 65, 81, 97])
    tokens = copy(crescendo, log_contrast=np.log(factor))
    np.testing.assert_array_equal(tokens[is_velocity(tokens)] - VELOCITY, expected)


def test_velocities_that_become_equal_are_written_once():
    tokens = copy(scale((0, 4, 7), velocities=[61, 65, 61]), log_contrast=np.log(0.1))
    assert is_velocity(tokens).sum() == 1


def test_rubato_moves_the_beat_and_keeps_the_order():
    performance = scale(MAJOR * 40)
    even, rubato = decode(piece(performance)), decode(copy(performance, rubato=0.1))
    np.testing.assert_array_equal(rubato.pitch, even.pitch)
    ratios = np.diff(rubato.onset_s) / np.diff(even.onset_s)
    assert 0.07 < np.log(ratios).std() < 0.13
    assert np.corrcoef(ratios[:-2], ratios[2:])[0, 1] > 0.5  # a tempo is close to that of a second ago
    other = copy(performance, seed=1, rubato=0.1)
    assert not np.array_equal(other, copy(performance, rubato=0.1))
    assert abs(length_steps(other) / length_steps(piece(performance)) - 1) < 0.2
    np.testing.assert_array_equal(encode(decode(other)), other[1:-1])  # canonical


def test_draws_are_always_of_another_mode_and_reach_all_three():
    rng = np.random.default_rng(0)
    drawn = [PieceAugmentation.draw(rng) for _ in range(300)]
    modes = [(augmentation.swap_thirds, augmentation.swap_sixths) for augmentation in drawn]
    assert {mode: round(modes.count(mode), -2) for mode in set(modes)} == {
        (True, False): 100,
        (False, True): 100,
        (True, True): 100,
    }
    numbers = np.array([augmentation.label() for augmentation in drawn])
    assert (numbers.min(axis=0) >= [0, 0, -1, 0]).all()
    assert (numbers.max(axis=0) <= 1).all()
    assert numbers[:, 2].min() < -0.9
    assert numbers[:, 2:].max(axis=0).min() > 0.9


def test_the_label_of_a_recorded_performance_is_zero_and_all_others_differ():
    assert not augmentation_label(0, 1.0, 0, ORIGINAL).any()
    others = [
        *(augmentation_label(semitones, 1.0, 0, ORIGINAL) for semitones in range(-12, 13) if semitones),
        augmentation_label(0, 1.1, 0, ORIGINAL),
        augmentation_label(0, 0.9, 0, ORIGINAL),
        augmentation_label(0, 1.0, 1, ORIGINAL),
        augmentation_label(0, 1.0, 0, PieceAugmentation(swap_thirds=True)),
        augmentation_label(0, 1.0, 0, PieceAugmentation(swap_sixths=True)),
        augmentation_label(0, 1.0, 0, PieceAugmentation(log_contrast=0.1)),
        augmentation_label(0, 1.0, 0, PieceAugmentation(rubato=0.1)),
    ]
    assert {other.shape for other in others} == {(LABEL_SIZE,)}
    assert len({other.tobytes() for other in others} | {bytes(4 * LABEL_SIZE)}) == len(others) + 1
