"""The laws of recurrences along the tokens: `scan` and `scan_each` give what `step` gives, in NumPy and in JAX.

The grammar and the note history of decoding are such recurrences, too. What the states mean is tested with each module.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_performance
from event_tokens import off, on, shift, token_sequences, tokens_of, velocity
from hypothesis import given
from hypothesis import strategies as st

from music_ar.decoding import history_bias
from music_ar.decoding.history_bias import NoteHistory
from music_ar.features import gap, keyboard, notes, retrieval
from music_ar.features.gap import Gap, Place
from music_ar.features.keyboard import Keyboard
from music_ar.features.notes import Notes, Onsets
from music_ar.features.retrieval import Match, Retrieved
from music_ar.tokens import codec, grammar, vocabulary
from music_ar.tokens.grammar import GrammarState

CAPACITIES = st.sampled_from([12, 24, 100])
ONSETS, LENGTH = 4, 90


class States(NamedTuple):
    """The state of every recurrence."""

    grammar: GrammarState
    keyboard: Keyboard
    notes: Notes
    match: Match
    gap: Gap
    history: NoteHistory


def init(capacity: int, batch_shape: tuple[int, ...] = ()) -> States:
    return States(
        grammar.init(batch_shape),
        keyboard.init(batch_shape),
        notes.init(batch_shape, capacity),
        retrieval.init(batch_shape, capacity),
        gap.init(batch_shape),
        history_bias.init(batch_shape),
    )


def step(states: States, token: Any) -> States:
    keys = keyboard.step(states.keyboard, token)
    last_notes = notes.step(states.notes, token, keys.time, keys.velocity)
    return States(
        grammar.step(states.grammar, token),
        keys,
        last_notes,
        retrieval.step(states.match, last_notes, token),
        gap.step(states.gap, token, keys.time),
        history_bias.step(states.history, token, keys.velocity),
    )


def scan(tokens: np.ndarray, capacity: int) -> States:
    return States(
        grammar.scan(tokens),
        keyboard.scan(tokens),
        notes.scan(tokens, capacity),
        retrieval.scan(tokens, capacity),
        gap.scan(tokens, keyboard.times_and_velocities(tokens)[0]),
        history_bias.scan(tokens),
    )


@jax.jit
def _fold(states: States, tokens: jax.Array) -> Any:
    """`step` folded over tokens: the last states, and after each token what the model reads."""

    def one_token(states: States, token: Any) -> tuple[States, Any]:
        states = step(states, token[None])
        found = retrieval.retrieved(states.notes, states.match)
        place = gap.place(states.gap, states.keyboard.time)
        read = states.keyboard, notes.latest(states.notes, ONSETS), found, place
        return states, jax.tree.map(lambda leaf: leaf[0], read)

    return jax.lax.scan(one_token, states, tokens)


def folded(states: States, tokens: np.ndarray) -> tuple[States, tuple[Keyboard, Onsets, Retrieved, Place]]:
    """`step` folded over tokens from a state; they are padded to one length, since `PAD` changes nothing."""
    padded = np.pad(tokens, (0, LENGTH - len(tokens)), constant_values=vocabulary.PAD)
    last, read = _fold(jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], states), jnp.asarray(padded))
    return (
        jax.tree.map(lambda leaf: np.asarray(leaf[0]), last),
        jax.tree.map(lambda leaf: np.asarray(leaf)[: len(tokens)], read),
    )


def assert_same(found: Any, expected: Any) -> None:
    """Equal leaves of equal types."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for here, there in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(here, there)
        assert here.dtype == there.dtype


@given(tokens=token_sequences(gaps=True), capacity=CAPACITIES)
def test_scan_is_step_folded_from_init(tokens, capacity):
    last, _ = folded(init(capacity), tokens)
    assert_same(last, scan(tokens, capacity))


