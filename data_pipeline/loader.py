"""Training windows -> shuffled, resumable batches, on grain.

`windows.py` defines windows and epochs. Every epoch is shuffled differently. Batches of several parts, such as folds,
contain an equal share of each part, and each part has its own epochs.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NotRequired, TypedDict, TypeVar

import grain
import numpy as np
from absl import flags
from jaxtyping import Float, Integer

from data_pipeline.augmentation.mode_and_rubato import LABEL_SIZE
from data_pipeline.augmentation.transforms import Augmentation
from data_pipeline.dataset import Pieces
from data_pipeline.gaps import Gaps
from data_pipeline.window_wishes import WindowWishes
from data_pipeline.windows import Window, Windows

B = TypeVar("B")


class Batch(TypedDict):
    """B windows. Inputs are `tokens[:, :-1]`; targets are `tokens[:, -N:]`, weighted by `weights`.

    `labels` say how each window was augmented (`augmentation_label`), so that a model can be conditioned on it.
    `wishes` are the ids of the wishes of equal parts of each window's targets, for a model that takes wishes.
    """

    tokens: Integer[np.ndarray, "B M+1"]
    weights: Float[np.ndarray, "B N"]
    labels: Float[np.ndarray, f"B {LABEL_SIZE}"]
    wishes: NotRequired[Integer[np.ndarray, "B P W"]]


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How batches are put together.

    Attributes:
        context: M, number of inputs of a window.
        latents: N, number of targets of a window; at most M.
        batch_size: B, number of windows in a batch.
        seed: random seed in [0, 2**32).
        augmentation: what to draw for each window; None leaves windows as they are.
        wishes: gives windows their wishes; None for a model that takes none.
        shares: share of a part, and of each dataset mixed with it, in the windows of the part. Default: the part alone.
        rows: which rows of each batch to make, in 0..B-1. Processes that share the batches make different rows of the
            same ones. None makes all.
        gaps: which windows are re-ordered, to train a model to fill gaps; None for none.
        threads: threads that prepare batches ahead; 0 prepares a batch when it is requested. One thread delivers over a
            million targets per second; more of them mostly wait for each other (`benchmarks/loader.py`).
        workers: worker processes that prepare batches, with `threads` threads each; 0 uses this process. Needed for
            contexts so long that one core cannot keep up with the device. The program must then guard its `__main__`.
    """

    context: int
    latents: int
    batch_size: int
    seed: int
    augmentation: Augmentation | None = None
    wishes: WindowWishes | None = None
    shares: tuple[float, ...] | None = None
    rows: tuple[int, ...] | None = None
    gaps: Gaps | None = None
    threads: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.latents <= self.context:
            raise ValueError(f"expected 1 <= latents <= context, got latents {self.latents} and context {self.context}")
        if self.gaps is not None and not self.latents <= self.gaps.context <= self.context:
            raise ValueError(f"expected gaps with a context of {self.latents}..{self.context}, got {self.gaps.context}")
        if self.batch_size < 1:
            raise ValueError(f"expected a batch_size of at least 1, got {self.batch_size}")
        if min(self.threads, self.workers) < 0:
            raise ValueError(f"expected threads and workers of at least 0, got {self.threads} and {self.workers}")
        if self.rows is not None and not (self.rows and all(0 <= row < self.batch_size for row in self.rows)):
            raise ValueError(f"expected rows in 0..{self.batch_size - 1}, at least one, got {list(self.rows)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"expected a seed in [0, 2**32), got {self.seed}")


def batches(*parts: Pieces, beside: Sequence[Pieces] = (), config: LoaderConfig) -> Batches[Batch]:
    """An endless iterator of batches, epoch after epoch.

    Deterministic in `config.seed`: batch i is the same for any number of threads and workers, and a row of it for any
    choice of rows.

    Args:
        parts: the pieces to cut windows from. With several parts, a batch contains as many windows of each, in order.
        beside: datasets that each part is mixed with, evenly, by `config.shares`.
        config: sizes, seed, augmentation and parallelism.

    Raises:
        ValueError: the batch cannot be divided into equal parts, or there is not a share for a part and each dataset.
    """
    numbers = itertools.count()
    windows = [_shuffled_windows(pieces, next(numbers), config) for pieces in parts]
    if config.shares is not None or beside:
        shares = config.shares or ()
        if len(shares) != 1 + len(beside):
            raise ValueError(
                f"expected {1 + len(beside)} shares, of a part and what is beside it, got {len(shares)}; set "
                "LoaderConfig.shares"
            )
        others = [[_shuffled_windows(pieces, next(numbers), config) for pieces in beside] for _ in parts]
        windows = [grain.MapDataset.mix([part, *mixed], shares) for part, mixed in zip(windows, others, strict=True)]
    if not windows or config.batch_size % len(windows):
        raise ValueError(f"expected a batch_size that divides into {len(windows)} equal parts, got {config.batch_size}")

    def read(first: int) -> grain.DatasetIterator[Batch]:
        rows = _Rows(parts=windows, config=config, first=first)
        return read_rows(rows, len(rows.of_batch), threads=config.threads, workers=config.workers)

    return Batches(read, config.batch_size)


class Batches(Generic[B]):
    """An endless iterator of batches whose position can be saved.

    The position counts examples of all processes together, so a run may continue with other rows in each process, and
    with any number of threads and workers.
    """

    def __init__(self, read: Callable[[int], grain.DatasetIterator[B]], batch_size: int):
        self._read, self._batch_size, self._next = read, batch_size, 0
        self._reader: grain.DatasetIterator[B] | None = None

    def __iter__(self) -> Batches[B]:
        return self

    def __next__(self) -> B:
        if self._reader is None:
            self._reader = self._read(self._next)
        batch = next(self._reader)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Return the position, for a checkpoint."""
        return {"examples": self._next * self._batch_size}

    def set_state(self, state: dict[str, Any]) -> None:
        """Move to a position that `get_state` returned for the same arguments, except rows, threads and workers."""
        # Earlier versions counted batches.
        self._next = state["next_index"] if "next_index" in state else state["examples"] // self._batch_size
        self._reader = None


def read_rows(rows: Any, size: int, *, threads: int, workers: int) -> grain.DatasetIterator[Any]:
    """Batch rows, `size` at a time.

    Args:
        rows: a random-access source of dicts of arrays, one after another.
        size: rows in a batch.
        threads: see `LoaderConfig`.
        workers: see `LoaderConfig`.
    """
    dataset = grain.MapDataset.source(rows).batch(size, drop_remainder=True)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    batched = dataset.to_iter_dataset(options)
    if workers == 0:
        return iter(batched)
    flags.FLAGS.mark_as_parsed()  # grain reads absl flags, and this is not an absl program
    return iter(batched.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)))


def _shuffled_windows(pieces: Pieces, number: int, config: LoaderConfig) -> grain.MapDataset[Window]:
    """The windows of part `number`, in the order of training."""
    seed = (config.seed + number) % 2**32  # otherwise parts of equal length would come in the same order
    windows = Windows(
        pieces=pieces,
        context=config.context,
        latents=config.latents,
        seed=seed,
        augmentation=config.augmentation,
        wishes=config.wishes,
        gaps=config.gaps,
    )
    # Windows are cut before the shuffle, where an index is (epoch, block), so that a window does not depend on when or
    # in which process it is requested. Nothing is computed until then.
    dataset = grain.MapDataset.range(len(windows)).map_with_index(lambda index, _: windows.cut(index))
    return dataset.random_map(windows.augment, seed=seed).shuffle(seed).repeat()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """The rows of one process's batches, one after another, from batch `first` on.

    Row r of a batch belongs to part `r // size`, where `size` is the number of rows of a part.
    """

    parts: list[grain.MapDataset[Window]]
    config: LoaderConfig
    first: int

    @property
    def of_batch(self) -> Sequence[int]:
        """The rows of each batch that this process makes."""
        return range(self.config.batch_size) if self.config.rows is None else self.config.rows

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Window:
        batch, number = divmod(index, len(self.of_batch))
        size = self.config.batch_size // len(self.parts)
        part, row = divmod(self.of_batch[number], size)
        window = self.parts[part][(self.first + batch) * size + row]
        assert window is not None  # nothing is filtered out
        return window
