"""Transpose, stretch and change the velocity of event tokens: pure functions on pieces and on windows of them.

Transposition and stretching are the augmentations of Oore et al. ("This Time with Feeling", 2018), applied to tokens.
Transposition and velocity shifts cost a few additions, a stretch costs a sort. A stretch requantizes: event times in
steps are scaled and rounded, and the events are written as `music_ar.tokens.encode` would write them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Integer

from music_ar.ranges import check_ranges, number, whole
from music_ar.tokens.codec import with_time_shifts
from music_ar.tokens.vocabulary import (
    EVENT_CLASSES,
    MAX_SHIFT_STEPS,
    NOTE_OFF,
    PITCHES,
    TIME_SHIFT,
    VELOCITY,
    VELOCITY_BINS,
    EventError,
    is_shift,
    is_velocity,
)

PIANO_LOW, PIANO_HIGH = 21, 108  # A0 and C8


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Ranges of the augmentation of training windows. All draws are uniform, both ends included.

    Attributes:
        min_semitones: lowest transposition in semitones; -5 to +6 puts a piece into each of the twelve keys once.
        max_semitones: highest transposition in semitones.
        min_stretch: smallest factor on all times; 0.9 makes the music 10 % faster.
        max_stretch: largest factor on all times; 1.1 makes the music 10 % slower.
        velocity_bins: largest velocity shift, up or down, in velocity bins (of 32).
    """

    min_semitones: int = whole(-5, -87, 0)
    max_semitones: int = whole(6, 0, 87)
    min_stretch: float = number(0.9, least=0.5, most=1)
    max_stretch: float = number(1.1, least=1, most=2)
    velocity_bins: int = whole(0, 0, VELOCITY_BINS - 1)

    def __post_init__(self) -> None:
        check_ranges(self, ValueError)

    def draw(self, rng: np.random.Generator) -> tuple[int, float, int]:
        """Draw a transposition in semitones, a stretch factor and a velocity shift in bins."""
        semitones = rng.integers(self.min_semitones, self.max_semitones, endpoint=True)
        factor = rng.uniform(self.min_stretch, self.max_stretch)
        bins = rng.integers(-self.velocity_bins, self.velocity_bins, endpoint=True) if self.velocity_bins else 0
        return int(semitones), float(factor), int(bins)


# --- pitch and velocity ----------------------------------------------------------------------------------------------


def clip_transposition(tokens: Integer[np.ndarray, " T"], semitones: int) -> int:
    """The transposition, clipped so that the notes of these tokens stay on the piano.

    Notes already off the piano (outside 21..108) prevent a move further out; they never force one back.
    """
    pitches = tokens[tokens < TIME_SHIFT] % PITCHES
    if len(pitches) == 0:
        return semitones
    lowest = min(0, PIANO_LOW - int(pitches.min()))
    highest = max(0, PIANO_HIGH - int(pitches.max()))
    return min(max(semitones, lowest), highest)


def transpose(tokens: Integer[np.ndarray, " T"], semitones: int) -> Integer[np.ndarray, " T"]:
    """Move all notes by `semitones`, clipped to the piano.

    Args:
        tokens: event tokens; all but note-ons and note-offs stay as they are.
        semitones: positive is up.

    Returns:
        A new array of the same shape and type.
    """
    shift = np.int32(clip_transposition(tokens, semitones))  # signed; the tokens may be unsigned
    return np.where(tokens < TIME_SHIFT, tokens + shift, tokens).astype(tokens.dtype)


def clip_velocity_shift(tokens: Integer[np.ndarray, " T"], bins: int) -> int:
    """The velocity shift, clipped so that the softest and the loudest velocity of these tokens stay in range."""
    levels = tokens[is_velocity(tokens)].astype(np.int64) - VELOCITY
    if len(levels) == 0:
        return bins
    return min(max(bins, -int(levels.min())), VELOCITY_BINS - 1 - int(levels.max()))


def shift_velocity(tokens: Integer[np.ndarray, " T"], bins: int) -> Integer[np.ndarray, " T"]:
    """Move all velocities by `bins`, clipped to the range of velocities.

    All move by the same amount, so dynamics keep their shape and different velocities stay different.

    Args:
        tokens: event tokens; all but velocities stay as they are.
        bins: positive is louder.

    Returns:
        A new array of the same shape and type.
    """
    shift = np.int32(clip_velocity_shift(tokens, bins))
    return np.where(is_velocity(tokens), tokens + shift, tokens).astype(tokens.dtype)


# --- time ------------------------------------------------------------------------------------------------------------