@given(tokens=token_sequences(min_size=1, gaps=True), share=st.floats(0, 1), capacity=CAPACITIES)
def test_step_continues_from_scan_and_scan_each_is_what_is_read_after_each_step(tokens, share, capacity):
    begun = int(share * len(tokens))
    last, (keys, onsets, retrieved, place) = folded(scan(tokens[:begun], capacity), tokens[begun:])
    assert_same(last, scan(tokens, capacity))
    rest = slice(begun, None)
    assert_same(keys, Keyboard(*(leaf[rest] for leaf in keyboard.scan_each(tokens))))
    assert_same(onsets, Onsets(*(leaf[rest] for leaf in notes.scan_each(tokens, ONSETS))))
    assert_same(retrieved, Retrieved(*(leaf[rest] for leaf in retrieval.scan_each(tokens, capacity))))
    assert_same(place.left, gap.scan_each(tokens, keyboard.scan_each(tokens).time).left[rest])


@given(tokens=token_sequences(gaps=True))
def test_numpy_steps_are_those_of_jax(tokens):
    """Of the grammar and the keyboard; the others step in JAX alone."""
    held, keys = grammar.init(), keyboard.init()
    for token in tokens:
        held, keys = grammar.step(held, token), keyboard.step(keys, token)
    last, _ = folded(init(12), tokens)
    assert_same((held, keys), (last.grammar, last.keyboard))


_step = jax.jit(step)


@given(tokens=st.lists(st.integers(0, vocabulary.INFILL_VOCABULARY_SIZE - 1), min_size=24, max_size=24))
def test_rows_of_a_batch_are_alone(tokens):
    tokens_TxB = np.array(tokens, np.int32).reshape(4, 6)
    states = jax.tree.map(jnp.asarray, init(12, (6,)))
    for token_B in tokens_TxB:
        states = _step(states, jnp.asarray(token_B))
    alone = [scan(row, 12) for row in tokens_TxB.T]
    assert_same(jax.tree.map(np.asarray, states), jax.tree.map(lambda *rows: np.stack(rows), *alone))


def test_leading_axes_may_be_any():
    tokens_2x3xT = np.random.default_rng(0).integers(0, vocabulary.INFILL_VOCABULARY_SIZE, (2, 3, 40), np.int32)
    states = grammar.init((2, 3)), keyboard.init((2, 3))
    for place in range(40):
        token = tokens_2x3xT[..., place]
        states = grammar.step(states[0], token), keyboard.step(states[1], token)

    def each(tokens: np.ndarray) -> Any:
        return keyboard.scan_each(tokens), notes.scan_each(tokens, 3), retrieval.scan_each(tokens, 20)

    for index in np.ndindex(2, 3):
        alone = tokens_2x3xT[index]
        at_index = jax.tree.map(lambda leaf, index=index: leaf[index], (states, each(tokens_2x3xT)))
        assert_same(at_index, ((grammar.scan(alone), keyboard.scan(alone)), each(alone)))


# Real durations, and a theme that returns.
PIECES_3xT = np.stack([codec.encode(make_performance(seed))[:600] for seed in range(3)])
PIECES_3xT[:, 400:500] = PIECES_3xT[:, 100:200]
# One of them with a gap.
PIECES_3xT[0, [10, 150, 390, 470]] = [
    vocabulary.END_OF_GAP, vocabulary.SEPARATOR, vocabulary.MIDDLE, vocabulary.END_OF_GAP
]  # fmt: skip


@pytest.mark.parametrize(
    "scan_each",
    [
        keyboard.scan_each,
        lambda tokens: notes.scan_each(tokens, ONSETS),
        lambda tokens: retrieval.scan_each(tokens, 100),
        lambda tokens: retrieval.scan_each(tokens, 100, last=50),
        lambda tokens: gap.scan_each(tokens, keyboard.scan_each(tokens).time),
    ],
    ids=["keyboard", "notes", "retrieval", "end of retrieval", "gap"],
)
def test_jax_scans_as_numpy_does(scan_each):
    assert_same(jax.tree.map(np.asarray, jax.jit(scan_each)(jnp.asarray(PIECES_3xT))), scan_each(PIECES_3xT))


