"""Sequences with a gap: they hold every note once, and read back as the piece."""

import numpy as np
import pytest
from conftest import make_performance
from event_tokens import off, on, performances, rows_of, shift, tokens_of, velocity
from hypothesis import given, settings
from hypothesis import strategies as st

from music_ar.tokens import codec, grammar
from music_ar.tokens.gaps import Parts, before_part, shifts, split
from music_ar.tokens.vocabulary import END, END_OF_GAP, MIDDLE, SEPARATOR, START

# A key held through the gap, one that rings on after it, and one that is struck again there.
PIECE = tokens_of(
    START, velocity(9), on(60), shift(10), on(62), shift(10), off(62), velocity(5), on(64), shift(10), on(65),
    shift(30), off(60), velocity(7), on(67), shift(20), off(65), off(64), on(64), shift(5), off(64), off(67), END,
)  # fmt: skip


def test_a_sequence_by_hand():
    parts = split(PIECE, 20, 50)
    assert parts.before.tolist() == [START, velocity(9), on(60), shift(10), on(62), shift(10), off(62)]
    assert parts.after.tolist() == [
        shift(10), velocity(7), on(67), shift(20), on(64), shift(5), off(64), off(67)
    ]  # fmt: skip
    assert parts.middle.tolist() == [
        velocity(5), on(64), shift(10), on(65), shift(20), END_OF_GAP, shift(10), off(60), shift(20), off(65),
        off(64), END,
    ]  # fmt: skip
    assert parts.sequence().tolist() == [
        shift(30), END_OF_GAP, *parts.after, SEPARATOR, *parts.before, MIDDLE, *parts.middle
    ]  # fmt: skip


def test_without_what_comes_before():
    parts = split(PIECE, 20, 50, with_before=False)
    assert parts.before.tolist() == []
    assert off(60) not in parts.middle
    assert parts.middle[:2].tolist() == [velocity(5), on(64)]


def test_a_gap_at_the_beginning_of_a_piece_begins_with_start():
    parts = split(PIECE, 0, 20)
    assert parts.before.tolist() == [START]
    assert parts.middle[:3].tolist() == [velocity(9), on(60), shift(10)]


def test_a_note_that_is_not_released_leaves_the_end_open():
    assert split(PIECE[:12], 20, 25).middle.tolist()[-2:] == [shift(5), END_OF_GAP]
    assert split(PIECE, 20, 25).middle[-1] == END


def with_end(performance):
    return np.concatenate([[START], codec.encode(performance), [END]]).astype(np.int32)


@given(performances(), st.integers(0, 150), st.integers(1, 200))
@settings(max_examples=50)
def test_every_note_is_in_one_part_and_reads_back(performance, begin, steps):
    """The parts, decoded and put at their times, are the piece: no note is cut, lost or doubled."""
    piece = codec.decode(with_end(performance))
    parts = split(with_end(performance), begin, begin + steps)
    beginning = codec.decode(np.concatenate([parts.before, parts.middle]))
    end = codec.decode(parts.after)
    rows = rows_of(beginning) + [(a + begin + steps, b + begin + steps, *rest) for a, b, *rest in rows_of(end)]
    assert sorted(rows) == rows_of(piece)


@given(performances(), st.integers(0, 150), st.integers(1, 200))
@settings(max_examples=50)
def test_every_part_has_its_length(performance, begin, steps):
    parts = split(with_end(performance), begin, begin + steps)
    assert codec.length_steps(parts.before) == begin
    mark = int(np.argmax(parts.middle == END_OF_GAP))
    assert codec.length_steps(parts.middle[:mark]) == steps
    assert codec.length_steps(parts.sequence()[: int(np.argmax(parts.sequence() == END_OF_GAP))]) == steps


@settings(max_examples=30)
@given(st.integers(0, 30), st.integers(0, 1500), st.integers(1, 1000))
def test_the_middle_keeps_the_grammar(seed, begin, steps):
    parts = split(with_end(make_performance(seed, 100)), begin, begin + steps)
    state = grammar.scan(parts.prompt())
    for token in parts.middle:
        if token not in (END_OF_GAP, END):
            assert grammar.allowed_tokens(state)[token]
        state = grammar.step(state, token)
    assert not state.held.any()


@settings(max_examples=30)
@given(st.integers(0, 30), st.integers(100, 700))
def test_parts_are_shortened_at_their_far_ends(seed, size):
    parts = split(with_end(make_performance(seed, 100)), 800, 1000)
    fitted = parts.fitted(size)
    assert fitted is not None
    assert len(fitted.sequence()) == min(size, len(parts.sequence()))
    assert np.array_equal(fitted.middle, parts.middle)
    assert np.array_equal(fitted.after, parts.after[: len(fitted.after)])
    assert np.array_equal(fitted.before, parts.before[len(parts.before) - len(fitted.before) :])
    shorter = sorted([len(fitted.before), len(fitted.after)])
    assert shorter[1] - shorter[0] <= 1 or shorter[0] in (len(parts.before), len(parts.after))


def test_a_middle_without_room_does_not_fit():
    assert split(PIECE, 20, 50).fitted(12) is None


@pytest.mark.parametrize(("steps", "expected"), [(0, []), (7, [shift(7)]), (250, [shift(100), shift(100), shift(50)])])
def test_shifts(steps, expected):
    assert shifts(steps).tolist() == expected


def test_the_part_before_of_a_prompt():
    parts = split(PIECE, 20, 50)
    assert before_part(parts.prompt()).tolist() == parts.before.tolist()
    assert before_part(PIECE) is PIECE
    nothing = np.zeros(0, np.int32)
    assert before_part(Parts(nothing, nothing, nothing, 30).prompt()).tolist() == []
