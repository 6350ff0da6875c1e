"""Transposition, time stretch, loudness and returns of event tokens: pure functions on pieces and windows of them.

The first two are what Oore et al. ("This Time with Feeling", 2018) do to performances, done to tokens: a transposed or
louder window costs a few additions, a stretched one a sort. Stretching re-quantises: event times in steps are scaled
and rounded, and the events are written again as `music_ar.events.encode` would write them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Integer

from music_ar.tokens.codec import decode, encode
from music_ar.tokens.grammar import grammar_after
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
    """How far training windows are changed; all draws are uniform and their ends included.

    Attributes:
        min_semitones: lowest transposition. From -5 to +6 a piece comes in each of the twelve keys once.
        max_semitones: highest transposition.
        min_stretch: lowest factor on all times; 0.9 is a tenth faster.
        max_stretch: highest factor on all times; 1.1 is a tenth slower.
        velocity_bins: how many of the 32 velocity bins a window may become louder or softer.
        returns: share of the windows in which a passage of the targets was heard before; see `foreshadow`.
    """

    min_semitones: int = -5
    max_semitones: int = 6
    min_stretch: float = 0.9
    max_stretch: float = 1.1
    velocity_bins: int = 0
    returns: float = 0.0

    def __post_init__(self) -> None:
        if not -87 <= self.min_semitones <= 0 <= self.max_semitones <= 87:
            raise ValueError(
                "expected -87 <= min_semitones <= 0 <= max_semitones <= 87; "
                f"got {self.min_semitones} and {self.max_semitones}"
            )
        if not 0.5 <= self.min_stretch <= 1 <= self.max_stretch <= 2:
            raise ValueError(
                f"expected 0.5 <= min_stretch <= 1 <= max_stretch <= 2; got {self.min_stretch} and {self.max_stretch}"
            )

        if not 0 <= self.velocity_bins < VELOCITY_BINS:
            raise ValueError(f"expected 0 <= velocity_bins < {VELOCITY_BINS}; got {self.velocity_bins}")
        if not 0 <= self.returns <= 1:
            raise ValueError(f"expected 0 <= returns <= 1; got {self.returns}")

    def draw(self, rng: np.random.Generator) -> tuple[int, float, int]:
        """A transposition in semitones, a stretch factor and a number of velocity bins."""
        semitones = rng.integers(self.min_semitones, self.max_semitones, endpoint=True)
        factor = rng.uniform(self.min_stretch, self.max_stretch)
        louder = rng.integers(-self.velocity_bins, self.velocity_bins, endpoint=True) if self.velocity_bins else 0
        return int(semitones), float(factor), int(louder)


def room_to_transpose(tokens: Integer[np.ndarray, " T"], semitones: int) -> int:
    """As much of a transposition as keeps the notes of these tokens on the piano.

    Notes that already lie outside 21-108 forbid a move further out, never force one back.
    """
    pitches = tokens[tokens < TIME_SHIFT] % PITCHES
    if len(pitches) == 0:
        return semitones
    lowest = min(0, PIANO_LOW - int(pitches.min()))
    highest = max(0, PIANO_HIGH - int(pitches.max()))
    return min(max(semitones, lowest), highest)


def transpose(tokens: Integer[np.ndarray, " T"], semitones: int) -> Integer[np.ndarray, " T"]:
    """Moves every note by `semitones`, or by as much of it as there is room for.

    Args:
        tokens: event ids; other ids than note-ons and note-offs stay.
        semitones: positive is up.

    Returns:
        A new array of the same shape and type.
    """
    shift = np.int32(room_to_transpose(tokens, semitones))  # signed, where the tokens may not be
    return np.where(tokens < TIME_SHIFT, tokens + shift, tokens).astype(tokens.dtype)


def room_to_louden(tokens: Integer[np.ndarray, " T"], bins: int) -> int:
    """As much of a change of loudness as keeps the softest and the loudest velocity in range."""
    levels = tokens[is_velocity(tokens)].astype(np.int64) - VELOCITY
    if len(levels) == 0:
        return bins
    return min(max(bins, -int(levels.min())), VELOCITY_BINS - 1 - int(levels.max()))


def louden(tokens: Integer[np.ndarray, " T"], bins: int) -> Integer[np.ndarray, " T"]:
    """Moves every velocity by `bins`, or by as much of it as there is room for.

    So dynamics keep their shape, and two different velocities stay different.

    Args:
        tokens: event ids; other ids than velocities stay.
        bins: positive is louder.

    Returns:
        A new array of the same shape and type.
    """
    shift = np.int32(room_to_louden(tokens, bins))
    return np.where(is_velocity(tokens), tokens + shift, tokens).astype(tokens.dtype)


def foreshadow(
    tokens: Integer[np.ndarray, " T"], passage: slice, at: int, factor: float, bins: int
) -> Integer[np.ndarray, " T"]:
    """Lets a passage be heard once before, a little slower or louder, say, as pieces return to themselves.

    Few of MAESTRO's windows hold a return from thousands of tokens ago, so few that a model hardly learns to look
    there. Here the passage takes the place of what stood at `at`; notes that sound there are ended first.

    Args:
        tokens: a window.
        passage: which of its tokens to hear before.
        at: where; from there on as many tokens as the varied passage needs are replaced.
        factor: on its times.
        bins: of velocity that it becomes louder.

    Returns:
        A new array of the same shape and type; or the window as it is if there is no room before the passage.
    """
    theme = encode(decode(tokens[passage]))  # without what the cuts left: notes without beginning or end
    if len(theme):
        theme = louden(stretch(theme, factor), bins)
    held = np.flatnonzero(grammar_after(tokens[:at]).held)
    put = np.concatenate([NOTE_OFF + held, theme]).astype(tokens.dtype)
    if len(theme) == 0 or at + len(put) > passage.start:
        return tokens
    return np.concatenate([tokens[:at], put, tokens[at + len(put) :]])


def stretch(tokens: Integer[np.ndarray, " T"], factor: float) -> Integer[np.ndarray, " S"]:
    """Multiplies all times by `factor` and re-quantises to steps of 10 ms; see `stretch_with_source`."""
    return stretch_with_source(tokens, factor)[0]


def stretch_with_source(
    tokens: Integer[np.ndarray, " T"], factor: float
) -> tuple[Integer[np.ndarray, " S"], Integer[np.ndarray, " S"]]:
    """`stretch`, and for every token it returns, the input token that it comes from; see `retime`.

    Args:
        tokens: as for `retime`.
        factor: above 0; 1.1 is a tenth slower.

    Raises:
        ValueError: `factor` is not a positive number.
        EventError: as `retime`.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"expected a stretch factor above 0, got {factor}")
    return retime(tokens, lambda steps: np.floor(steps * factor + 0.5).astype(np.int64))


