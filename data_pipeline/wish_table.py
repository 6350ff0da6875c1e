"""The wishes that some training data allows: ranges of numbers, and names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from data_pipeline.dataset import Pieces
from data_pipeline.window_wishes import BEFORE, PART
from data_pipeline.windows import Windows
from music_ar.features.composers import ERAS, canonical, era_of
from music_ar.features.measured import Measured, measure
from music_ar.features.wishes import WishTable

_BUCKETS = 20
_MEASURED_WINDOWS = 3000
_LEAST_PIECES = 4  # of a composer, to learn from


def wish_table(parts: Sequence[Pieces], latents: int) -> WishTable:
    """The wishes that training data allows.

    Buckets of numbers hold equally many parts of windows each. Composers of few pieces are left out; their era is
    known.

    Args:
        parts: the data, one part for each source; numbers are measured on the first.
        latents: N, targets of a window.
    """
    records = [record for part in parts for record in part.records]
    counts = Counter(name for record in records if (name := canonical(record.composer)) is not None)
    eras = {era_of(name) for name in counts}
    return WishTable(
        edges=tuple(map(_edges, zip(*_measured(parts[0], min(PART, latents)), strict=True))),
        composers=tuple(name for name, count in counts.most_common() if count >= _LEAST_PIECES),
        eras=tuple(era for era in ERAS if era in eras),
        sources=tuple(part.source for part in parts if part.source is not None),
    )


def _measured(pieces: Pieces, targets: int) -> list[Measured]:
    """The numbers of parts from all of the data, evenly."""
    windows = Windows(pieces=pieces, context=targets + BEFORE, latents=targets, seed=0, augmentation=None)
    chosen = np.unique(np.linspace(0, len(windows) - 1, _MEASURED_WINDOWS).astype(int)).tolist()
    rng = np.random.default_rng(0)  # nothing is drawn
    return [measure(windows.augment(windows.cut(index), rng)["tokens"], BEFORE) for index in chosen]


def _edges(values: Iterable[float | None]) -> tuple[float, ...]:
    """Edges of buckets with equally many values; one bucket around a single value."""
    known = np.array([value for value in values if value is not None])
    quantiles = np.quantile(known, np.linspace(0, 1, _BUCKETS + 1)) if len(known) else np.array([0.5])
    edges = np.unique(quantiles.round(3))
    if len(edges) == 1:
        edges = edges[0] + np.array([-0.5, 0.5])
    return tuple(edges.tolist())
