"""Tokens equal note-seq's, decoding mends anything, and one grammar rule serves arrays, batches and compiled code."""

from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from music_ar.midi.io import read_midi
from music_ar.midi.performance import Performance
from music_ar.tokens.codec import decode, decode_report, encode, event_steps
from music_ar.tokens.grammar import GrammarState, advance, allowed_events, grammar_after, grammar_start, playable_events
from music_ar.tokens.vocabulary import (
    DEFAULT_VELOCITY_BIN,
    END,
    EVENT_CLASSES,
    FINGERPRINT,
    NOTE_OFF,
    NOTE_ON,
    PAD,
    START,
    TIME_SHIFT,
    VELOCITY,
    VOCABULARY_SIZE,
    EventError,
)

DATA = Path(__file__).parent / "data"
GOLDENS = np.load(DATA / "goldens.npz")
PIECES = sorted({name.split("/")[0] for name in GOLDENS.files})

Row = tuple[int, int, int, int]  # onset step, offset step, pitch, velocity bin


def on(pitch: int) -> int:
    return NOTE_ON + pitch


def off(pitch: int) -> int:
    return NOTE_OFF + pitch


def shift(steps: int) -> int:
    return TIME_SHIFT + steps - 1


def velocity(bin_: int) -> int:
    return VELOCITY + bin_ - 1


def performance_of(rows: list[tuple[float, float, int, int]]) -> Performance:
    onset_s, offset_s, pitch, velocities = (list(column) for column in zip(*rows, strict=True)) if rows else ([],) * 4
    return Performance(
        onset_s=np.array(onset_s, np.float64),
        offset_s=np.array(offset_s, np.float64),
        pitch=np.array(pitch, np.int32),
        velocity=np.array(velocities, np.int32),
    )