def retime(
    tokens: Integer[np.ndarray, " T"], clock: Callable[[Int64[np.ndarray, " E"]], Int64[np.ndarray, " E"]]
) -> tuple[Integer[np.ndarray, " S"], Integer[np.ndarray, " S"]]:
    """Moves every event to another time, and tells of every token it returns which input token it comes from.

    Every note-on, note-off and velocity is kept; only time shifts appear and vanish. As in `encode`, a note is at least
    one step long, and of the events of one step the note-offs come first, in the order of their notes' onsets, then the
    note-ons in their order of time with their velocities. The result equals encoding the moved notes up to the
    10 ms by which the input was rounded already.

    Args:
        tokens: a canonically encoded piece, or a window cut anywhere from one. START, END and PAD may stand at its
            ends and stay there. Time counts from the window's first token. Where a window ends inside a silence of
            unknown length, so does the result.
        clock: from times in steps to times in steps; must not fall.

    Returns:
        The moved tokens, of the input's type, and their sources int64: indices into `tokens`. A time shift's source
        is that of the event that it leads to.

    Raises:
        EventError: START, END or PAD between events.
    """
    start, stop = _span_of_events(tokens)
    body = tokens[start:stop]
    shifts = is_shift(body)
    times = np.cumsum(np.where(shifts, body.astype(np.int64) - (TIME_SHIFT - 1), 0))
    events = np.flatnonzero(~shifts)
    ids = body[events]
    steps, order = _reschedule(ids, clock(times[events]))
    moved, shift_counts = _write_events(ids[order], steps)
    trailing = _trailing_shifts(body, int(clock(times[-1:]).sum()), steps)
    ends = np.arange(len(tokens))
    source = (
        ends[:start],
        start + np.repeat(events[order], shift_counts + 1),
        np.full(len(trailing), stop - 1),
        ends[stop:],
    )
    pieces = (tokens[:start], moved, trailing, tokens[stop:])
    return np.concatenate(pieces).astype(tokens.dtype, copy=False), np.concatenate(source)


