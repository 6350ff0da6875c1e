"""Unfold note lengths into key releases and sustain pedal: the inverse of `sustain`, which folds the pedal into them.

A `Performance` says how long each note sounds. Many playings give the same sound; this module finds a likely one, in
which the pedal is down between two moments at which notes end:

- A note whose sound ends while the pedal is down would sound on, so the pedal never covers the end of a note. It may
  come up at that very moment, and then ends all notes whose keys were released before.
- A note that is struck again under the pedal ends at that onset. Such a note may end under the pedal.

So folding the result gives the same notes, whichever intervals are chosen. Which are chosen was tuned on the training
split of MAESTRO; `benchmarks/pedal.py` measures how well it agrees with pianists.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int64

_CHORD_S = 0.3
"""Notes that end together, one of them at least this long, were probably released by the pedal."""
_LONE_NOTE_S = 4.0
"""So was a single note of at least this length."""
_DELAY_S = 0.04
"""Time from the end of a single note until the pedal goes down …"""
_DELAY_AFTER_CHORD_S = 0.1
"""… and from the end of several, at which it came up."""
_SHORTEST_S = 0.1
"""Shortest time for which the pedal is worth pressing."""
_KEY_S = 0.2
"""Longest time for which a key is held when the pedal sustains its note."""


class Playing(NamedTuple):
    """How to play some notes; all times in ticks.

    Attributes:
        key_up: `int64 [n]`, when each key is released.
        pedal_down: `int64 [k]`, when the pedal goes down; no note ends at these moments.
        pedal_up: `int64 [k]`, when it comes up again, before it next goes down.
    """

    key_up: Int64[np.ndarray, " n"]
    pedal_down: Int64[np.ndarray, " k"]
    pedal_up: Int64[np.ndarray, " k"]


def unfold(
    onset: Int[np.ndarray, " n"],
    offset: Int[np.ndarray, " n"],
    pitch: Int[np.ndarray, " n"],
    ticks_per_s: float,
) -> Playing:
    """Find key releases and pedal intervals that give exactly these notes when the pedal is folded in again.

    Args:
        onset: when each note begins, in ticks.
        offset: when it stops sounding, after its onset. Notes of one pitch must not overlap.
        pitch: MIDI pitch.
        ticks_per_s: length of a tick.
    """
    onset, offset = onset.astype(np.int64), offset.astype(np.int64)
    struck_again = _ends_at_next_onset(onset, offset, pitch)
    down, up = _pedal(onset, offset, struck_again, ticks_per_s)
    return Playing(_key_releases(onset, offset, down, up, round(_KEY_S * ticks_per_s)), down, up)


def _ends_at_next_onset(
    onset: Int64[np.ndarray, " n"], offset: Int64[np.ndarray, " n"], pitch: Int[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Whether each note ends at the moment at which its pitch is struck again."""
    lane = pitch.astype(np.int64) << 40
    return np.isin(lane + offset, lane + onset)


def _pedal(
    onset: Int64[np.ndarray, " n"],
    offset: Int64[np.ndarray, " n"],
    struck_again: Bool[np.ndarray, " n"],
    ticks_per_s: float,
) -> tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"]]:
    """Choose at most one pedal interval between any two consecutive ends of notes; it lasts until the second."""
    ends, which, count = np.unique(offset[~struck_again], return_inverse=True, return_counts=True)
    if not len(ends):
        return ends, ends
    longest_s = np.zeros(len(ends))
    np.maximum.at(longest_s, which, (offset - onset)[~struck_again] / ticks_per_s)
    before = np.append(onset.min(), ends[:-1])
    delay_s = np.where(np.append(1, count[:-1]) > 1, _DELAY_AFTER_CHORD_S, _DELAY_S)
    down = before + np.maximum(np.rint(delay_s * ticks_per_s).astype(np.int64), 1)
    strikes = np.sort(offset[struck_again])
    is_struck = np.searchsorted(strikes, before, side="right") < np.searchsorted(strikes, ends)
    by_pedal = (count > 1) & (longest_s >= _CHORD_S) | (longest_s >= _LONE_NOTE_S) | is_struck
    chosen = by_pedal & (ends - down >= _SHORTEST_S * ticks_per_s)
    return down[chosen], ends[chosen]


def _key_releases(
    onset: Int64[np.ndarray, " n"],
    offset: Int64[np.ndarray, " n"],
    down: Int64[np.ndarray, " k"],
    up: Int64[np.ndarray, " k"],
    longest: int,
) -> Int64[np.ndarray, " n"]:
    """Release the keys of sustained notes early, so that a hand or a piano's action has time to strike them again."""
    # The pedal interval in which each note ends, if any; an interval holds its last moment, but not its first.
    number = np.searchsorted(up, offset)
    pressed = np.append(down, np.iinfo(np.int64).max)[number]
    early = np.maximum(onset + np.minimum(longest, (offset - onset) // 2), pressed + 1)
    return np.where(pressed < offset, np.minimum(early, offset), offset)
