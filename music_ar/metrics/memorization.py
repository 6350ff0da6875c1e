"""Verbatim overlap: the longest run of notes that a piece shares with a corpus, in any key and rhythm."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt64

from music_ar.midi.performance import Performance

CHORD_S = 0.03
"""Notes that begin within this time of the previous note form a chord; their order carries no meaning."""

_INTERVALS = 255  # -127..127
_LONGEST_PATTERN = 8  # notes; scales repeat after seven
_FEWEST_REPEATED = 4  # intervals; many themes have three equal ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedRun:
    """Consecutive notes that two pieces share up to transposition, whatever their rhythm.

    Attributes:
        notes: number of shared notes, among those compared; 0 if a piece has fewer than two notes or nothing is shared.
        start: index of the first note in the piece, in the order of `melody`.
        source: index of the corpus piece.
        source_start: index of the first note in the corpus piece.
        end: index of the last note in the piece.
        source_end: index of the last note in the corpus piece.
    """

    notes: int = 0
    start: int = 0
    source: int = 0
    source_start: int = 0
    end: int = 0
    source_end: int = 0


def melody(performance: Performance) -> Int[np.ndarray, " n"]:
    """List the pitches in order of onset, the notes of a chord from low to high."""
    return performance.pitch[melody_order(performance)]


def melody_order(performance: Performance) -> Int64[np.ndarray, " n"]:
    """List the indices of the notes in the order of `melody`."""
    chord = np.cumsum(np.diff(performance.onset_s, prepend=0.0) > CHORD_S + 1e-6)
    return np.lexsort((performance.pitch, chord))


def repeats_pattern(intervals: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Mark the intervals that continue a repeated pattern: trills, tremolos, scales, accompaniment figures.

    An interval is marked if, for some period p of 1 to 8, the last p intervals up to it, and at least the last four,
    equal those p places earlier. The first occurrence of the pattern and one repetition (of at least four intervals)
    stay unmarked, so the length of a trill makes no difference.
    """
    found = np.zeros(len(intervals), bool)
    for period in range(1, _LONGEST_PATTERN + 1):
        window = max(period, _FEWEST_REPEATED)
        if len(intervals) >= period + window:
            same = np.cumsum(np.append(0, intervals[period:] == intervals[:-period]))
            found[period + window - 1 :] |= same[window:] - same[:-window] == window
    return found


