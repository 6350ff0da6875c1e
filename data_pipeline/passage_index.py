"""Index the passages of a prepared split (`music_ar.embedding.index`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np

from data_pipeline.dataset import Pieces
from data_pipeline.manifest import Manifest
from music_ar.embedding.index import Embeds, IndexedPiece, PassageIndex
from music_ar.embedding.passages import PassageGrid
from music_ar.midi.performance import Performance
from music_ar.tokens.codec import decode


def index_split(
    data: str | os.PathLike[str],
    split: str,
    encoder: Embeds,
    *,
    passages: PassageGrid | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> PassageIndex:
    """Embed all passages of a prepared split.

    Args:
        data: the prepared folder, or its address.
        split: one of `manifest.SPLITS`.
        encoder: makes the embeddings.
        passages: how to cut pieces.
        on_progress: called with the share of the music that is done, 0 to 1.

    Raises:
        DatasetError: the data cannot be used.
        PassageIndexError: no piece has a passage with enough notes.
    """
    pieces = Pieces.open(data, split)
    done_s = np.cumsum([record.seconds for record in pieces.records])

    def report(done: int) -> None:
        if on_progress is not None:
            on_progress(float(done_s[done - 1] / max(done_s[-1], 1e-9)))

    return PassageIndex.build(
        encoder,
        _named(pieces),
        data=Manifest.load(data).split_digest(split),
        split=split,
        passages=passages,
        on_progress=report,
    )


def _named(pieces: Pieces) -> Iterator[tuple[IndexedPiece, Performance]]:
    for record, tokens in zip(pieces.records, pieces.tokens, strict=True):
        yield IndexedPiece(name=record.name, title=record.title, composer=record.composer), decode(tokens)
