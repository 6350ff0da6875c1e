"""What is counted of a piece, and what the pull towards it changes and leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_maestro import random_performance

from music_ar.decoding import history_bias
from music_ar.decoding.history_bias import Heard
from music_ar.tokens import codec, vocabulary
from music_ar.tokens.vocabulary import NOTE_OFF, START, TIME_SHIFT, VELOCITY

V = vocabulary.VOCABULARY_SIZE
ON, VELOCITIES = slice(0, NOTE_OFF), slice(VELOCITY, VELOCITY + 32)
NOTHING = history_bias.after(np.zeros(0, np.int32))
MUCH = Heard(np.arange(128, dtype=np.int32) % 50, np.arange(32, dtype=np.int32))


def a_row(counted):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], counted)


def steadied(logits, counted, strength=1.0):
    logits = jnp.asarray(logits, jnp.float32)[None]
    return np.asarray(history_bias.steadied(logits, a_row(counted), jnp.float32(strength))[0], np.float64)


def shares(logits, kind):
    chances = np.exp(logits[kind])
    return chances / chances.sum()


def test_notes_are_counted_by_hand():
    tokens = np.array([START, VELOCITY + 15, 60, TIME_SHIFT + 5, 72, NOTE_OFF + 60, VELOCITY + 3, 60, TIME_SHIFT])
    counted = history_bias.after(tokens)
    assert np.flatnonzero(counted.pitches).tolist() == [60, 72]
    assert counted.pitches[[60, 72]].tolist() == [2, 1]
    assert np.flatnonzero(counted.velocities).tolist() == [3, 15]
    assert counted.velocities[[3, 15]].tolist() == [1, 2]


@pytest.mark.parametrize("begins_with_velocity", [True, False])
def test_token_by_token_counts_the_same(begins_with_velocity):
    """Notes that no velocity precedes, as in a window from the middle of a piece, have the bin they are played with."""
    tokens = np.append(START, codec.encode(random_performance(0, 30)))
    if not begins_with_velocity:
        tokens = tokens[~(vocabulary.is_velocity(tokens) & (np.arange(len(tokens)) < 20))]
    counted, velocity = a_row(NOTHING), jnp.zeros(1, jnp.int32)
    for token in tokens:
        if vocabulary.is_velocity(token):
            velocity = jnp.array([token - VELOCITY + 1])
        counted = history_bias.advance(counted, jnp.array([token]), velocity)
    jax.tree.map(np.testing.assert_array_equal, counted, a_row(history_bias.after(tokens)))
    assert counted.velocities.sum() == 30


def test_a_strength_of_zero_changes_nothing():
    logits = np.random.default_rng(0).normal(size=V)
    np.testing.assert_allclose(steadied(logits, MUCH, 0.0), logits, atol=1e-5)


def bell(distance, deviation):
    return np.exp(-0.5 * (distance / deviation) ** 2)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_notes_are_weighed_by_the_shares_of_their_class_and_their_register(strength):
    """96 notes of C4 and 12 of B4 have been heard, and before them, as it were, 4 of each class and 50 about E4."""
    counted = NOTHING._replace(pitches=96 * np.eye(128, dtype=np.int32)[60] + 12 * np.eye(128, dtype=np.int32)[71])
    found = shares(steadied(np.zeros(V), counted, strength), ON)
    pitches = np.arange(128)
    weights = {}
    for pitch in (48, 60, 61, 71):
        of_class = 4 + {0: 96, 11: 12}.get(pitch % 12, 0)
        near = sum(count * bell(pitch - at, 4) / bell(pitches - at, 4).sum() for at, count in ((60, 96), (71, 12)))
        usual = 50 * bell(pitch - 64, 14) / bell(pitches - 64, 14).sum()
        weights[pitch] = (of_class * (near + usual) ** 0.5) ** strength
    for pitch, weight in weights.items():
        np.testing.assert_allclose(found[pitch] / found[61], weight / weights[61], rtol=1e-3)


def test_before_the_first_note_usual_registers_and_velocities_are_preferred():
    found = steadied(np.zeros(V), NOTHING)
    notes, velocities = shares(found, ON), shares(found, VELOCITIES)
    assert (notes * np.arange(128)).sum() == pytest.approx(64, abs=0.1)
    np.testing.assert_allclose(notes[60] / notes[64], bell(4, 14) ** 0.5, rtol=1e-3)  # and no class is
    bins = np.arange(1, 33)
    mean = (velocities * bins).sum()
    assert mean == pytest.approx(16.5, abs=0.1)
    assert np.sqrt((velocities * (bins - mean) ** 2).sum()) == pytest.approx(4.8, abs=0.1)


def test_after_many_notes_their_loudness_counts_and_that_of_like_ones():
    loud = NOTHING._replace(velocities=1_000_000 * np.eye(32, dtype=np.int32)[20])
    velocities = shares(steadied(np.zeros(V), loud), VELOCITIES)
    assert velocities.argmax() == 20
    np.testing.assert_allclose(velocities[19:22] / velocities[20], bell(np.array([1, 0, 1]), 3.0), rtol=2e-2)


def test_kinds_stay_as_likely_and_others_as_they_are():
    logits = np.random.default_rng(1).normal(size=V)
    found = steadied(logits, MUCH, 0.7)
    for kind in (ON, VELOCITIES):
        assert np.abs(found[kind] - logits[kind]).max() > 0.3
        np.testing.assert_allclose(np.exp(found[kind]).sum(), np.exp(logits[kind]).sum(), rtol=1e-4)
    rest = np.r_[NOTE_OFF:VELOCITY, vocabulary.EVENT_CLASSES : V]
    np.testing.assert_array_equal(found[rest], logits[rest].astype(np.float32))


def test_each_row_has_its_own_strength():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(2, V)), jnp.float32)
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), MUCH)
    found = history_bias.steadied(logits, both, jnp.array([0.0, 0.5]))
    np.testing.assert_allclose(found[0], logits[0], atol=1e-5)
    np.testing.assert_allclose(found[1], history_bias.steadied(logits[1:], a_row(MUCH), jnp.float32(0.5))[0], atol=1e-5)
