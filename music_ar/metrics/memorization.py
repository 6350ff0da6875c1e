"""How much of a piece stands in other music already: the longest run of notes that they share, in any key."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt64

from music_ar.midi.performance import Performance

CHORD_S = 0.03
"""Notes that begin within this time of the one before them are a chord, and their order says nothing."""

_INTERVALS = 255  # -127..127
_LONGEST_FIGURE = 8  # notes; scales come again after seven
_FIGURE_AGAIN = 4  # fewer equal intervals say nothing: many a theme has three


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Notes in a row that two pieces share up to transposition, whatever their rhythm.

    Attributes:
        notes: how many, of those that were compared; 0 if a piece has fewer than two notes or nothing is shared.
        start: index of the first one in the piece, its notes in the order of `melody`.
        source: index of the other piece.
        source_start: index of the first one there.
    """

    notes: int = 0
    start: int = 0
    source: int = 0
    source_start: int = 0


def melody(performance: Performance) -> Int[np.ndarray, " n"]:
    """The pitches of a performance as they begin, those of a chord from the lowest up."""
    chord = np.cumsum(np.diff(performance.onset_s, prepend=0.0) > CHORD_S + 1e-6)
    return performance.pitch[np.lexsort((performance.pitch, chord))]


def goes_on(intervals: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Whether each interval only goes on with a figure: whether the last ones are those of up to eight notes before.

    The last ones are as many as the figure has, and at least four. So of a trill, a tremolo, a scale or an
    accompaniment what is not left out is the figure and once more the same, of short ones four notes more, and how long
    it lasts makes no difference.
    """
    found = np.zeros(len(intervals), bool)
    for period in range(1, _LONGEST_FIGURE + 1):
        window = max(period, _FIGURE_AGAIN)
        if len(intervals) >= period + window:
            same = np.cumsum(np.append(0, intervals[period:] == intervals[:-period]))
            found[period + window - 1 :] |= same[window:] - same[:-window] == window
    return found


def longest_runs(pieces: Sequence[Performance], corpus: Sequence[Performance], *, figures: bool = True) -> list[Run]:
    """The longest run of notes of each piece that stands somewhere in the corpus, in any key.

    Without `figures`, notes that only go on with a figure (`goes_on`) are left out on both sides, and do not count.
    What stands before and after them counts as adjacent then: a run may go on behind figures of different length, and
    be longer, and in more than one key, than with them.

    Runs are compared by 64-bit hashes of their intervals (polynomials, so that the hash of any run is a difference of
    two running sums); of k intervals only places that agreed on k - 1 are looked at again. For MAESTRO's 5.7 million
    notes that is seconds.
    """
    random = np.random.default_rng(0)
    codes = random.integers(0, 2**64, _INTERVALS, np.uint64)
    base = random.integers(0, 2**63, dtype=np.uint64) * np.uint64(2) + np.uint64(1)  # odd, so that it has an inverse
    ours, theirs = (_Text.of(each, codes, base, random, figures=figures) for each in (pieces, corpus))
    best = [Run() for _ in pieces]
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
            best[number] = Run(
                notes=length + 1,
                start=int(ours.notes[place]),
                source=source,
                source_start=int(theirs.notes[source_place]),
            )
    return best


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Text:
    """Pieces as one sequence of interval codes, with a code of its own after each: no run goes on from one to the next.

    Attributes:
        starts: places where a run may begin.
        owner: the piece of each place.
        notes: the number, in its piece, of the note that each place begins at.
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
        figures: bool,
    ) -> "_Text":
        intervals = [np.diff(melody(piece)) for piece in pieces]
        kept = [np.flatnonzero(np.ones(len(each), bool) if figures else ~goes_on(each)) for each in intervals]
        sizes = np.array([len(each) + 1 for each in kept], np.int64)  # intervals, and the end
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
        """Of the runs of `length` intervals from these places; a run cut by the end of the text is a run of less."""
        stop = np.minimum(at + length, len(self.sums) - 1)
        return (self.sums[stop] - self.sums[at]) * self.unshift[at]


def _powers(base: np.uint64, count: int) -> UInt64[np.ndarray, " {count}"]:
    """The powers 0, 1, ... of the base, modulo 2 ** 64."""
    powers = np.full(count, base)
    powers[:1] = 1
    return np.cumprod(powers)


def _is_in(values: UInt64[np.ndarray, " a"], rising: UInt64[np.ndarray, " b"]) -> Bool[np.ndarray, " a"]:
    """Which values occur among sorted ones; np.isin would sort the millions of values too."""
    place = np.searchsorted(rising, values)
    place[place == len(rising)] = 0
    return rising[place] == values if len(rising) else np.zeros(len(values), bool)
