"""Event tokens by name, and what hypothesis draws: performances, and token sequences of any kind."""

import numpy as np
from hypothesis import strategies as st

from music_ar.midi.performance import Performance
from music_ar.tokens.vocabulary import (
    END_OF_GAP,
    INFILL_VOCABULARY_SIZE,
    MIDDLE,
    NOTE_OFF,
    NOTE_ON,
    PAD,
    SEPARATOR,
    START,
    TIME_SHIFT,
    VELOCITY,
    VOCABULARY_SIZE,
)

Row = tuple[int, int, int, int]
"""Onset step, offset step, pitch, velocity bin."""


def on(pitch: int) -> int:
    return NOTE_ON + pitch


def off(pitch: int) -> int:
    return NOTE_OFF + pitch


def shift(steps: int) -> int:
    return TIME_SHIFT + steps - 1


def velocity(bin_: int) -> int:
    return VELOCITY + bin_ - 1


SECOND = shift(100)


def tokens_of(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def melody(pitches, steps: int = 10) -> np.ndarray:
    """`START`, then a note every so many steps, each a velocity bin louder than the last."""
    notes = [[velocity(1 + number % 32), on(pitch), shift(steps), off(pitch)] for number, pitch in enumerate(pitches)]
    return np.concatenate([[START], *notes]).astype(np.int32)


def performance_of(rows: list[tuple[float, float, int, int]]) -> Performance:
    """A performance of (onset in s, offset in s, pitch, velocity)."""
    onset_s, offset_s, pitch, velocities = (list(column) for column in zip(*rows, strict=True)) if rows else ([],) * 4
    return Performance(
        onset_s=np.array(onset_s, np.float64),
        offset_s=np.array(offset_s, np.float64),
        pitch=np.array(pitch, np.int32),
        velocity=np.array(velocities, np.int32),
    )


def rows_of(performance: Performance) -> list[Row]:
    """The notes in steps, for a performance whose times are whole steps."""
    on_step, off_step = np.rint(performance.onset_s * 100), np.rint(performance.offset_s * 100)
    assert np.array_equal(performance.onset_s, on_step / 100)
    assert np.array_equal(performance.offset_s, off_step / 100)
    assert (performance.velocity % 4 == 1).all()
    columns = (on_step.astype(int), off_step.astype(int), performance.pitch, performance.velocity // 4 + 1)
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


@st.composite
def performances(draw: st.DrawFn) -> Performance:
    """Few pitches and short times, so that notes touch and overlap; some long silences; times between steps too."""
    time_s = st.one_of(st.integers(0, 60).map(lambda step: step / 100), st.floats(0, 0.3), st.floats(0, 5))
    length_s = st.one_of(st.floats(0.0001, 0.3), st.integers(1, 400).map(lambda step: step / 100))
    note = st.tuples(time_s, length_s, st.sampled_from([0, 59, 60, 127]), st.integers(1, 127))
    rows = draw(st.lists(note, max_size=25))
    return performance_of([(onset, onset + length, pitch, loudness) for onset, length, pitch, loudness in rows])


_FEW = [START, on(60), on(60), on(61), on(62), off(60), off(61), shift(3), SECOND, velocity(1), velocity(9), PAD]


@st.composite
def _chords(draw: st.DrawFn) -> list[int]:
    """The same chords again and again, struck in any order."""
    chord = st.sampled_from([(60, 61), (60, 61, 62), (60, 62, 64, 67), (50, 55)])
    struck = [on(pitch) for one in draw(st.lists(chord, max_size=24)) for pitch in draw(st.permutations(one))]
    return [START, *struck]


def token_sequences(min_size: int = 0, max_size: int = 90, *, gaps: bool = False) -> st.SearchStrategy[np.ndarray]:
    """Sequences of the vocabulary, or that of gaps: of all tokens; of few, so that everything recurs; of chords."""
    size = INFILL_VOCABULARY_SIZE if gaps else VOCABULARY_SIZE
    every = st.lists(st.integers(0, size - 1), min_size=min_size, max_size=max_size)
    few_tokens = [*_FEW, SEPARATOR, MIDDLE, END_OF_GAP] if gaps else _FEW
    few = st.lists(st.sampled_from(few_tokens), min_size=min_size, max_size=max_size)
    chords = _chords().filter(lambda tokens: len(tokens) >= min_size).map(lambda tokens: tokens[:max_size])
    return st.one_of(every, few, chords).map(lambda tokens: np.array(tokens, np.int32))