def _span_of_events(tokens: np.ndarray) -> tuple[int, int]:
    """Where the events lie between START, END and PAD at the ends."""
    inner = np.flatnonzero(tokens < EVENT_CLASSES)
    if len(inner) == 0:
        return 0, 0
    start, stop = int(inner[0]), int(inner[-1]) + 1
    if len(inner) != stop - start:
        raise EventError("PAD, START or END between events; expected them only at the ends of a window.")
    return start, stop


def _reschedule(ids: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps in the order of events within them, and that order, after notes of no length are given one step."""
    steps = steps.copy()
    rank = np.arange(len(ids))
    is_off = (ids >= NOTE_OFF) & (ids < TIME_SHIFT)
    offs, ons = _pair_notes(ids)
    steps[offs] = np.maximum(steps[offs], steps[ons] + 1)
    # Offs whose note began before the window come before all others; among themselves they keep their order.
    rank[is_off] = -1
    rank[offs] = ons
    order = np.lexsort((rank, ~is_off, steps))
    return steps[order], order


def _pair_notes(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of note-offs and of the note-ons that they end: first on, first off, pitch by pitch."""
    notes = np.flatnonzero(ids < TIME_SHIFT)
    pitch = (ids[notes] % PITCHES).astype(np.uint8)  # a stable sort of bytes is a radix sort
    by_pitch = np.argsort(pitch, kind="stable")
    notes, pitch = notes[by_pitch], pitch[by_pitch]
    is_on = ids[notes] < NOTE_OFF
    if not is_on.any():
        return notes[:0], notes[:0]
    group = np.flatnonzero(np.diff(pitch, prepend=-1) != 0)
    lengths = np.diff(group, append=len(pitch))
    ons_before = np.cumsum(is_on) - is_on
    offs_before = np.arange(len(pitch)) - ons_before
    first_on, first_off = np.repeat(ons_before[group], lengths), np.repeat(offs_before[group], lengths)
    sounding = (ons_before - first_on) - (offs_before - first_off) - ~is_on
    held = np.repeat(np.maximum(0, -np.minimum.reduceat(sounding, group)), lengths)
    ordinal = offs_before - first_off - held
    ends_one = ~is_on & (ordinal >= 0)
    return notes[ends_one], notes[is_on][(first_on + ordinal)[ends_one]]


def _write_events(ids: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Events with the time shifts between them, and the number of shifts before each event."""
    gaps = np.diff(steps, prepend=0)
    counts = -(-gaps // MAX_SHIFT_STEPS)
    positions = np.cumsum(counts + 1) - 1
    tokens = np.full(len(ids) + int(counts.sum()), TIME_SHIFT + MAX_SHIFT_STEPS - 1)
    tokens[positions] = ids
    shifted = counts > 0
    tokens[positions[shifted] - 1] = TIME_SHIFT - 1 + (gaps - (counts - 1) * MAX_SHIFT_STEPS)[shifted]
    return tokens, counts


def _trailing_shifts(body: np.ndarray, end: int, steps: np.ndarray) -> np.ndarray:
    """The shifts up to the time `end` after the last event of a window that was cut before the event they lead to."""
    if len(body) == 0:
        return np.empty(0, np.int64)
    remaining = max(0, end - (int(steps[-1]) if len(steps) else 0))
    full, rest = divmod(remaining, MAX_SHIFT_STEPS)
    shifts = [TIME_SHIFT + MAX_SHIFT_STEPS - 1] * full
    # After a full shift the silence may go on beyond the window, so a rest would state a length nobody knows.
    if rest and body[-1] != TIME_SHIFT + MAX_SHIFT_STEPS - 1:
        shifts.append(TIME_SHIFT - 1 + rest)
    return np.array(shifts, np.int64)
