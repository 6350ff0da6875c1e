"""Passages: overlapping windows of a piece, each embedded on its own, so that a search finds where music is alike."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from music_ar.midi.performance import Performance
from music_ar.ranges import check_ranges, number

FEWEST_NOTES = 8
"""Passages with fewer notes are left out: they say nothing about the music around them."""


@dataclass(frozen=True, kw_only=True)
class PassageGrid:
    """How a piece is cut into passages.

    Attributes:
        length_s: length of a passage, in seconds. A piece that is shorter is one passage.
        hop_s: seconds from one beginning to the next.
    """

    length_s: float = number(30.0, above=0, most=3600.0)
    hop_s: float = number(15.0, above=0, most=3600.0)

    def __post_init__(self) -> None:
        check_ranges(self, ValueError)

    def spans(self, piece: Performance) -> Float64[np.ndarray, "p 2"]:
        """Beginning and end of each passage of a piece, in seconds.

        The first passage begins with the first note. The last one ends with the piece, so it may begin less than a hop
        after the one before it. Passages with fewer than `FEWEST_NOTES` notes are left out.
        """
        if not len(piece):
            return np.zeros((0, 2))
        first_s, end_s = float(piece.onset_s[0]), piece.duration_s
        last_s = max(first_s, end_s - self.length_s)
        hops = int(np.ceil(max(0.0, last_s - first_s - 1e-9) / self.hop_s))
        begins_s = np.minimum(first_s + self.hop_s * np.arange(hops + 1), last_s)
        ends_s = np.minimum(begins_s + self.length_s, end_s)
        notes = np.searchsorted(piece.onset_s, ends_s) - np.searchsorted(piece.onset_s, begins_s)
        return np.stack([begins_s, ends_s], axis=1)[notes >= FEWEST_NOTES]

    def cut(self, piece: Performance) -> Iterator[Performance]:
        """Yield the passages of a piece, each from time zero, in the order of `spans`."""
        for begin_s, end_s in self.spans(piece):
            yield piece.crop(float(begin_s), float(end_s))
