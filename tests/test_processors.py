"""Each logit processor by itself, on logits worked out by hand, and the chain."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from event_tokens import SECOND, off, on, shift, tokens_of, velocity

from music_ar.decoding import history_bias, processors
from music_ar.decoding.interface import option_arrays, shared_options
from music_ar.decoding.processors import (
    GapEnd,
    Grammar,
    HistoryBias,
    LogitProcessor,
    PitchRange,
    SilenceLimit,
    StuckNotes,
    TypeFilters,
)
from music_ar.decoding.sampling import SamplingError, SamplingOptions
from music_ar.decoding.state import Caches, DecodeState
from music_ar.features import gap, keyboard, notes
from music_ar.features.gap import Gap
from music_ar.tokens import grammar
from music_ar.tokens.vocabulary import (
    END,
    END_OF_GAP,
    INFILL_VOCABULARY_SIZE,
    MIDDLE,
    NOTE_OFF,
    NOTE_ON,
    SEPARATOR,
    START,
    TIME_SHIFT,
    VELOCITY,
    VOCABULARY_SIZE,
)

NO_FILTERS = SamplingOptions(top_p=1.0, steadiness=0.0)
START_ONLY = tokens_of(START)


def state_after(*pieces: np.ndarray, gaps: bool = False) -> DecodeState:
    """The state after each piece, one a row, as far as processors read it: not its caches."""
    empty = jnp.zeros((len(pieces), 1, 1))
    numbers = jnp.zeros(len(pieces), jnp.int32)
    of_piece = [
        (grammar.scan(piece).held, keyboard.scan(piece), notes.scan(piece, 4), history_bias.scan(piece))
        for piece in pieces
    ]
    held, keys, last_notes, history = jax.tree.map(lambda *rows: jnp.asarray(np.stack(rows)), *of_piece)
    return DecodeState(
        clock_B=numbers,
        birth_B=numbers,
        latents_B=numbers,
        recent_BxL=jnp.array([[piece[-1]] for piece in pieces]),
        held_Bx128=held,
        keyboard=keys,
        notes=last_notes,
        match=None,
        gap=jax.tree.map(lambda *rows: jnp.asarray(np.stack(rows)), *map(gap_after, pieces)) if gaps else None,
        history=history,
        caches=Caches(empty, empty, (empty,), (empty,)),
        prompt_end_B=numbers,
        limit_B=numbers,
        rng_B=jax.random.split(jax.random.key(0), len(pieces)),
        ended_B=jnp.zeros(len(pieces), bool),
        wishes_BxD=jnp.zeros((len(pieces), 1)),
    )


def gap_after(piece: np.ndarray) -> Gap:
    return gap.scan(piece, keyboard.times_and_velocities(piece)[0])


def random_logits(rows: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(rows, VOCABULARY_SIZE)), jnp.float32)


@functools.cache
def _compiled(processor: type[LogitProcessor]) -> Any:
    return jax.jit(processor())


def processed(processor, *pieces, logits=None, options=NO_FILTERS) -> np.ndarray:
    logits = random_logits(len(pieces)) if logits is None else logits
    return np.asarray(_compiled(processor)(logits, state_after(*pieces), shared_options(options)))


def assert_masks(found, logits, allowed) -> None:
    """The allowed logits are as they were, the others -inf."""
    np.testing.assert_array_equal(found, np.where(allowed, logits, -np.inf))


# History bias.


def test_the_history_bias_follows_what_each_row_has_had():
    in_c, in_d = (tokens_of(START, velocity(16), *[on(pitch), shift(1), off(pitch)] * 200) for pitch in (60, 62))
    found = processed(HistoryBias, in_c, in_d, logits=jnp.zeros((2, VOCABULARY_SIZE)), options=SamplingOptions())
    assert found[:, NOTE_ON:NOTE_OFF].argmax(axis=1).tolist() == [60, 62]
    expected = history_bias.biased(jnp.zeros((2, VOCABULARY_SIZE)), state_after(in_c, in_d).history, jnp.float32(0.25))
    np.testing.assert_array_equal(found, expected)


def test_without_steadiness_history_does_not_matter():
    found = processed(HistoryBias, tokens_of(START, velocity(16), *[on(60), shift(1), off(60)] * 200))
    np.testing.assert_allclose(found, random_logits(), atol=1e-5)


# Grammar.


def test_the_grammar_rules_out_all_but_playable_tokens():
    pieces = [START_ONLY, tokens_of(START, velocity(5), on(60), SECOND), tokens_of(START, velocity(5))]
    allowed = [grammar.playable_tokens(grammar.scan(piece)) for piece in pieces]
    assert [int(row.sum()) for row in allowed] == [132, 128 - 1 + 1 + 100 + 31, 128]
    assert_masks(processed(Grammar, *pieces), random_logits(3), allowed)


# Limit of silence.


def test_after_three_seconds_of_silence_no_shift_may_come():
    played = [START, SECOND, velocity(16), on(40), SECOND, off(40)]
    pieces = {
        "2.99 s": (tokens_of(*played, SECOND, SECOND, shift(99)), False),
        "3 s": (tokens_of(*played, *[SECOND] * 3), True),
        "a held note": (tokens_of(*played[:-1], *[SECOND] * 9), False),
        "at the beginning": (tokens_of(START, *[SECOND] * 3), True),
    }
    allowed = np.ones((4, VOCABULARY_SIZE), bool)
    for row, (_, silent) in zip(allowed, pieces.values(), strict=True):
        row[TIME_SHIFT:VELOCITY] = not silent
    found = processed(SilenceLimit, *(piece for piece, _ in pieces.values()))
    assert_masks(found, random_logits(4), allowed)


# The end of a gap.

GAP_PROMPT = [SECOND, SECOND, END_OF_GAP, SEPARATOR, START, velocity(16), on(40), SECOND, MIDDLE]


def gap_logits(rows: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(rows, INFILL_VOCABULARY_SIZE)), jnp.float32)


def in_gap(*middles: list[int]) -> np.ndarray:
    """Which tokens may follow each middle, by the grammar and the end of the gap."""
    pieces = [tokens_of(*GAP_PROMPT, *middle) for middle in middles]
    state = state_after(*pieces, gaps=True)
    options = shared_options(NO_FILTERS)
    logits = gap_logits(len(pieces))
    return np.asarray(GapEnd()(Grammar()(logits, state, options), state, options)) > -np.inf


def test_shifts_end_with_the_gap():
    allowed = in_gap([], [SECOND, shift(70), on(50)], [SECOND, shift(99), on(50)])
    assert allowed[0, TIME_SHIFT:VELOCITY].all()
    for row, left in ((1, 30), (2, 1)):
        assert np.flatnonzero(allowed[row, TIME_SHIFT:VELOCITY]).tolist() == list(range(left))
    assert not allowed[:, [END, END_OF_GAP, SEPARATOR, MIDDLE]].any()
    assert allowed[:, off(40)].tolist() == [True, False, False]


def test_waits_beyond_the_end_are_waits_up_to_it():
    """So time passes as likely as before."""
    state, options = (
        state_after(tokens_of(*GAP_PROMPT, SECOND, shift(70), on(50)), gaps=True),
        shared_options(NO_FILTERS),
    )
    logits = gap_logits(1)
    found = np.asarray(GapEnd()(logits, state, options))
    share = np.exp(np.asarray(logits[0, TIME_SHIFT + 29 : VELOCITY])).sum()
    np.testing.assert_allclose(np.exp(found[0, TIME_SHIFT + 29]), share, rtol=1e-5)
    np.testing.assert_array_equal(found[0, TIME_SHIFT : TIME_SHIFT + 29], logits[0, TIME_SHIFT : TIME_SHIFT + 29])


def test_at_its_end_a_gap_is_marked():
    allowed = in_gap([SECOND, SECOND], [SECOND, off(40), SECOND])
    assert [np.flatnonzero(row).tolist() for row in allowed] == [[END_OF_GAP]] * 2


def test_after_its_end_keys_are_released_and_the_piece_ends():
    rung = [SECOND, SECOND, END_OF_GAP]
    allowed = in_gap(rung, [*rung, SECOND], [*rung, shift(3)], [*rung, shift(3), off(40)], [off(40), *rung])
    assert [np.flatnonzero(row[:TIME_SHIFT]).tolist() for row in allowed] == [[off(40)]] * 3 + [[]] * 2
    assert allowed[:, TIME_SHIFT:VELOCITY].all(axis=1).tolist() == [True, True, False, False, False]
    assert not allowed[:, VELOCITY:END].any()
    assert allowed[:, END].tolist() == [False, False, False, True, True]


def test_without_a_gap_nothing_changes():
    state, logits = state_after(START_ONLY, gaps=True), gap_logits(1)
    np.testing.assert_array_equal(GapEnd()(logits, state, shared_options(NO_FILTERS)), logits)


def test_silence_counts_from_the_beginning_of_the_timeline():
    """Not from that of what comes after the gap, which is read before it."""
    prompt = [SECOND, END_OF_GAP, velocity(16), on(40), *[SECOND] * 9, SEPARATOR, START, SECOND, MIDDLE]
    state = state_after(tokens_of(*prompt, SECOND), tokens_of(*prompt, SECOND, SECOND), gaps=True)
    found = np.asarray(SilenceLimit()(gap_logits(2), state, shared_options(NO_FILTERS)))
    assert (found[:, TIME_SHIFT:VELOCITY] > -np.inf).all(axis=1).tolist() == [True, False]


# Stuck notes.


def test_after_eight_seconds_the_pedal_is_released():
    """Two keys are down since the beginning, a third nearly as long, and a fourth for almost two seconds: it stays."""
    prompt = [START, velocity(16), on(40), on(50), shift(1), on(60), *[SECOND] * 6, on(70), SECOND]
    before, after = tokens_of(*prompt, shift(98)), tokens_of(*prompt, shift(99))
    allowed = np.ones((4, VOCABULARY_SIZE), bool)
    due = [[off(60)], [off(40), off(50)]]  # those held too long come last
    for row, tokens in zip(allowed[1:3], due, strict=True):
        row[:] = np.isin(np.arange(VOCABULARY_SIZE), tokens)
    pieces = [before, after, np.append(after, off(60)), np.append(after, [off(60), off(50), off(40)])]
    assert_masks(processed(StuckNotes, *pieces), random_logits(4), allowed)


def test_a_key_struck_twice_is_released_twice():
    held = [START, velocity(16), on(40), on(40), shift(1), off(40), *[SECOND] * 8]
    allowed = np.isin(np.arange(VOCABULARY_SIZE), [off(40)])
    assert_masks(processed(StuckNotes, tokens_of(*held)), random_logits(), allowed[None])


def test_releases_that_the_grammar_forbids_wait():
    """Within a step no note-off follows a note-on."""
    held = [START, velocity(16), on(40), *[SECOND] * 8]
    forbidden = random_logits().at[:, NOTE_OFF:TIME_SHIFT].set(-jnp.inf)
    found = processed(StuckNotes, tokens_of(*held, on(50)), logits=forbidden)
    np.testing.assert_array_equal(found, forbidden)


# Filters.

# Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625, not in order.
PROBABILITIES = np.array([[0.125, 0.5, 0.0625, 0.25, 0.0625]])


def filtered(logits, **options) -> np.ndarray:
    off: dict[str, Any] = {"top_p": 1.0}
    return processed(TypeFilters, START_ONLY, logits=jnp.asarray(logits), options=SamplingOptions(**(off | options)))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [0, 1, 3]),
        ({"top_k": 4}, [0, 1, 2, 3, 4]),  # the fourth and the fifth are equally likely
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.4}, [1]),
        ({"top_p": 0.6}, [1, 3]),  # 0.5 before the second is less than 0.6
        ({"top_p": 0.76}, [0, 1, 3]),
        ({"min_p": 0.4}, [1, 3]),  # at least 0.4 * 0.5
        ({"min_p": 0.2}, [0, 1, 3]),
        ({"min_p": 1.0}, [1]),
        # Among the three likeliest the probabilities are 4/7, 2/7, 1/7, so 6/7 come before the third.
        ({"top_k": 3, "top_p": 0.8}, [1, 3]),
        ({"top_k": 3, "top_p": 0.9}, [0, 1, 3]),
        ({"top_p": 0.9, "min_p": 0.4}, [1, 3]),
        # At temperature 0.5 the probabilities are as 64, 16, 4, 1, 1: the first has 64/86 = 0.74.
        ({"temperature": 0.5, "top_p": 0.7}, [1]),
        ({"temperature": 0.5, "top_p": 0.8}, [1, 3]),
        ({"temperature": 0.5, "min_p": 0.2}, [1, 3]),
    ],
)
def test_filters_by_hand(options, kept):
    assert np.flatnonzero(np.isfinite(filtered(np.log(PROBABILITIES), **options)[0])).tolist() == kept


def test_kept_logits_are_divided_by_the_temperature():
    np.testing.assert_allclose(filtered([[1.0, 2.0, 3.0]], temperature=2.0, top_k=2), [[-np.inf, 1.0, 1.5]])


def test_without_filters_the_unlikeliest_are_kept():
    """Even those that are lost in a sum of float32 numbers."""
    logits = np.where(np.arange(VOCABULARY_SIZE) % 100 == 0, 0.0, -30.0).astype(np.float32)[None]
    np.testing.assert_array_equal(filtered(logits), logits)


def test_each_token_type_is_filtered_by_itself():
    probabilities = np.full((1, VOCABULARY_SIZE), 1e-9)
    probabilities[0, [60, 61, 62]] = 0.6, 0.2, 0.1  # note-ons: 0.6 is less than 0.85 of 0.9, 0.8 is not
    shifts = [shift(1), shift(2), shift(3)]
    probabilities[0, shifts] = 0.06, 0.03, 0.01  # all less likely than these: 0.06 is less than 0.085, 0.09 is not
    kept = np.isfinite(filtered(np.log(probabilities).astype(np.float32), top_p=0.85)[0])
    assert kept[[60, 61, 62]].tolist() == [True, True, False]
    assert kept[shifts].tolist() == [True, True, False]


def test_a_token_type_that_is_ruled_out_stays_so():
    logits = jnp.zeros((1, VOCABULARY_SIZE)).at[0, NOTE_OFF:TIME_SHIFT].set(-jnp.inf)
    kept = np.isfinite(filtered(logits, top_p=0.5)[0])
    assert not kept[NOTE_OFF:TIME_SHIFT].any()
    assert kept[:NOTE_OFF].all()  # equally likely ones stay together


def test_options_of_rows_apply_to_their_rows():
    logits = jnp.repeat(jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)), 3, axis=0)
    rows = [SamplingOptions(top_p=1.0, top_k=1), SamplingOptions(top_p=0.6), SamplingOptions(top_p=1.0, min_p=0.2)]
    found = TypeFilters()(logits, state_after(*[START_ONLY] * 3), option_arrays(rows))
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in found] == [[1], [1, 3], [0, 1, 3]]


# Pitch range.


def test_no_note_begins_outside_the_keyboard():
    """On 61 keys, 36 to 96; note-offs of a prompt's lower notes stay possible."""
    options = SamplingOptions(lowest_pitch=36, highest_pitch=96)
    allowed = np.ones((1, VOCABULARY_SIZE), bool)
    allowed[0, NOTE_ON:NOTE_OFF] = (np.arange(128) >= 36) & (np.arange(128) <= 96)
    assert_masks(processed(PitchRange, START_ONLY, options=options), random_logits(), allowed)