def stretch(
    tokens: Integer[np.ndarray, " T"], factor: float
) -> tuple[Integer[np.ndarray, " S"], Int64[np.ndarray, " S"]]:
    """Multiply all times by `factor` and quantize them to steps of 10 ms; see `retime`.

    Args:
        tokens: as for `retime`.
        factor: above 0; 1.1 makes the music 10 % slower.

    Returns:
        As `retime`.

    Raises:
        ValueError: `factor` is not a positive number.
        EventError: as `retime`.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"expected a stretch factor above 0, got {factor}")
    return retime(tokens, lambda steps: np.floor(steps * factor + 0.5).astype(np.int64))


def retime(
    tokens: Integer[np.ndarray, " T"], clock: Callable[[Int64[np.ndarray, " E"]], Int64[np.ndarray, " E"]]
) -> tuple[Integer[np.ndarray, " S"], Int64[np.ndarray, " S"]]:
    """Move every event to the time that `clock` gives it.

    Every note-on, note-off and velocity is kept; only time shifts are added and removed. As in `encode`, a note lasts
    at least one step, and within a step the note-offs come first, in the order of their notes' onsets, then the
    note-ons with their velocities, in their old order. The result equals encoding the moved notes, up to the 10 ms to
    which the input was rounded.

    Args:
        tokens: a canonically encoded piece, or any window of one. START, END and PAD are allowed at its ends and stay
            there. Time counts from the first token. A window that ends inside a silence of unknown length still does
            afterwards.
        clock: maps times in steps to times in steps; must be non-decreasing.

    Returns:
        The moved tokens, in the input's type, and the index of the input token that each comes from. A time shift comes
        from the event that it leads to.

    Raises:
        EventError: START, END or PAD between events.
    """
    start, stop = _span_of_events(tokens)
    body = tokens[start:stop]
    shifts = is_shift(body)
    times = np.cumsum(np.where(shifts, body.astype(np.int64) - (TIME_SHIFT - 1), 0))
    events = np.flatnonzero(~shifts)
    ids = body[events]
    steps, order = _reorder(ids, clock(times[events]))
    moved, shift_counts = with_time_shifts(ids[order], steps)
    trailing = _trailing_shifts(body, int(clock(times[-1:]).sum()), steps)
    ends = np.arange(len(tokens))
    source = (
        ends[:start],
        start + np.repeat(events[order], shift_counts + 1),
        np.full(len(trailing), stop - 1),
        ends[stop:],
    )
    parts = (tokens[:start], moved, trailing, tokens[stop:])
    return np.concatenate(parts).astype(tokens.dtype, copy=False), np.concatenate(source)


def _span_of_events(tokens: np.ndarray) -> tuple[int, int]:
    """Start and stop of the events between START, END and PAD at the ends."""
    inner = np.flatnonzero(tokens < EVENT_CLASSES)
    if len(inner) == 0:
        return 0, 0
    start, stop = int(inner[0]), int(inner[-1]) + 1
    if len(inner) != stop - start:
        raise EventError("PAD, START or END between events; expected them only at the ends of a window.")
    return start, stop


def _reorder(events: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps in the order of `encode`, every note at least one step long, and that order as indices of events."""
    steps = steps.copy()
    rank = np.arange(len(events))
    note_off = (events >= NOTE_OFF) & (events < TIME_SHIFT)
    offs, ons = _pair_notes(events)
    steps[offs] = np.maximum(steps[offs], steps[ons] + 1)
    # Note-offs of notes that began before the window come before all others and keep their order.
    rank[note_off] = -1
    rank[offs] = ons
    order = np.lexsort((rank, ~note_off, steps))
    return steps[order], order


def _pair_notes(events: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of note-offs and of the note-ons that they end; per pitch the oldest note ends first.

    In a window, the note-offs without a note-on are the *first* of their pitch: they end notes that began before the
    window. `decode` drops those that find nothing held instead, as note-seq does. The two differ where a window starts
    while a pitch sounds twice.
    """
    notes = np.flatnonzero(events < TIME_SHIFT)
    pitch = (events[notes] % PITCHES).astype(np.uint8)  # a stable sort of bytes is a radix sort
    by_pitch = np.argsort(pitch, kind="stable")
    notes, pitch = notes[by_pitch], pitch[by_pitch]
    note_on = events[notes] < NOTE_OFF
    if not note_on.any():
        return notes[:0], notes[:0]
    group = np.flatnonzero(np.diff(pitch, prepend=-1) != 0)
    lengths = np.diff(group, append=len(pitch))
    ons_before = np.cumsum(note_on) - note_on
    offs_before = np.arange(len(pitch)) - ons_before
    first_on, first_off = np.repeat(ons_before[group], lengths), np.repeat(offs_before[group], lengths)
    sounding = (ons_before - first_on) - (offs_before - first_off) - ~note_on
    held_before = np.repeat(np.maximum(0, -np.minimum.reduceat(sounding, group)), lengths)
    ordinal = offs_before - first_off - held_before
    paired = ~note_on & (ordinal >= 0)
    return notes[paired], notes[note_on][(first_on + ordinal)[paired]]


def _trailing_shifts(body: np.ndarray, end: int, steps: np.ndarray) -> np.ndarray:
    """Time shifts from the last event to time `end`, for a window that ends before the event they lead to."""
    if len(body) == 0:
        return np.empty(0, np.int64)
    remaining = max(0, end - (int(steps[-1]) if len(steps) else 0))
    full, partial = divmod(remaining, MAX_SHIFT_STEPS)
    shifts = [TIME_SHIFT + MAX_SHIFT_STEPS - 1] * full
    # After a full shift, the silence may continue beyond the window; a partial shift would claim a length that is
    # unknown.
    if partial and body[-1] != TIME_SHIFT + MAX_SHIFT_STEPS - 1:
        shifts.append(TIME_SHIFT - 1 + partial)
    return np.array(shifts, np.int64)
