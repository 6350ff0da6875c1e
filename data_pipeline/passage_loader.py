"""Passages -> shuffled, resumable batches, on grain; see `passages`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.loader import Batches, read_rows
from data_pipeline.passages import Passages


def passage_batches(
    passages: Passages, batch_size: int, *, rows: Sequence[int] | None = None, threads: int = 1, workers: int = 0
) -> Batches[dict[str, np.ndarray]]:
    """An endless iterator of batches of examples, epoch after epoch; deterministic in the seed of the passages.

    Args:
        passages: the examples.
        batch_size: B, examples in a batch.
        rows: which rows of each batch to make, in 0..B-1; None makes all. See `loader.LoaderConfig`.
        threads: see there.
        workers: see there.
    """
    own = range(batch_size) if rows is None else rows

    def read(first: int) -> Any:
        return read_rows(_Rows(passages, batch_size, own, first), len(own), threads=threads, workers=workers)

    return Batches(read, batch_size)


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of one process's batches, one after another, from batch `first` on."""

    passages: Passages
    batch_size: int
    own: Sequence[int]
    first: int

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch, number_of_row = divmod(index, len(self.own))
        return self.passages[(self.first + batch) * self.batch_size + self.own[number_of_row]]
