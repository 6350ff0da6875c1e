"""Search: the passages of an index that are most like a piece, and what the piece shares with them note by note."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from music_ar.embedding.index import Embeds, IndexedPiece, PassageIndex, directions, embed_all
from music_ar.embedding.passages import FEWEST_NOTES, PassageGrid
from music_ar.metrics.memorization import SharedRun, longest_shared_runs, melody_order
from music_ar.midi.performance import Performance
from music_ar.ranges import shown

MAX_QUERY_S = 4 * 3600.0
"""Longest piece to search for, in seconds."""
_ROWS = 64  # passages of the query that are compared at once


class SearchError(ValueError):
    """A piece that cannot be searched for; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """An indexed piece, and where it is most like the query.

    Attributes:
        piece: the indexed piece.
        number: its number in the index.
        similarity: cosine between the embeddings of the two passages: 1 is the same, 0 is unrelated.
        start_s, end_s: the passage of the indexed piece.
        query_start_s, query_end_s: the passage of the query.
    """

    piece: IndexedPiece
    number: int
    similarity: float
    start_s: float
    end_s: float
    query_start_s: float
    query_end_s: float

    def values(self) -> dict[str, Any]:
        """The match as JSON has it."""
        passages = ("start_s", "end_s", "query_start_s", "query_end_s")
        return {
            **dataclasses.asdict(self.piece),
            "similarity": self.similarity,
            **{name: round(getattr(self, name), 2) for name in passages},
        }


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Consecutive notes that two pieces share in any key and rhythm, and when they sound.

    Attributes:
        notes: number of shared notes; 0 if nothing is shared.
        start_s, end_s: onsets of the first and the last of them in the piece.
        source_start_s, source_end_s: the same in the other piece.
        source: number of the other piece.
    """

    notes: int
    start_s: float = 0.0
    end_s: float = 0.0
    source_start_s: float = 0.0
    source_end_s: float = 0.0
    source: int = 0


def likeness(encoder: Embeds, one: Performance, other: Performance) -> float | None:
    """Return how alike two pieces are: the mean cosine of the embeddings of their passages.

    Returns:
        1 at most; None if a piece has too few notes to be compared.
    """
    ours, theirs = (embed_all(encoder, list(PassageGrid().cut(piece))) for piece in (one, other))
    return float((ours @ theirs.T).mean()) if len(ours) and len(theirs) else None


def check_query(piece: Performance, cut: PassageGrid) -> None:
    """Check that a piece can be searched for.

    Raises:
        SearchError: it is too long, or has too few notes.
    """
    if piece.duration_s > MAX_QUERY_S:
        raise SearchError(
            f"the piece is {shown(round(piece.duration_s / 3600, 2))} hours long, and the longest that can be searched "
            f"for is {MAX_QUERY_S / 3600:g} hours: give a part of it"
        )
    if not len(piece):
        raise SearchError("the piece has no notes, so there is nothing to compare")
    if not len(cut.spans(piece)):
        raise SearchError(
            f"the piece has too few notes to be compared: a passage of {cut.length_s:g} s needs at least "
            f"{FEWEST_NOTES}, and it has {len(piece)} in all"
        )


def nearest(index: PassageIndex, encoder: Embeds, piece: Performance, count: int = 5) -> list[Match]:
    """Find the pieces of an index that have the passages most like any passage of a piece.

    Args:
        index: the index.
        encoder: the encoder that made it.
        piece: what to search for, cut into passages as the indexed pieces were.
        count: most pieces to return, each with its best passage.

    Returns:
        The matches, the most similar first.

    Raises:
        SearchError: the piece is too long, or has too few notes.
        PassageIndexError: the index was made with another encoder.
    """
    index.check_encoder(encoder.digest, "the index")
    check_query(piece, index.passages)
    span_s = index.passages.spans(piece)
    best, at, of = best_by_piece(index, embed_all(encoder, list(index.passages.cut(piece))))
    order = np.argsort(-best, kind="stable")[:count]
    return [
        Match(
            piece=index.pieces[index.piece[at[place]]],
            number=int(index.piece[at[place]]),
            similarity=round(float(best[place]), 4),
            start_s=float(index.span_s[at[place], 0]),
            end_s=float(index.span_s[at[place], 1]),
            query_start_s=float(span_s[of[place], 0]),
            query_end_s=float(span_s[of[place], 1]),
        )
        for place in order
    ]


def best_by_piece(index: PassageIndex, query: Float32[np.ndarray, "q e"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best pair of passages of each indexed piece: similarity, passage of the index, passage of the query."""
    vectors = directions(index.vectors)
    first = np.flatnonzero(np.diff(index.piece.astype(np.int64), prepend=-1))  # passage of each piece
    best = np.full(len(index), -np.inf, np.float32)
    of = np.zeros(len(index), np.int64)
    for row in range(0, len(query), _ROWS):
        similarity = query[row : row + _ROWS] @ vectors.T
        found = similarity.argmax(axis=0)
        highest = np.take_along_axis(similarity, found[None], axis=0)[0]
        better = highest > best
        best[better], of[better] = highest[better], found[better] + row
    ends = np.append(first[1:], len(index))
    at = np.array([start + int(best[start:end].argmax()) for start, end in zip(first, ends, strict=True)])
    return best[at], at, of[at]


def overlap_with(piece: Performance, sources: Sequence[Performance], *, repeated_patterns: bool = True) -> Overlap:
    """The longest run of notes that a piece shares with any of the sources; see `longest_shared_runs`."""
    run = longest_shared_runs([piece], sources, repeated_patterns=repeated_patterns)[0]
    return _placed(run, piece, sources) if run.notes else Overlap(notes=0)


def _placed(run: SharedRun, piece: Performance, sources: Sequence[Performance]) -> Overlap:
    source = sources[run.source]
    ours, theirs = piece.onset_s[melody_order(piece)], source.onset_s[melody_order(source)]
    return Overlap(
        notes=run.notes,
        start_s=float(ours[run.start]),
        end_s=float(ours[run.end]),
        source_start_s=float(theirs[run.source_start]),
        source_end_s=float(theirs[run.source_end]),
        source=run.source,
    )
