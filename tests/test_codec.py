"""Tokens equal note-seq's; decoding inverts encoding and repairs any token sequence."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from event_tokens import SECOND, Row, off, on, performance_of, performances, rows_of, shift, token_sequences, velocity
from hypothesis import given
from hypothesis import strategies as st

from music_ar.midi.io import read_midi
from music_ar.tokens.codec import decode, decode_report, encode, event_steps, length_steps
from music_ar.tokens.vocabulary import (
    DEFAULT_VELOCITY_BIN,
    END,
    EVENT_CLASSES,
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
ANY_INTEGERS = token_sequences(max_size=60).map(lambda tokens: tokens.astype(np.int64)) | st.lists(
    st.integers(-(2**31), 2**31), max_size=20
).map(lambda tokens: np.array(tokens, np.int64))


def quantized(performance) -> list[Row]:
    """The notes in steps, halves up, at least a step long. Notes of one pitch end in the order in which they began."""
    onsets, offsets = defaultdict(list), defaultdict(list)
    columns = (performance.onset_s, performance.offset_s, performance.pitch, performance.velocity)
    for onset_s, offset_s, pitch, loudness in zip(*(column.tolist() for column in columns), strict=True):
        step = int(onset_s * 100 + 0.5)
        onsets[pitch].append((step, (loudness - 1) // 4 + 1))
        offsets[pitch].append(max(int(offset_s * 100 + 0.5), step + 1))
    return sorted(
        (step, offset, pitch, bin_)
        for pitch in onsets
        for (step, bin_), offset in zip(onsets[pitch], sorted(offsets[pitch]), strict=True)
    )


def decoded_one_by_one(tokens: np.ndarray) -> tuple[list[Row], int, int]:
    """A plain reference: notes in steps, dangling notes, stray note-offs."""
    step, bin_, stray, notes, held = 0, DEFAULT_VELOCITY_BIN, 0, [], defaultdict(list)
    for token in tokens.tolist():
        if NOTE_ON <= token < NOTE_OFF:
            held[token].append((step, bin_))
        elif NOTE_OFF <= token < TIME_SHIFT and held[token - NOTE_OFF]:
            start, struck_with = held[token - NOTE_OFF].pop(0)
            notes.append((start, max(step, start + 1), token - NOTE_OFF, struck_with))
        elif NOTE_OFF <= token < TIME_SHIFT:
            stray += 1
        elif TIME_SHIFT <= token < VELOCITY:
            step += token - TIME_SHIFT + 1
        elif VELOCITY <= token < EVENT_CLASSES:
            bin_ = token - VELOCITY + 1
    dangling = [(start, max(step, start + 1), pitch, with_) for pitch in held for start, with_ in held[pitch]]
    return sorted(notes + dangling), len(dangling), stray


@pytest.mark.parametrize("name", PIECES)
def test_real_pieces_encode_as_in_note_seq(name):
    assert np.array_equal(encode(read_midi(DATA / name)), GOLDENS[f"{name}/tokens"])


@given(performances())
def test_any_performance_encodes_as_in_note_seq(performance):
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
        *(SECOND, SECOND, velocity(1), on(60), velocity(32), on(64)),
        *(shift(50), off(64), velocity(1), on(60), velocity(2), on(61)),
        *(shift(1), off(60), off(61), SECOND, shift(49), on(62), SECOND, off(60), shift(1), off(62)),
    ]
    assert encode(performance_of([])).tolist() == []


def test_a_performance_too_long_for_the_clock_is_refused():
    with pytest.raises(EventError, match="before step"):
        encode(performance_of([(0.0, 3e7, 60, 64)]))


@given(performances())
def test_decoding_an_encoding_gives_the_quantized_performance(performance):
    again, report = decode_report(encode(performance))
    assert rows_of(again) == quantized(performance)
    assert report == (0, 0, 0)
    assert decode(encode(again)) == again


@given(ANY_INTEGERS)
def test_any_integers_decode(tokens):
    performance, report = decode_report(tokens)
    rows, dangling, stray = decoded_one_by_one(tokens)
    unknown = sum(not 0 <= token < VOCABULARY_SIZE for token in tokens.tolist())
    assert rows_of(performance) == rows
    assert report == (dangling, stray, unknown)
    assert performance == decode(tokens)


def test_only_flat_integer_arrays_decode():
    with pytest.raises(EventError, match="flat array of integers"):
        decode(np.zeros((2, 3), np.int32))


def test_small_unsigned_types_decode():
    assert rows_of(decode(np.array([START, velocity(2), on(60), SECOND, off(60)], np.uint16))) == [(0, 100, 60, 2)]


def test_times_are_sums_of_the_shifts_before():
    tokens = np.array([START, shift(7), velocity(3), on(60), SECOND, shift(1), off(60), END, PAD])
    assert event_steps(tokens).tolist() == [0, 0, 7, 7, 7, 107, 108, 108, 108]
    assert [length_steps(tokens[:end]) for end in (0, 2, 5, 9)] == [0, 7, 107, 108]