def test_a_keyboard_with_all_keys_held_leaves_what_else_may_follow():
    logits = jnp.full((1, VOCABULARY_SIZE), -jnp.inf).at[0, on(20)].set(1.0)
    found = processed(PitchRange, START_ONLY, logits=logits, options=SamplingOptions(lowest_pitch=36))
    np.testing.assert_array_equal(found, logits)


def test_the_whole_keyboard_changes_nothing():
    np.testing.assert_array_equal(processed(PitchRange, START_ONLY), random_logits())


@pytest.mark.parametrize("option", [{"lowest_pitch": -1}, {"lowest_pitch": 55}, {"highest_pitch": 71}])
def test_impossible_ranges_are_refused(option):
    with pytest.raises(SamplingError, match="must be a"):
        SamplingOptions(**option)


# The chain.

STRIKING = tokens_of(START, velocity(5))  # nothing but a note-on may follow
DRAWS = 8000


@jax.jit
def _draws(logits, state, options):
    logits, state = jax.tree.map(lambda leaf: jnp.repeat(leaf, DRAWS, axis=0), (logits, state))
    return processors.draw(jax.random.split(jax.random.key(1), DRAWS), logits, state, options)


def drawn(logits, options: SamplingOptions, piece=STRIKING) -> np.ndarray:
    """Draws from one row of logits, each with its own key."""
    return np.asarray(_draws(logits, state_after(piece), shared_options(options)))