def rows_of(performance: Performance) -> list[Row]:
    """The notes on the grid of the events; the performance must lie on it."""
    on_step, off_step = np.rint(performance.onset_s * 100), np.rint(performance.offset_s * 100)
    assert np.array_equal(performance.onset_s, on_step / 100)
    assert np.array_equal(performance.offset_s, off_step / 100)
    assert (performance.velocity % 4 == 1).all()
    columns = (on_step.astype(int), off_step.astype(int), performance.pitch, performance.velocity // 4 + 1)
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


@st.composite
def performances(draw: st.DrawFn) -> Performance:
    """Few pitches and short times, so that notes touch and overlap; some long silences; times off the grid too."""
    time_s = st.one_of(st.integers(0, 60).map(lambda step: step / 100), st.floats(0, 0.3), st.floats(0, 5))
    length_s = st.one_of(st.floats(0.0001, 0.3), st.integers(1, 400).map(lambda step: step / 100))
    note = st.tuples(time_s, length_s, st.sampled_from([0, 59, 60, 127]), st.integers(1, 127))
    return performance_of(
        [
            (onset, onset + length, pitch, velocity)
            for onset, length, pitch, velocity in draw(st.lists(note, max_size=25))
        ]
    )


def quantized(performance: Performance) -> list[Row]:
    """The notes on the grid, halves up, a step long at least; told apart by pitch only: first begun, first ended."""
    onsets, offsets = defaultdict(list), defaultdict(list)
    columns = (performance.onset_s, performance.offset_s, performance.pitch, performance.velocity)
    for onset_s, offset_s, pitch, velocity in zip(*(column.tolist() for column in columns), strict=True):
        step = int(onset_s * 100 + 0.5)
        onsets[pitch].append((step, (velocity - 1) // 4 + 1))
        offsets[pitch].append(max(int(offset_s * 100 + 0.5), step + 1))
    return sorted(
        (step, offset, pitch, bin_)
        for pitch in onsets
        for (step, bin_), offset in zip(onsets[pitch], sorted(offsets[pitch]), strict=True)
    )


tokens_strategy = st.one_of(
    st.lists(st.integers(0, VOCABULARY_SIZE - 1), max_size=60),
    st.lists(
        st.sampled_from(
            [on(60), on(60), on(61), off(60), off(61), shift(1), shift(100), velocity(1), velocity(9), PAD]
        ),
        max_size=60,
    ),
    st.lists(st.integers(-(2**31), 2**31), max_size=20),
).map(lambda tokens: np.array(tokens, np.int64))


def test_the_vocabulary_is_note_seqs_with_three_control_tokens_behind_it():
    assert (NOTE_ON, NOTE_OFF, TIME_SHIFT, VELOCITY, EVENT_CLASSES) == (0, 128, 256, 356, 388)
    assert (PAD, START, END, VOCABULARY_SIZE) == (388, 389, 390, 391)


def test_fingerprint():
    assert FINGERPRINT == "343f09a5a086dbda934ad744c83af7e9f0ebbb57bfe49534912b252764d8ce44", (
        "the vocabulary or the encoding rules have changed: every prepared data set and every trained checkpoint made"
        " before can no longer be used. If that is what you want, put the new fingerprint here"
    )


@pytest.mark.parametrize("name", PIECES)
def test_real_pieces_encode_as_note_seq_encodes_them(name):
    assert np.array_equal(encode(read_midi(DATA / name)), GOLDENS[f"{name}/tokens"])


@given(performances())
def test_any_performance_encodes_as_note_seq_encodes_it(performance):
    pytest.importorskip("note_seq")
    from note_seq import performance_encoder_decoder, performance_lib, sequences_lib  # pyright: ignore

    from music_ar.midi.interop import to_note_sequence

    sequence = sequences_lib.quantize_note_sequence_absolute(to_note_sequence(performance), 100)
    events = performance_lib.Performance(sequence, num_velocity_bins=32, max_shift_steps=100)
    one_hot = performance_encoder_decoder.PerformanceOneHotEncoding(num_velocity_bins=32, max_shift_steps=100)
    assert encode(performance).tolist() == [one_hot.encode_event(event) for event in events]


def test_encoding_by_hand():
    performance = performance_of(
        [(2.0, 2.5, 64, 127), (2.0, 5.004, 60, 1), (2.5, 2.5001, 60, 4), (2.5, 2.514999, 61, 5), (4.0, 5.006, 62, 5)]
    )
    assert encode(performance).tolist() == [
        *(shift(100), shift(100), velocity(1), on(60), velocity(32), on(64)),
        *(shift(50), off(64), velocity(1), on(60), velocity(2), on(61)),
        *(shift(1), off(60), off(61), shift(100), shift(49), on(62), shift(100), off(60), shift(1), off(62)),
    ]
    assert encode(performance_of([])).tolist() == []


def test_a_performance_too_long_for_its_clock_is_refused():
    with pytest.raises(EventError, match="before step"):
        encode(performance_of([(0.0, 3e7, 60, 64)]))


@given(performances())
def test_decoding_an_encoding_quantizes(performance):
    again, report = decode_report(encode(performance))
    assert rows_of(again) == quantized(performance)
    assert report == (0, 0, 0)
    assert decode(encode(again)) == again


def decoded_slowly(tokens: np.ndarray) -> tuple[list[Row], int, int]:
    """Event by event: notes on the grid, notes left dangling, stray note-offs."""
    step, bin_, stray, notes, held = 0, DEFAULT_VELOCITY_BIN, 0, [], defaultdict(list)
    for token in tokens.tolist():
        if NOTE_ON <= token < NOTE_OFF:
            held[token].append((step, bin_))
        elif NOTE_OFF <= token < TIME_SHIFT and held[token - NOTE_OFF]:
            start, begun_with = held[token - NOTE_OFF].pop(0)
            notes.append((start, max(step, start + 1), token - NOTE_OFF, begun_with))
        elif NOTE_OFF <= token < TIME_SHIFT:
            stray += 1
        elif TIME_SHIFT <= token < VELOCITY:
            step += token - TIME_SHIFT + 1
        elif VELOCITY <= token < EVENT_CLASSES:
            bin_ = token - VELOCITY + 1
    dangling = [(start, max(step, start + 1), pitch, with_) for pitch in held for start, with_ in held[pitch]]
    return sorted(notes + dangling), len(dangling), stray


@given(tokens_strategy)
def test_any_tokens_decode(tokens):
    performance, report = decode_report(tokens)
    rows, dangling, stray = decoded_slowly(tokens)
    unknown = sum(not 0 <= token < VOCABULARY_SIZE for token in tokens.tolist())
    assert rows_of(performance) == rows
    assert report == (dangling, stray, unknown)
    assert performance == decode(tokens)


@pytest.mark.parametrize("tokens", [np.zeros((2, 3), np.int32), np.array([1.5, 2.0]), np.array(["60"])])
def test_what_is_no_flat_integer_array_is_refused(tokens):
    with pytest.raises(EventError, match="flat array of integers"):
        decode(tokens)


def test_event_steps_are_the_sum_of_the_shifts_before():
    tokens = np.array([START, shift(7), velocity(3), on(60), shift(100), shift(1), off(60), END, PAD])
    assert event_steps(tokens).tolist() == [0, 0, 7, 7, 7, 107, 108, 108, 108]


def walked(tokens: np.ndarray) -> list[GrammarState]:
    """The states before each token and after the last one."""
    states = [grammar_start()]
    for token in tokens:
        states.append(advance(states[-1], token))
    return states


def assert_allowed(tokens: np.ndarray) -> None:
    states = GrammarState(*(np.stack(column) for column in zip(*walked(tokens)[:-1], strict=True)))
    refused = np.flatnonzero(~allowed_events(states)[np.arange(len(tokens)), tokens])
    assert not len(refused), f"the grammar refuses {tokens[refused[0]]} at {refused[0]} of {tokens.tolist()}"


@given(performances().filter(len))
def test_every_encoding_is_allowed(performance):
    assert_allowed(np.concatenate([[START], encode(performance), [END, PAD, PAD]]))


def test_a_real_piece_is_allowed():
    assert_allowed(np.concatenate([[START], GOLDENS["bach_885.midi/tokens"].astype(np.int32), [END]]))


@given(st.integers(0, 2**32), st.integers(0, 100), st.integers(1, 20))
@settings(max_examples=30)
def test_whatever_the_grammar_allows_is_music_and_can_end(seed, length, pitches):
    # Few pitches, so that notes are struck again while they are held.
    wanted = np.array([token >= TIME_SHIFT or token % 128 < pitches for token in range(VOCABULARY_SIZE)])
    random = np.random.default_rng(seed)
    tokens, state = [], grammar_start()
    while len(tokens) < length and END not in tokens:
        tokens.append(int(random.choice(np.flatnonzero(allowed_events(state) & wanted))))
        state = advance(state, tokens[-1])
    # From wherever it stopped, a player can bring it to an end: a pending velocity, a step, the note-offs, the end.
    while END not in tokens:
        allowed = allowed_events(state)
        held = [off(pitch) for pitch in range(128) if state.held[pitch]]
        ending = [END, *held, shift(1), velocity(1), on(60), START, shift(100)]
        tokens.append(next(token for token in ending if allowed[token]))
        state = advance(state, tokens[-1])
        assert len(tokens) < 3 * length + 200
    performance, report = decode_report(np.array(tokens))
    assert report == (0, 0, 0)
    assert len(performance) == sum(token < NOTE_OFF for token in tokens) > 0
    assert not allowed_events(state)[:PAD].any()
    # Within a step the order of onsets is lost, and with it at most how often the velocity is told.
    kept = [token for token in tokens if not VELOCITY <= token < EVENT_CLASSES and token < PAD]
    again = [token for token in encode(performance).tolist() if token < VELOCITY]
    assert sorted(again) == sorted(kept)


BEGUN = [START, velocity(5), on(60)]


@pytest.mark.parametrize(
    ("tokens", "allowed"),
    [
        ([], {START}),
        ([PAD, PAD], {START}),
        ([START], {"shift", "velocity"}),
        ([START, velocity(5)], {"on"}),
        (BEGUN, {"on", "shift", "velocity"}),
        ([*BEGUN, shift(99)], {"on", "held off", "velocity"}),
        ([*BEGUN, shift(100)], {"on", "held off", "velocity", "shift"}),
        ([*BEGUN, on(60), shift(3), off(60)], {"on", "held off", "velocity", "shift"}),
        ([*BEGUN, shift(3), off(60)], {"on", "velocity", "shift", END}),
        ([*BEGUN, shift(3), off(60), shift(2)], {"on", "velocity"}),
        ([*BEGUN, shift(3), off(60), END], {PAD}),
        ([*BEGUN, shift(3), off(60), END, PAD], {PAD}),
    ],
)
def test_each_rule_of_the_grammar(tokens, allowed):
    expected = np.zeros(VOCABULARY_SIZE, bool)
    expected[[token for token in allowed if isinstance(token, int)]] = True
    expected[NOTE_ON:NOTE_OFF] = "on" in allowed
    expected[off(60)] = "held off" in allowed
    expected[TIME_SHIFT:VELOCITY] = "shift" in allowed
    expected[VELOCITY:EVENT_CLASSES] = "velocity" in allowed
    if velocity(5) in tokens:
        expected[velocity(5)] = False  # it is in force
    assert np.array_equal(allowed_events(grammar_after(np.array(tokens, np.int32))), expected)


def test_tokens_of_small_unsigned_types_are_tokens_too():
    tokens = np.array([START, velocity(2), on(60), shift(100), off(60)], np.uint16)
    assert grammar_after(tokens).held.sum() == walked(tokens)[-1].held.sum() == 0
    assert rows_of(decode(tokens)) == [(0, 100, 60, 2)]


@given(tokens_strategy)
def test_the_state_after_many_tokens_is_that_of_one_by_one(tokens):
    tokens = np.clip(tokens, -1, VOCABULARY_SIZE)
    at_once, one_by_one = grammar_after(tokens), walked(tokens)[-1]
    assert np.array_equal(at_once.held, one_by_one.held)
    assert (at_once.velocity, at_once.previous) == (one_by_one.velocity, one_by_one.previous)


@given(st.lists(st.integers(0, VOCABULARY_SIZE - 1), min_size=24, max_size=24))
def test_a_compiled_batch_follows_the_same_rule(tokens):
    tokens_2x3xT = np.array(tokens, np.int32).reshape(2, 3, 4)

    compiled, plain = grammar_start((2, 3), xp=jnp), grammar_start((2, 3))
    for place in range(4):
        plain = advance(plain, tokens_2x3xT[..., place])
        compiled = ADVANCE(compiled, tokens_2x3xT[..., place])
        for ours, theirs in zip(plain, compiled, strict=True):
            assert np.array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype == np.int32
        assert np.array_equal(allowed_events(plain), ALLOWED(compiled))
    assert allowed_events(plain).shape == (2, 3, VOCABULARY_SIZE)


def test_what_may_be_drawn_is_what_is_allowed_but_a_held_pitch_struck_again():
    held = grammar_after(np.array([START, VELOCITY + 3, NOTE_ON + 60, TIME_SHIFT + 9], np.int32))
    assert allowed_events(held)[NOTE_ON + 60]
    refused = np.flatnonzero(allowed_events(held) & ~playable_events(held))
    assert refused.tolist() == [NOTE_ON + 60]
    released = advance(held, NOTE_OFF + 60)
    assert np.array_equal(playable_events(released), allowed_events(released))
    both = jax.tree.map(lambda *rows: jnp.stack(rows), held, released)
    assert np.array_equal(playable_events(both, jnp), [playable_events(held), playable_events(released)])


ADVANCE = jax.jit(lambda state, token: advance(state, token, xp=jnp))
ALLOWED = jax.jit(lambda state: allowed_events(state, xp=jnp))
