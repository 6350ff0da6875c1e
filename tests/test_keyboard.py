"""The keyboard after each token, and its features, by hand; `test_features` has the laws."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from conftest import make_performance
from event_tokens import SECOND, off, on, shift, token_sequences, tokens_of, velocity
from hypothesis import given
from hypothesis import strategies as st

from music_ar.features import keyboard
from music_ar.midi.io import read_midi
from music_ar.tokens import codec, grammar

PROMPT = sorted((Path(__file__).parents[1] / "app" / "web" / "prompts").glob("*.mid"))[0]


def channels_by_name(tokens):
    """Channels after each token, [T, 8, 128]."""
    return keyboard.channels(keyboard.scan_each(tokens)).reshape(len(tokens), 8, 128)


def test_states_by_hand():
    tokens = tokens_of(shift(5), velocity(9), on(60), SECOND, off(60), velocity(3), on(62))
    after = keyboard.scan_each(tokens)
    np.testing.assert_array_equal(after.time, [5, 5, 5, 105, 105, 105, 105])
    np.testing.assert_array_equal(after.velocity, [0, 9, 9, 9, 9, 3, 3])
    np.testing.assert_array_equal(after.keys[:, 60], [-1, -1, *[11 * 64 + 9] * 2, *[210 * 64] * 3])
    np.testing.assert_array_equal(after.keys[:, 62], [*[-1] * 6, 211 * 64 + 3])
    last = keyboard.scan(tokens)
    assert keyboard.last_event_steps(last)[[60, 61, 62]].tolist() == [105, 0, 105]
    assert keyboard.steps_since_event(keyboard.step(last, np.int32(shift(7))))[[60, 61, 62]].tolist() == [7, 112, 7]


def test_the_keys_that_are_down_are_those_that_the_grammar_holds():
    tokens = codec.encode(read_midi(PROMPT))[:400]
    keys = keyboard.scan_each(tokens).keys
    for end in range(len(tokens)):
        held = grammar.scan(tokens[: end + 1]).held
        np.testing.assert_array_equal((keys[end] >= 0) & (keys[end] // 64 % 2 == 1), held > 0)


def test_channels_by_hand():
    tokens = tokens_of(velocity(16), on(60), shift(32), on(62), off(60), shift(32))
    channels = channels_by_name(tokens)
    assert channels.size == len(tokens) * keyboard.CHANNELS
    np.testing.assert_array_equal(np.flatnonzero(channels[3, 0]), [60, 62])  # is it down
    np.testing.assert_array_equal(np.flatnonzero(channels[5, 0]), [62])
    np.testing.assert_allclose(channels[3, 1, 60], 0.5)  # velocity: half of the loudest
    np.testing.assert_allclose(
        channels[2, 2:6, 60], np.exp([-4, -1, -1 / 4, -1 / 16]), rtol=1e-6
    )  # since it was struck
    np.testing.assert_allclose(channels[5, 6:, 60], np.exp([-1, -1 / 8]), rtol=1e-6)  # since it was released
    assert not channels[5, :6, 60].any()
    assert not channels[5, 6:, 62].any()
    assert not channels[0].any()


@given(tokens=token_sequences(min_size=1, max_size=40), earlier=st.integers(0, 5000))
def test_channels_depend_on_differences_of_time_alone(tokens, earlier):
    """So a piece is read alike wherever it is in a recording."""
    waiting = np.full(earlier // 100, SECOND, np.int32)
    alone, later = channels_by_name(tokens), channels_by_name(np.concatenate([waiting, tokens]))
    np.testing.assert_allclose(alone, later[len(waiting) :], rtol=1e-6, atol=1e-6)


def test_jax_computes_the_same_channels():
    after = keyboard.scan_each(np.stack([codec.encode(make_performance(seed))[:600] for seed in range(3)]))
    found = jax.jit(keyboard.channels)(jax.tree.map(jnp.asarray, after))
    np.testing.assert_allclose(found, keyboard.channels(after), atol=1e-6)
