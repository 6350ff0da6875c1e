"""Windows over pieces that score each target once."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from music_ar.model.config import ModelConfig
from music_ar.tokens import vocabulary


class Window(NamedTuple):
    """Part of a piece that one forward pass scores.

    Attributes:
        piece: index of the piece.
        end: index of the last target in the piece.
        targets: number of targets, up to and including the last, that are scored.
    """

    piece: int
    end: int
    targets: int


def check_pieces(pieces: Sequence[np.ndarray], config: ModelConfig) -> None:
    """Raise ValueError if there are no pieces, or one has no target or a token that is not the model's."""
    if not pieces:
        raise ValueError("expected at least one piece to score, got none")
    if (shortest := min(map(len, pieces))) < 2:
        raise ValueError(f"expected pieces of at least a start and an end token, got one of length {shortest}")
    for piece in pieces:
        vocabulary.check_tokens(piece, vocabulary.VOCABULARY_SIZE if config.is_music else config.vocabulary_size)


def cut_windows(pieces: Sequence[np.ndarray], counts: Sequence[int], stride: int) -> list[Window]:
    """Return windows that score the last `counts` targets of each piece, `stride` per window."""
    return [
        Window(index, min(done + stride, last), min(stride, last - done))
        for index, (piece, count) in enumerate(zip(pieces, counts, strict=True))
        for last in [len(piece) - 1]
        for done in range(last - count, last, stride)
    ]


def batch_windows(
    pieces: Sequence[np.ndarray], windows: Sequence[Window], context: int, batch_size: int, padding: int
) -> Iterator[tuple[Sequence[Window], Int32[np.ndarray, "B M+1"]]]:
    """Yield batches of windows and their tokens: M = `context` inputs, left-padded with `padding`, and the last target.

    The last batch is filled up with copies of its first window, so that all batches have one shape.
    """
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        filled = [*batch, *[batch[0]] * (batch_size - len(batch))]
        yield batch, np.stack([_cut(pieces[window.piece], window.end, context + 1, padding) for window in filled])


def _cut(piece: np.ndarray, end: int, length: int, padding: int) -> np.ndarray:
    """Return the `length` tokens up to and including `end`, left-padded."""
    kept = piece[max(0, end + 1 - length) : end + 1]
    tokens = np.full(length, padding, np.int32)
    tokens[length - len(kept) :] = kept
    return tokens
