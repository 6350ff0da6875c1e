"""Training windows -> shuffled, resumable batches, on grain.

`windows.py` defines windows and epochs. Every epoch is shuffled differently. Batches of several parts, such as folds,
contain an equal share of each part, and each part has its own epochs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TypedDict

import grain
import numpy as np
from absl import flags
from jaxtyping import Float, Integer

from data_pipeline.augmentation.mode_and_rubato import LABEL_SIZE
from data_pipeline.augmentation.transforms import Augmentation
from data_pipeline.dataset import Pieces
from data_pipeline.gaps import Gaps
from data_pipeline.windows import Window, Windows


class Batch(TypedDict):
    """B windows. Inputs are `tokens[:, :-1]`; targets are `tokens[:, -N:]`, weighted by `weights`.

    `labels` say how each window was augmented (`augmentation_label`), so that a model can be conditioned on it.
    """

    tokens: Integer[np.ndarray, "B M+1"]
    weights: Float[np.ndarray, "B N"]
    labels: Float[np.ndarray, f"B {LABEL_SIZE}"]


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How batches are put together.

    Attributes:
        context: M, number of inputs of a window.
        latents: N, number of targets of a window; at most M.
        batch_size: B, number of windows in a batch of this process.
        seed: random seed in [0, 2**32).
        augmentation: what to draw for each window; None leaves windows as they are.
        gaps: which windows are re-ordered, to train a model to fill gaps; None for none.
        process_index: number of this process among the `process_count` that share the epochs.
        process_count: number of processes that share the epochs, each with its own batches.
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
    gaps: Gaps | None = None
    process_index: int = 0
    process_count: int = 1
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
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"expected 0 <= process_index < process_count, got {self.process_index} of {self.process_count}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"expected a seed in [0, 2**32), got {self.seed}")


def batches(*parts: Pieces, config: LoaderConfig) -> grain.DatasetIterator[Batch]:
    """An endless iterator of batches, epoch after epoch.

    Deterministic in `config.seed`: batch i is the same for any number of threads and workers. `get_state()` returns the
    position as a small dict, for a checkpoint; `set_state` on an iterator with the same arguments continues there.

    Args:
        parts: the pieces to cut windows from. With several parts, the global batch (those of all processes, one after
            another) contains an equal share of each part, in order.
        config: sizes, seed, augmentation and parallelism.

    Raises:
        ValueError: the global batch cannot be divided into equal shares.
    """
    if not parts or config.batch_size * config.process_count % len(parts):
        raise ValueError(
            f"expected a batch_size * process_count that divides into {len(parts)} equal shares, got "
            f"{config.batch_size} * {config.process_count}"
        )
    rows = _Rows(
        parts=[_shuffled_windows(pieces, number, config) for number, pieces in enumerate(parts)], config=config
    )
    dataset = grain.MapDataset.source(rows).batch(config.batch_size, drop_remainder=True)
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=4 * config.threads)
    batched = dataset.to_iter_dataset(options)
    if config.workers == 0:
        return iter(batched)
    flags.FLAGS.mark_as_parsed()  # grain reads absl flags, and this is not an absl program
    return iter(batched.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers)))


def _shuffled_windows(pieces: Pieces, number: int, config: LoaderConfig) -> grain.MapDataset[Window]:
    """The windows of part `number`, in the order of training."""
    seed = (config.seed + number) % 2**32  # otherwise parts of equal length would come in the same order
    windows = Windows(
        pieces=pieces,
        context=config.context,
        latents=config.latents,
        seed=seed,
        augmentation=config.augmentation,
        gaps=config.gaps,
    )
    # Windows are cut before the shuffle, where an index is (epoch, block), so that a window does not depend on when or
    # in which process it is requested. Nothing is computed until then.
    dataset = grain.MapDataset.range(len(windows)).map_with_index(lambda index, _: windows.cut(index))
    return dataset.random_map(windows.augment, seed=seed).shuffle(seed).repeat()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """The rows of one process's batches, one after another.

    Row r of the global batch belongs to part `r // size`, where `size` is the number of rows of a part.
    """

    parts: list[grain.MapDataset[Window]]
    config: LoaderConfig

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Window:
        batch, row = divmod(index, self.config.batch_size)
        size = self.config.batch_size * self.config.process_count // len(self.parts)
        part, row = divmod(self.config.process_index * self.config.batch_size + row, size)
        window = self.parts[part][batch * size + row]
        assert window is not None  # nothing is filtered out
        return window
