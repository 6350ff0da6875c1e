"""What is counted of a piece, and what the bias changes and leaves; `test_features` has the laws of the counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from event_tokens import off, on, shift, tokens_of, velocity

from music_ar.decoding import history_bias
from music_ar.decoding.history_bias import NoteHistory
from music_ar.tokens import vocabulary
from music_ar.tokens.vocabulary import NOTE_OFF, START, VELOCITY

V = vocabulary.VOCABULARY_SIZE
NOTE_ONS, VELOCITIES = slice(0, NOTE_OFF), slice(VELOCITY, VELOCITY + 32)
NO_NOTES = history_bias.init()
MANY_NOTES = NoteHistory(np.arange(128, dtype=np.int32) % 50, np.arange(32, dtype=np.int32))


def a_row(history):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], history)


def biased(logits, history, strength=1.0):
    logits = jnp.asarray(logits, jnp.float32)[None]
    return np.asarray(history_bias.biased(logits, a_row(history), jnp.float32(strength))[0], np.float64)


def shares(logits, tokens):
    """Probabilities within a token type."""
    weights = np.exp(logits[tokens])
    return weights / weights.sum()


def bell(distance, deviation):
    return np.exp(-0.5 * (distance / deviation) ** 2)


def test_notes_are_counted_by_hand():
    history = history_bias.scan(
        tokens_of(START, velocity(16), on(60), shift(6), on(72), off(60), velocity(4), on(60), shift(1))
    )
    assert {pitch: int(count) for pitch, count in enumerate(history.pitches) if count} == {60: 2, 72: 1}
    assert {bin_ + 1: int(count) for bin_, count in enumerate(history.velocities) if count} == {4: 1, 16: 2}


def test_notes_that_no_velocity_precedes_have_the_default():
    """As in a window from the middle of a piece."""
    history = history_bias.scan(tokens_of(on(60), on(62), velocity(3), on(64)))
    assert np.flatnonzero(history.velocities).tolist() == [2, vocabulary.DEFAULT_VELOCITY_BIN - 1]


def test_a_strength_of_zero_changes_nothing():
    logits = np.random.default_rng(0).normal(size=V)
    np.testing.assert_allclose(biased(logits, MANY_NOTES, 0.0), logits, atol=1e-5)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_notes_are_weighted_by_the_shares_of_their_pitch_class_and_register(strength):
    """After 96 notes of C4 and 12 of B4; the prior is 4 of each pitch class and 50 around E4."""
    counts = {60: 96, 71: 12}
    history = NO_NOTES._replace(pitches=sum(n * np.eye(128, dtype=np.int32)[pitch] for pitch, n in counts.items()))
    found = shares(biased(np.zeros(V), history, strength), NOTE_ONS)
    pitches = np.arange(128)
    weights = {}
    for pitch in (48, 60, 61, 71):
        of_class = 4 + {0: 96, 11: 12}.get(pitch % 12, 0)
        near = sum(count * bell(pitch - at, 4) / bell(pitches - at, 4).sum() for at, count in counts.items())
        usual = 50 * bell(pitch - 64, 14) / bell(pitches - 64, 14).sum()
        weights[pitch] = (of_class * (near + usual) ** 0.5) ** strength
    for pitch, weight in weights.items():
        np.testing.assert_allclose(found[pitch] / found[61], weight / weights[61], rtol=1e-3)


def test_before_the_first_note_the_priors_count():
    found = biased(np.zeros(V), NO_NOTES)
    pitches, velocities = shares(found, NOTE_ONS), shares(found, VELOCITIES)
    assert (pitches * np.arange(128)).sum() == pytest.approx(64, abs=0.1)
    np.testing.assert_allclose(pitches[60] / pitches[64], bell(4, 14) ** 0.5, rtol=1e-3)  # and no pitch class
    bins = np.arange(1, 33)
    mean = (velocities * bins).sum()
    assert mean == pytest.approx(16.5, abs=0.1)
    assert np.sqrt((velocities * (bins - mean) ** 2).sum()) == pytest.approx(4.8, abs=0.1)


def test_after_many_notes_their_velocities_and_similar_ones_count():
    loud = NO_NOTES._replace(velocities=1_000_000 * np.eye(32, dtype=np.int32)[20])
    velocities = shares(biased(np.zeros(V), loud), VELOCITIES)
    assert velocities.argmax() == 20
    np.testing.assert_allclose(velocities[19:22] / velocities[20], bell(np.array([1, 0, 1]), 3.0), rtol=2e-2)


def test_token_types_stay_as_likely_and_the_others_as_they_are():
    logits = np.random.default_rng(1).normal(size=V)
    found = biased(logits, MANY_NOTES, 0.7)
    for tokens in (NOTE_ONS, VELOCITIES):
        assert np.abs(found[tokens] - logits[tokens]).max() > 0.3
        np.testing.assert_allclose(np.exp(found[tokens]).sum(), np.exp(logits[tokens]).sum(), rtol=1e-4)
    rest = np.r_[NOTE_OFF:VELOCITY, vocabulary.EVENT_CLASSES : V]
    np.testing.assert_array_equal(found[rest], logits[rest].astype(np.float32))


def test_each_row_has_its_own_strength():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(2, V)), jnp.float32)
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), MANY_NOTES)
    found = history_bias.biased(logits, both, jnp.array([0.0, 0.5]))
    np.testing.assert_allclose(found[0], logits[0], atol=1e-5)
    np.testing.assert_allclose(found[1], biased(logits[1], MANY_NOTES, 0.5), atol=1e-5)