def longest_shared_runs(
    pieces: Sequence[Performance], corpus: Sequence[Performance], *, repeated_patterns: bool = True
) -> list[SharedRun]:
    """Find the longest run of notes that each piece shares with any piece of the corpus, in any key.

    Runs are compared by 64-bit polynomial hashes of their intervals: the hash of any run is a difference of two running
    sums. Only places that share k - 1 intervals are searched for k, so MAESTRO's 5.7 million notes take seconds.

    Args:
        pieces: the pieces to search for.
        corpus: the pieces to search in.
        repeated_patterns: count notes that only continue a repeated pattern (`repeats_pattern`). If False, they are
            left out on both sides and the notes around them count as adjacent. A run may then span patterns of
            different lengths, so it can be longer than with them, and can change key.

    Returns:
        One run per piece.
    """
    random = np.random.default_rng(0)
    codes = random.integers(0, 2**64, _INTERVALS, np.uint64)
    base = random.integers(0, 2**63, dtype=np.uint64) * np.uint64(2) + np.uint64(1)  # odd, so that it has an inverse
    ours, theirs = (
        _Text.of(each, codes, base, random, repeated_patterns=repeated_patterns) for each in (pieces, corpus)
    )
    best = [SharedRun() for _ in pieces]
    at, source_at = ours.starts, theirs.starts
    length = 0
    while len(at) and len(source_at):
        length += 1
        hashes, source_hashes = ours.hashes(at, length), theirs.hashes(source_at, length)
        known = np.unique(hashes)
        source_kept = _is_in(source_hashes, known)
        source_at, source_hashes = source_at[source_kept], source_hashes[source_kept]
        found, first = np.unique(source_hashes, return_index=True)
        kept = _is_in(hashes, found)
        at, hashes = at[kept], hashes[kept]
        owner, one_each = np.unique(ours.owner[at], return_index=True)
        for number, place, its_hash in zip(owner, at[one_each], hashes[one_each], strict=True):
            source_place = source_at[first[np.searchsorted(found, its_hash)]]
            source = int(theirs.owner[source_place])
            best[number] = SharedRun(
                notes=length + 1,
                start=int(ours.notes[place]),
                source=source,
                source_start=int(theirs.notes[source_place]),
                end=int(ours.notes[place + length - 1]) + 1,  # an interval ends with the note after it
                source_end=int(theirs.notes[source_place + length - 1]) + 1,
            )
    return best


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Text:
    """Pieces as one sequence of interval codes, with a unique code after each piece, so that no run spans two pieces.

    Attributes:
        starts: places where a run may begin.
        owner: index of the piece at each place.
        notes: index of the note at each place, within its piece.
        sums: running sums of code times power of the base.
        unshift: powers of the base's inverse.
    """

    starts: Int64[np.ndarray, " t"]
    owner: Int64[np.ndarray, " p"]
    notes: Int64[np.ndarray, " p"]
    sums: UInt64[np.ndarray, " q"]
    unshift: UInt64[np.ndarray, " p"]

    @classmethod
    def of(
        cls,
        pieces: Sequence[Performance],
        codes: UInt64[np.ndarray, " 255"],
        base: np.uint64,
        random: np.random.Generator,
        *,
        repeated_patterns: bool,
    ) -> "_Text":
        intervals = [np.diff(melody(piece)) for piece in pieces]
        kept = [
            np.flatnonzero(np.ones(len(each), bool) if repeated_patterns else ~repeats_pattern(each))
            for each in intervals
        ]
        sizes = np.array([len(each) + 1 for each in kept], np.int64)  # the intervals and the end
        ends = np.cumsum(sizes) - 1
        text = np.zeros(int(sizes.sum()), np.uint64)
        text[ends] = random.integers(0, 2**64, len(pieces), np.uint64)
        inside = np.ones(len(text), bool)
        inside[ends] = False
        nothing, notes = np.zeros(0, np.int64), np.zeros(len(text), np.int64)
        compared = [each[of] for each, of in zip(intervals, kept, strict=True)]
        text[inside] = codes[np.concatenate([nothing, *compared]) + _INTERVALS // 2]
        notes[inside] = np.concatenate([nothing, *kept])
        inverse = np.uint64(pow(int(base), -1, 2**64))
        return cls(
            starts=np.flatnonzero(inside),
            owner=np.repeat(np.arange(len(pieces)), sizes),
            notes=notes,
            sums=np.append(np.uint64(0), np.cumsum(text * _powers(base, len(text)))),
            unshift=_powers(inverse, len(text)),
        )

    def hashes(self, at: Int64[np.ndarray, " a"], length: int) -> UInt64[np.ndarray, " a"]:
        """Hash the runs of `length` intervals from these places; at the end of the text they are shorter."""
        stop = np.minimum(at + length, len(self.sums) - 1)
        return (self.sums[stop] - self.sums[at]) * self.unshift[at]


def _powers(base: np.uint64, count: int) -> UInt64[np.ndarray, " {count}"]:
    """List the powers 0, 1, ... of the base, modulo 2 ** 64."""
    powers = np.full(count, base)
    powers[:1] = 1
    return np.cumprod(powers)


def _is_in(values: UInt64[np.ndarray, " a"], rising: UInt64[np.ndarray, " b"]) -> Bool[np.ndarray, " a"]:
    """Mark the values that occur in a sorted array; np.isin would also sort the millions of values."""
    place = np.searchsorted(rising, values)
    place[place == len(rising)] = 0
    return rising[place] == values if len(rising) else np.zeros(len(values), bool)