def test_filters_apply_to_what_the_masks_leave():
    """The likeliest note-on is of a held pitch, so the next one is drawn."""
    piece = tokens_of(START, velocity(5), on(60))
    logits = (
        jnp.full((1, VOCABULARY_SIZE), -30.0).at[0, jnp.array([on(60), on(61), on(62)])].set(jnp.array([9.0, 8, 7]))
    )
    assert set(drawn(logits, SamplingOptions(top_k=1, steadiness=0.0), piece).tolist()) == {on(61)}


def test_stuck_notes_wait_for_the_grammar():
    stuck = [START, velocity(16), on(40), *[SECOND] * 8]
    logits = jnp.zeros((1, VOCABULARY_SIZE)).at[0, off(40)].set(9.0)
    assert set(drawn(logits, NO_FILTERS, tokens_of(*stuck)).tolist()) == {off(40)}
    after_a_note = drawn(logits, NO_FILTERS, tokens_of(*stuck, on(50)))
    assert not ((after_a_note >= NOTE_OFF) & (after_a_note < TIME_SHIFT)).any()
    assert len(set(after_a_note.tolist())) > 100  # anything else


def test_filters_apply_to_biased_logits():
    piece = tokens_of(START, velocity(16), *[on(60), shift(1), off(60)] * 200, velocity(20))
    logits = jnp.zeros((1, VOCABULARY_SIZE)).at[0, on(61)].set(0.1)
    for steadiness, likeliest in ((0.0, on(61)), (1.0, on(60))):
        options = SamplingOptions(top_k=1, steadiness=steadiness)
        assert set(drawn(logits, options, piece).tolist()) == {likeliest}


