"""`Performance` <-> event tokens: vocabulary, encoding, grammar, fingerprint.

The 388 event classes, their order and the encoding are those of note-seq 0.0.5's `Performance` with
`PerformanceOneHotEncoding(num_velocity_bins=32, max_shift_steps=100)` at 100 steps a second, as used by Music
Transformer and Perceiver AR (Hawthorne et al. 2022, section 5.2); three control tokens follow them.
Time is counted in steps of 10 ms.

All 1276 files of MAESTRO v3.0.0 were read and encoded here and by note-seq: the times agree to the last bit and the
tokens one for one. No time rounds the other way, because `music_ar.midi` computes seconds as pretty_midi does.
Only one order is not note-seq's: that of two notes of one pitch which different instruments strike at the very
same time.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, Integer, Shaped

from music_ar.midi.performance import Performance
from music_ar.tokens.grammar import _by_pitch, _stray_offs
from music_ar.tokens.vocabulary import (
    DEFAULT_VELOCITY_BIN,
    EVENT_CLASSES,
    MAX_SHIFT_STEPS,
    NOTE_OFF,
    NOTE_ON,
    PITCHES,
    STEPS_PER_SECOND,
    TIME_SHIFT,
    VELOCITY,
    VELOCITY_BIN_SIZE,
    VOCABULARY_SIZE,
    EventError,
    _flat_integers,
    is_shift,
)


def quantize(seconds: np.ndarray) -> Int64[np.ndarray, " n"]:
    """Seconds >= 0 to the nearest step, halves up, by the same float64 operations as note-seq."""
    return (seconds * STEPS_PER_SECOND + 0.5).astype(np.int64)


def encode(performance: Performance) -> Int32[np.ndarray, " T"]:
    """The event tokens of a performance, all below `EVENT_CLASSES`: no `START`, no `END`.

    Within a step the note-offs come first, then the note-ons, each in the order of (onset, pitch) of their notes.
    A note that is shorter than a step lasts one step. A velocity is told where it changes.

    Raises:
      EventError: the performance lasts more than 2**31 steps (248 days).
    """
    if performance.duration_s * STEPS_PER_SECOND >= 2**31:
        raise EventError(f"a performance must end before step 2**31, got one of {performance.duration_s} s")
    n = len(performance)
    on_step = quantize(performance.onset_s)
    off_step = np.maximum(quantize(performance.offset_s), on_step + 1)
    # The notes are sorted already, so a note's index breaks ties. A note that ends in a step began in an earlier
    # one, hence has a lower index than any note that begins in it: offs come before ons.
    # The stable sort merges the sorted runs that are there.
    order = np.argsort(np.concatenate([off_step, on_step]) * n + np.tile(np.arange(n), 2), kind="stable")
    step = np.concatenate([off_step, on_step])[order]
    is_on = order >= n
    note_token = np.concatenate([NOTE_OFF + performance.pitch, NOTE_ON + performance.pitch])[order]

    bins = (performance.velocity - 1) // VELOCITY_BIN_SIZE + 1
    velocity_changes = np.zeros(2 * n, bool)
    velocity_changes[is_on] = np.diff(bins, prepend=0) != 0  # the note-ons appear in the order of the notes

    wait = np.diff(step, prepend=0)
    shifts = -(-wait // MAX_SHIFT_STEPS)
    end = np.cumsum(shifts + velocity_changes + 1)  # each event: shifts, maybe a velocity, the note token
    tokens = np.full(end[-1] if n else 0, TIME_SHIFT + MAX_SHIFT_STEPS - 1, np.int32)
    tokens[end - 1] = note_token
    tokens[(end - 2)[velocity_changes]] = VELOCITY + bins[velocity_changes[is_on]] - 1
    last_shift = (end - 2 - velocity_changes)[shifts > 0]
    tokens[last_shift] = TIME_SHIFT + (wait[shifts > 0] - 1) % MAX_SHIFT_STEPS
    return tokens


def event_steps(tokens: Integer[np.ndarray, " T"]) -> Int64[np.ndarray, " T"]:
    """The time of each token, in steps: the sum of the shifts before it."""
    tokens = _flat_integers(tokens)
    shift = np.where(is_shift(tokens), tokens - (TIME_SHIFT - 1), 0)
    return np.cumsum(shift) - shift


class DecodeReport(NamedTuple):
    """What `decode` had to mend.

    Attributes:
      dangling_notes: notes without a note-off, closed at the last step.
      stray_note_offs: note-offs of a pitch that was not held, ignored.
      unknown_tokens: tokens outside the vocabulary, ignored.
    """

    dangling_notes: int
    stray_note_offs: int
    unknown_tokens: int


def decode(tokens: Shaped[np.ndarray, "..."]) -> Performance:
    """The performance that event tokens describe; any integer array has one. See `decode_report`."""
    return decode_report(tokens)[0]


def decode_report(tokens: Shaped[np.ndarray, "..."]) -> tuple[Performance, DecodeReport]:
    """The performance that event tokens describe, and what had to be mended in them.

    A note-off ends the oldest held note of its pitch, as in note-seq. `PAD`, `START`, `END` and whatever is outside
    the vocabulary are skipped, stray note-offs too; notes left without a note-off end with the last event. Every
    note lasts at least one step. A velocity bin becomes its lowest velocity, 1, 5, … 125.

    Raises:
      EventError: `tokens` is not a flat integer array.
    """
    tokens = _flat_integers(tokens)
    step = event_steps(tokens)
    velocity = _velocity_bins(tokens)
    is_note = (tokens >= 0) & (tokens < TIME_SHIFT)
    position = np.flatnonzero(is_note)
    position = position[_by_pitch(tokens[position])]
    pitch = tokens[position] % PITCHES
    is_on = tokens[position] < NOTE_OFF

    stray = _stray_offs(pitch, is_on)
    on, on_pitch = position[is_on], pitch[is_on]
    off, off_pitch = position[~is_on & ~stray], pitch[~is_on & ~stray]
    # The k-th note-off of a pitch ends its k-th note-on.
    rank = np.arange(len(off)) - np.searchsorted(off_pitch, off_pitch)
    ended = np.searchsorted(on_pitch, off_pitch) + rank
    off_step = np.full(len(on), length_steps(tokens))
    off_step[ended] = step[off]
    performance = Performance(
        onset_s=step[on] / STEPS_PER_SECOND,
        offset_s=np.maximum(off_step, step[on] + 1) / STEPS_PER_SECOND,
        pitch=on_pitch,
        velocity=1 + (velocity[on] - 1) * VELOCITY_BIN_SIZE,
    )
    unknown = int(((tokens < 0) | (tokens >= VOCABULARY_SIZE)).sum())
    return performance, DecodeReport(len(on) - len(off), int(stray.sum()), unknown)


def length_steps(tokens: Integer[np.ndarray, " T"]) -> int:
    """The time after the last token, in steps: the sum of all shifts."""
    tokens = _flat_integers(tokens)
    return int((tokens[is_shift(tokens)] - (TIME_SHIFT - 1)).sum())


def _velocity_bins(tokens: Int64[np.ndarray, " T"]) -> Int64[np.ndarray, " T"]:
    """The velocity bin in force at each token."""
    is_velocity = (tokens >= VELOCITY) & (tokens < EVENT_CLASSES)
    last = np.maximum.accumulate(np.where(is_velocity, np.arange(len(tokens)), -1))
    return np.where(last >= 0, tokens[last] - (VELOCITY - 1), DEFAULT_VELOCITY_BIN)