def test_the_last_of_what_is_retrieved():
    whole, end = (retrieval.scan_each(PIECES_3xT, 100, last) for last in (None, 50))
    assert (whole.level[:, 450:] >= 0).any()
    assert_same(end, jax.tree.map(lambda leaf: leaf[:, -50:], whole))


def test_the_integer_type_of_tokens_does_not_matter():
    """Shards hold them in 16 bits, which have no room for what is counted here."""
    tokens = PIECES_3xT[0]
    narrow = tokens.astype(np.uint16)
    assert_same(scan(narrow, 24), scan(tokens, 24))
    assert_same(keyboard.scan_each(narrow), keyboard.scan_each(tokens))
    assert_same(notes.scan_each(narrow, 2), notes.scan_each(tokens, 2))
    assert_same(retrieval.scan_each(narrow, 24), retrieval.scan_each(tokens, 24))


@pytest.mark.parametrize("token", [vocabulary.PAD, vocabulary.START, vocabulary.END])
def test_control_tokens_change_no_feature(token):
    before = tokens_of(velocity(3), on(60), on(62))
    for feature in States._fields:
        if feature != "grammar":
            after = scan(np.append(before, np.int32(token)), 12)
            assert_same(getattr(after, feature), getattr(scan(before, 12), feature))


def test_a_separator_begins_a_timeline():
    """What the model reads in it is what it reads without anything before it."""
    earlier = tokens_of(velocity(3), on(60), on(62), shift(30), off(62), vocabulary.SEPARATOR)
    later = codec.encode(make_performance(4, 20))
    keys, alone = (keyboard.scan_each(tokens) for tokens in (np.concatenate([earlier, later]), later))
    both = jax.tree.map(lambda leaf: leaf[len(earlier) :], keys)
    np.testing.assert_allclose(keyboard.channels(both), keyboard.channels(alone))
    onsets, onsets_alone = (notes.scan_each(tokens, 3) for tokens in (np.concatenate([earlier, later]), later))
    after = jax.tree.map(lambda leaf: leaf[len(earlier) :], onsets)
    found, expected = notes.categories(after, both.time), notes.categories(onsets_alone, alone.time)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.index, other.index)


GAP = tokens_of(
    shift(50), vocabulary.END_OF_GAP, velocity(3), on(60), shift(7), vocabulary.SEPARATOR, velocity(9), on(50),
    shift(20), vocabulary.MIDDLE, shift(48), on(70), shift(2), vocabulary.END_OF_GAP, shift(10), off(50),
    vocabulary.END,
)  # fmt: skip


def test_what_is_told_of_a_gap():
    """Nothing up to its middle, there the time left, and at last that it is over; classes of few steps are exact."""
    place = gap.scan_each(GAP, keyboard.scan_each(GAP).time)
    left = place.left.tolist()
    assert left[:9] == [-1] * 9
    assert left[9] == int(6 * np.log2(1 + 50 / 3) + 1e-3)
    assert left[10:13] == [4, 4, 0]
    assert left[13:] == [gap.CLASSES - 1] * 4
    assert len({*left[9:13], gap.CLASSES - 1}) == 4


def test_rotary_times_are_those_that_will_be_heard():
    """The part after the gap lies behind it: as long after the middle's beginning as it will sound."""
    time = gap.scan_each(GAP, keyboard.scan_each(GAP).time).time
    begin = time[9]
    assert (time[1:5] - begin).tolist() == [50, 50, 50, 57]
    assert (time[6:9] - begin).tolist() == [-20, -20, 0]
    assert time[12] - begin == 50


def test_nothing_has_happened_in_no_tokens():
    nothing = np.zeros(0, np.int32)
    assert_same(scan(nothing, 12), init(12))
