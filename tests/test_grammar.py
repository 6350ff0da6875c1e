"""What the grammar allows is what `encode` can write; `test_features` has the laws of its state."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from event_tokens import SECOND, off, on, performances, shift, tokens_of, velocity
from hypothesis import given, settings
from hypothesis import strategies as st

from music_ar.tokens import grammar
from music_ar.tokens.codec import decode_report, encode
from music_ar.tokens.grammar import GrammarState, allowed_tokens, playable_tokens
from music_ar.tokens.vocabulary import (
    END,
    EVENT_CLASSES,
    NOTE_OFF,
    NOTE_ON,
    PAD,
    START,
    TIME_SHIFT,
    VELOCITY,
    VOCABULARY_SIZE,
)

GOLDENS = np.load(Path(__file__).parent / "data" / "goldens.npz")


def assert_allowed(tokens: np.ndarray) -> None:
    state, states = grammar.init(), []
    for token in tokens:
        states.append(state)
        state = grammar.step(state, token)
    before = GrammarState(*(np.stack(column) for column in zip(*states, strict=True)))
    refused = np.flatnonzero(~allowed_tokens(before)[np.arange(len(tokens)), tokens])
    assert not len(refused), f"the grammar refuses {tokens[refused[0]]} at {refused[0]} of {tokens.tolist()}"


@given(performances().filter(len))
def test_every_encoding_is_allowed(performance):
    assert_allowed(np.concatenate([[START], encode(performance), [END, PAD, PAD]]))


def test_a_real_piece_is_allowed():
    assert_allowed(np.concatenate([[START], GOLDENS["bach_885.midi/tokens"].astype(np.int32), [END]]))


@given(st.integers(0, 2**32), st.integers(0, 100), st.integers(1, 20))
@settings(max_examples=30)
def test_what_is_allowed_needs_no_repair_and_can_be_ended(seed, length, pitches):
    # Few pitches, so that notes are struck again while they are held.
    wanted = np.array([token >= TIME_SHIFT or token % 128 < pitches for token in range(VOCABULARY_SIZE)])
    random = np.random.default_rng(seed)
    tokens, state = [], grammar.init()
    while len(tokens) < length and END not in tokens:
        tokens.append(int(random.choice(np.flatnonzero(allowed_tokens(state) & wanted))))
        state = grammar.step(state, np.int32(tokens[-1]))
    # From wherever it stopped it can be brought to an end: a pending velocity, a shift, the note-offs, `END`.
    while END not in tokens:
        allowed = allowed_tokens(state)
        held = [off(pitch) for pitch in range(128) if state.held[pitch]]
        ending = [END, *held, shift(1), velocity(1), on(60), START, SECOND]
        tokens.append(next(token for token in ending if allowed[token]))
        state = grammar.step(state, np.int32(tokens[-1]))
        assert len(tokens) < 3 * length + 200
    performance, report = decode_report(np.array(tokens))
    assert report == (0, 0, 0)
    assert len(performance) == sum(token < NOTE_OFF for token in tokens) > 0
    assert not allowed_tokens(state)[:PAD].any()
    # Within a step the order of onsets is lost, and with it only some of the velocity tokens.
    kept = [token for token in tokens if not VELOCITY <= token < EVENT_CLASSES and token < PAD]
    again = [token for token in encode(performance).tolist() if token < VELOCITY]
    assert sorted(again) == sorted(kept)


STARTED = [START, velocity(5), on(60)]


@pytest.mark.parametrize(
    ("tokens", "allowed"),
    [
        ([], {START}),
        ([PAD, PAD], {START}),
        ([START], {"shift", "velocity"}),
        ([START, velocity(5)], {"on"}),
        (STARTED, {"on", "shift", "velocity"}),
        ([*STARTED, shift(99)], {"on", "held off", "velocity"}),
        ([*STARTED, SECOND], {"on", "held off", "velocity", "shift"}),
        ([*STARTED, on(60), shift(3), off(60)], {"on", "held off", "velocity", "shift"}),
        ([*STARTED, shift(3), off(60)], {"on", "velocity", "shift", END}),
        ([*STARTED, shift(3), off(60), shift(2)], {"on", "velocity"}),
        ([*STARTED, shift(3), off(60), END], {PAD}),
        ([*STARTED, shift(3), off(60), END, PAD], {PAD}),
    ],
)
def test_each_rule(tokens, allowed):
    expected = np.zeros(VOCABULARY_SIZE, bool)
    expected[[token for token in allowed if isinstance(token, int)]] = True
    expected[NOTE_ON:NOTE_OFF] = "on" in allowed
    expected[off(60)] = "held off" in allowed
    expected[TIME_SHIFT:VELOCITY] = "shift" in allowed
    expected[VELOCITY:EVENT_CLASSES] = "velocity" in allowed
    if velocity(5) in tokens:
        expected[velocity(5)] = False  # it is in force
    assert np.array_equal(allowed_tokens(grammar.scan(np.array(tokens, np.int32))), expected)


def test_playable_is_what_is_allowed_except_held_pitches():
    held = grammar.scan(tokens_of(START, velocity(4), on(60), shift(10)))
    assert allowed_tokens(held)[on(60)]
    assert np.flatnonzero(allowed_tokens(held) & ~playable_tokens(held)).tolist() == [on(60)]
    released = grammar.step(held, np.int32(off(60)))
    assert np.array_equal(playable_tokens(released), allowed_tokens(released))


_masks = jax.jit(lambda state: (allowed_tokens(state), playable_tokens(state)))


@given(st.lists(st.integers(0, VOCABULARY_SIZE - 1), min_size=24, max_size=24))
def test_masks_of_compiled_batches_are_those_of_numpy(tokens):
    state, states = grammar.init((2, 3)), []
    for token in np.array(tokens, np.int32).reshape(4, 2, 3):
        state = grammar.step(state, token)
        states.append(state)
    each = GrammarState(*(np.stack(column) for column in zip(*states, strict=True)))
    allowed, playable = _masks(jax.tree.map(jnp.asarray, each))
    assert allowed.shape == (4, 2, 3, VOCABULARY_SIZE)
    np.testing.assert_array_equal(allowed, allowed_tokens(each))
    np.testing.assert_array_equal(playable, playable_tokens(each))