def test_draws_follow_the_probabilities():
    logits = jnp.full((1, VOCABULARY_SIZE), -30.0).at[0, 60:65].set(jnp.log(jnp.asarray(PROBABILITIES[0])))
    found = drawn(logits, NO_FILTERS)
    shares = np.bincount(found - 60, minlength=5) / DRAWS
    np.testing.assert_allclose(shares, PROBABILITIES[0], atol=0.025)  # more than four standard deviations


def test_what_is_ruled_out_is_never_drawn():
    logits = (
        jnp.full((1, VOCABULARY_SIZE), -jnp.inf)
        .at[0, jnp.array([on(1), on(3), off(7)])]
        .set(jnp.array([0.0, -1.0, 50.0]))
    )
    found = drawn(logits, SamplingOptions(top_p=1.0, temperature=2.0, steadiness=0.0))
    assert set(found.tolist()) == {on(1), on(3)}


def test_at_temperature_zero_the_likeliest_is_drawn():
    expected = int(random_logits()[0, NOTE_ON:NOTE_OFF].argmax())
    found = drawn(random_logits(), SamplingOptions(temperature=0.0, steadiness=0.0))
    assert set(found.tolist()) == {expected}


def test_options_become_arrays_by_name():
    rows = [SamplingOptions(temperature=0.5, top_k=3), SamplingOptions(steadiness=1.0)]
    arrays = option_arrays(rows)
    for field in dataclasses.fields(SamplingOptions):
        np.testing.assert_allclose(arrays[field.name], [getattr(row, field.name) for row in rows])
        assert jnp.issubdtype(arrays[field.name].dtype, jnp.integer) == (field.type is int)
        assert shared_options(rows[0])[field.name].shape == ()
    assert len(arrays) == len(dataclasses.fields(SamplingOptions))


def test_other_options_compile_nothing_anew(compilations):
    changes: list[dict[str, Any]] = [
        {"temperature": 0.3},
        {"top_k": 5, "top_p": 0.5},
        {"min_p": 0.1, "temperature": 0.0},
    ]
    drawn(random_logits(), SamplingOptions())
    with compilations() as compiled:
        found = [drawn(random_logits(), SamplingOptions(**options)) for options in changes]
    assert compiled == []
    assert len({row.tobytes() for row in found}) == len(changes)
