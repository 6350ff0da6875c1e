"""What the model is told of the keyboard: in one pass, token by token, and by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_performance
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference_model import keyboard_features

from music_ar.features import keyboard
from music_ar.midi.io import read_midi
from music_ar.tokens import codec, grammar, vocabulary

PROMPT = sorted((Path(__file__).parents[1] / "app" / "web" / "prompts").glob("*.mid"))[0]
TOKENS = hnp.arrays(np.int32, st.integers(1, 40), elements=st.integers(0, vocabulary.VOCABULARY_SIZE - 1))
ON, OFF, SHIFT, VELOCITY = vocabulary.NOTE_ON, vocabulary.NOTE_OFF, vocabulary.TIME_SHIFT - 1, vocabulary.VELOCITY - 1


def step_by_step(tokens, onsets):
    """The keyboard after each token by `advance`."""
    state, states = keyboard.untouched((), onsets), []
    for token in tokens:
        state = keyboard.advance(state, token)
        states.append(state)
    return keyboard.Keyboard(*(np.stack(leaves) for leaves in zip(*states, strict=True)))


@given(tokens=TOKENS, onsets=st.integers(0, 4))
def test_one_pass_equals_token_by_token(tokens, onsets):
    for whole, stepped in zip(keyboard.after_each(tokens, onsets), step_by_step(tokens, onsets), strict=True):
        np.testing.assert_array_equal(whole, stepped)


def test_the_type_of_tokens_does_not_matter():
    """Shards hold them in 16 bits, which have no room for what is counted here."""
    tokens = codec.encode(make_performance(2))
    for narrow, wide in zip(
        keyboard.after_each(tokens.astype(np.uint16), 2), keyboard.after_each(tokens, 2), strict=True
    ):
        np.testing.assert_array_equal(narrow, wide)


def test_jax_computes_the_same():
    tokens = np.stack([codec.encode(make_performance(seed))[:600] for seed in range(3)])
    expected = keyboard.after_each(tokens, 4)
    found = jax.jit(lambda tokens: keyboard.after_each(tokens, 4, jnp))(tokens)
    for here, there in zip(expected, found, strict=True):
        np.testing.assert_array_equal(here, there)
    features = jax.jit(lambda state: keyboard_features(state, jnp))(found)
    np.testing.assert_allclose(features, keyboard_features(expected), atol=1e-6)
    advanced = jax.jit(lambda state, token: keyboard.advance(state, token, jnp))(
        keyboard.untouched((3,), 4, jnp), jnp.asarray(tokens[:, 0])
    )
    for here, there in zip(advanced, expected, strict=True):
        np.testing.assert_array_equal(here, there[:, 0])


def test_the_keys_that_are_down_are_those_that_the_grammar_holds():
    tokens = codec.encode(read_midi(PROMPT))[:400]
    keys = keyboard.after_each(tokens, 0).keys
    for end in range(len(tokens)):
        held = grammar.grammar_after(tokens[: end + 1]).held
        np.testing.assert_array_equal((keys[end] >= 0) & (keys[end] // 64 % 2 == 1), held > 0)


def test_onsets_by_hand():
    tokens = np.array([SHIFT + 5, VELOCITY + 9, ON + 60, ON + 64, SHIFT + 100, OFF + 60, VELOCITY + 3, ON + 62])
    after = keyboard.after_each(tokens, 2)
    np.testing.assert_array_equal(after.step, [5, 5, 5, 5, 105, 105, 105, 105])
    np.testing.assert_array_equal(after.velocity, [0, 9, 9, 9, 9, 9, 3, 3])
    np.testing.assert_array_equal(after.onset_note[2], [60 * 64 + 9, -1])
    np.testing.assert_array_equal(after.onset_note[6], [64 * 64 + 9, 60 * 64 + 9])
    np.testing.assert_array_equal(after.onset_note[7], [62 * 64 + 3, 64 * 64 + 9])
    np.testing.assert_array_equal(after.onset_step[7], [105, 5])


def test_features_by_hand():
    tokens = np.array([VELOCITY + 16, ON + 60, SHIFT + 32, ON + 62, OFF + 60, SHIFT + 32])
    features = keyboard_features(keyboard.after_each(tokens, 2))
    channels = features[:, : 8 * 128].reshape(-1, 8, 128)
    np.testing.assert_array_equal(np.flatnonzero(channels[3, 0]), [60, 62])
    np.testing.assert_array_equal(np.flatnonzero(channels[5, 0]), [62])
    np.testing.assert_allclose(channels[3, 1, 60], 0.5)  # half of the loudest
    np.testing.assert_allclose(channels[2, 2:6, 60], np.exp([-4, -1, -1 / 4, -1 / 16]), rtol=1e-6)
    np.testing.assert_allclose(channels[5, 6:, 60], np.exp([-1, -1 / 8]), rtol=1e-6)
    since, pitches = features[:, 1024:1072], features[:, 1072 : 1072 + 256].reshape(-1, 2, 128)
    assert since[0].sum() == 0  # no note yet
    assert (np.argmax(since[1]), np.argmax(since[2])) == (0, 21)  # now; 32 steps ago
    np.testing.assert_array_equal(np.argmax(pitches[5], axis=-1), [62, 60])
    assert features.shape[-1] == keyboard.feature_count(2)


def test_where_the_ones_are():
    tokens = np.array([VELOCITY + 16, ON + 60, SHIFT + 32, ON + 62, OFF + 60, SHIFT + 32, ON + 64])
    after = keyboard.after_each(tokens, 2)
    classes, features = keyboard.classes(after), keyboard_features(after)[:, keyboard.CHANNELS :]
    for places, row in zip(keyboard.hot_places(classes), features, strict=True):
        np.testing.assert_array_equal(np.sort(places[places >= 0]), np.flatnonzero(row))
    assert (keyboard.hot_places(classes)[0] < 0).all()  # no note yet
    assert (
        keyboard.hot_places(classes)[-1] >= 0
    ).sum() == 6  # two notes, but of the older nobody knows what was before it


@given(tokens=TOKENS, earlier=st.integers(0, 5000))
def test_only_differences_of_time_are_told(tokens, earlier):
    """So that a piece is read alike wherever it stands in a recording."""
    waiting = np.full(earlier // 100, SHIFT + 100, np.int32)
    alone, later = (keyboard.after_each(row, 3) for row in (tokens, np.concatenate([waiting, tokens])))
    np.testing.assert_allclose(keyboard_features(alone), keyboard_features(later)[len(waiting) :], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("token", [vocabulary.PAD, vocabulary.START, vocabulary.END])
def test_what_is_no_event_changes_nothing(token):
    before = keyboard.advance(keyboard.untouched((), 2), np.int32(ON + 60))
    for here, there in zip(before, keyboard.advance(before, np.int32(token)), strict=True):
        np.testing.assert_array_equal(here, there)
