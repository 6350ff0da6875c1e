"""`Performance` <-> event tokens.

Encoding and order are those of note-seq 0.0.5's `Performance` (see `vocabulary`). All 1276 files of MAESTRO v3.0.0 were
read and encoded with both: times agree to the last bit, and tokens match one for one. No time rounds differently,
because `music_ar.midi` computes seconds as pretty_midi does. The order differs from note-seq's in one case: two notes
of one pitch that different instruments strike at exactly the same time.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, Integer, Shaped

from music_ar.midi.performance import Performance
from music_ar.tokens.grammar import by_pitch, stray_note_offs
from music_ar.tokens.vocabulary import (
    DEFAULT_VELOCITY_BIN,
    INFILL_VOCABULARY_SIZE,
    MAX_SHIFT_STEPS,
    NOTE_OFF,
    NOTE_ON,
    PITCHES,
    STEPS_PER_SECOND,
    TIME_SHIFT,
    VELOCITY,
    VELOCITY_BIN_SIZE,
    EventError,
    flat_integers,
    is_note,
    is_shift,
    is_velocity,
)


def quantize(seconds: np.ndarray) -> Int64[np.ndarray, " n"]:
    """Round seconds >= 0 to the nearest step, halves up, by the same float64 operations as note-seq."""
    return (seconds * STEPS_PER_SECOND + 0.5).astype(np.int64)


def encode(performance: Performance) -> Int32[np.ndarray, " T"]:
    """Event tokens of a performance, all below `EVENT_CLASSES`: without `START` and `END`.

    Within a step, note-offs come before note-ons, both ordered by the (onset, pitch) of their notes. A note shorter
    than a step lasts one step. A velocity token is written where the velocity bin changes.

    Raises:
      EventError: the performance lasts more than 2**31 steps (248 days).
    """
    if performance.duration_s * STEPS_PER_SECOND >= 2**31:
        raise EventError(f"a performance must end before step 2**31, got one of {performance.duration_s} s")
    n = len(performance)
    on_step = quantize(performance.onset_s)
    off_step = np.maximum(quantize(performance.offset_s), on_step + 1)
    # Notes are sorted, so their index breaks ties. A note that ends in a step began in an earlier one, so its index is
    # lower than that of any note that begins in the step: note-offs come before note-ons. A stable sort is fast on
    # sorted runs.
    order = np.argsort(np.concatenate([off_step, on_step]) * n + np.tile(np.arange(n), 2), kind="stable")
    # A note-on with a new velocity appears twice, and the first of the two becomes the velocity.
    bins = (performance.velocity - 1) // VELOCITY_BIN_SIZE
    changes = np.flatnonzero(np.diff(bins, prepend=-1))
    places = np.flatnonzero(order >= n)[changes]  # note-ons are in the order of the notes
    order = np.insert(order, places, order[places])
    events = np.concatenate([NOTE_OFF + performance.pitch, NOTE_ON + performance.pitch])[order]
    events[places + np.arange(len(places))] = VELOCITY + bins[changes]
    return with_time_shifts(events, np.concatenate([off_step, on_step])[order])[0]


def with_time_shifts(
    events: Integer[np.ndarray, " E"], steps: Int64[np.ndarray, " E"]
) -> tuple[Integer[np.ndarray, " T"], Int64[np.ndarray, " E"]]:
    """Insert time shifts between events; return the tokens, of the events' type, and the number of shifts before each.

    Args:
      events: note-ons, note-offs and velocities.
      steps: time of each event in steps, non-decreasing.
    """
    waits = np.diff(steps, prepend=0)
    shift_counts = -(-waits // MAX_SHIFT_STEPS)
    positions = np.cumsum(shift_counts + 1) - 1
    tokens = np.full(len(events) + int(shift_counts.sum()), TIME_SHIFT + MAX_SHIFT_STEPS - 1, events.dtype)
    tokens[positions] = events
    waiting = np.flatnonzero(shift_counts)
    tokens[positions[waiting] - 1] = TIME_SHIFT + (waits[waiting] - 1) % MAX_SHIFT_STEPS
    return tokens, shift_counts


def event_steps(tokens: Integer[np.ndarray, " T"]) -> Int64[np.ndarray, " T"]:
    """Time of each token, in steps: the sum of the shifts before it."""
    tokens = flat_integers(tokens)
    shift = np.where(is_shift(tokens), tokens - (TIME_SHIFT - 1), 0)
    return np.cumsum(shift) - shift


class DecodeReport(NamedTuple):
    """What `decode` had to repair.

    Attributes:
      dangling_notes: notes without a note-off, ended at the last step.
      stray_note_offs: note-offs of a pitch that was not held, ignored.
      unknown_tokens: tokens outside the vocabulary, ignored.
    """

    dangling_notes: int
    stray_note_offs: int
    unknown_tokens: int


def decode(tokens: Shaped[np.ndarray, "..."]) -> Performance:
    """Decode event tokens into a performance; any integer array is accepted. See `decode_report`."""
    return decode_report(tokens)[0]


def decode_report(tokens: Shaped[np.ndarray, "..."]) -> tuple[Performance, DecodeReport]:
    """Decode event tokens into a performance, and report what had to be repaired.

    A note-off ends the oldest held note of its pitch, as in note-seq. Control tokens, stray note-offs and
    anything outside the vocabulary are skipped. Notes left without a note-off end with the last event. Every note lasts
    at least one step. A velocity bin becomes its lowest velocity: 1, 5, … 125.

    Raises:
      EventError: `tokens` is not a flat integer array.
    """
    tokens = flat_integers(tokens)
    step = event_steps(tokens)
    pairs = pair_notes(tokens)
    off_step = np.where(pairs.off >= 0, step[pairs.off], length_steps(tokens))
    performance = Performance(
        onset_s=step[pairs.on] / STEPS_PER_SECOND,
        offset_s=np.maximum(off_step, step[pairs.on] + 1) / STEPS_PER_SECOND,
        pitch=tokens[pairs.on],
        velocity=lowest_velocity(velocity_bins(tokens)[pairs.on]),
    )
    unknown = int(((tokens < 0) | (tokens >= INFILL_VOCABULARY_SIZE)).sum())
    return performance, DecodeReport(int((pairs.off < 0).sum()), pairs.stray_note_offs, unknown)


class NotePairs(NamedTuple):
    """The notes of a token sequence, sorted by pitch and then by position.

    Attributes:
      on: `int64 [n]`, index of each note-on.
      off: `int64 [n]`, index of its note-off, -1 if the note is still held at the end.
      stray_note_offs: note-offs of a pitch that was not held.
    """

    on: Int64[np.ndarray, " n"]
    off: Int64[np.ndarray, " n"]
    stray_note_offs: int


def pair_notes(tokens: Int64[np.ndarray, " T"]) -> NotePairs:
    """Pair note-ons with note-offs: a note-off ends the oldest held note of its pitch."""
    position = np.flatnonzero(is_note(tokens))
    position = position[by_pitch(tokens[position])]
    pitch, note_on = tokens[position] % PITCHES, tokens[position] < NOTE_OFF
    stray = stray_note_offs(pitch, note_on)
    on, off = position[note_on], position[~note_on & ~stray]
    # The k-th note-off of a pitch ends its k-th note-on.
    off_pitch = tokens[off] % PITCHES
    rank = np.arange(len(off)) - np.searchsorted(off_pitch, off_pitch)
    ends = np.full(len(on), -1)
    ends[np.searchsorted(tokens[on], off_pitch) + rank] = off
    return NotePairs(on, ends, int(stray.sum()))


def lowest_velocity(bins: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """The lowest MIDI velocity of each bin: 1, 5, … 125."""
    return 1 + (bins - 1) * VELOCITY_BIN_SIZE


def length_steps(tokens: Integer[np.ndarray, " T"]) -> int:
    """Time after the last token, in steps: the sum of all shifts."""
    tokens = flat_integers(tokens)
    return int((tokens[is_shift(tokens)] - (TIME_SHIFT - 1)).sum())


def velocity_bins(tokens: Int64[np.ndarray, " T"], before: int = DEFAULT_VELOCITY_BIN) -> Int64[np.ndarray, " T"]:
    """Velocity bin in force at each token; `before` is the bin in force before the first token."""
    last = np.maximum.accumulate(np.where(is_velocity(tokens), np.arange(len(tokens)), -1))
    return np.where(last >= 0, tokens[last] - (VELOCITY - 1), before)
