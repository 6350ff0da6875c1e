"""Token shards -> shuffled, weighted, resumable training batches, on grain.

**What an epoch is.** A piece of K targets (every token but its START is one) is cut into ceil(K / N) blocks of N
targets, N the latents, at an offset drawn anew for every piece and epoch. The blocks at the two ends are moved inside
the piece, so that no latent is wasted, and where blocks overlap for it, a target's weight is 1 / the number of blocks
that hold it. So every target of a split, the first event and END included, weighs exactly 1 an epoch, unlike with
random crops, which rarely reach a piece's ends.

**What a window is.** A block with the M + 1 - N tokens before it, left-padded where the piece begins later than that.

**Augmentation.** Transposition, stretch and loudness are drawn for every window, and whether a passage of its targets
is heard before. Stretching leaves a block with a few time shifts more or less, so its N latents reach a little less or
further back than the block did: a weight goes with its event, and a total of 1 an epoch then holds on average. A first
block keeps its first N targets rather than its last, so that the beginnings of pieces are never what is lost.

**Views.** What was done to a window comes with it (`variation.view`), so that a model can be told.

**Folds.** A split can be cut by composition, to train models that have not seen what they are asked about. Batches of
several folds hold an equal part of each, and each fold has epochs of its own.
"""

from __future__ import annotations

import math
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import grain
import numpy as np
from absl import flags
from jaxtyping import Float, Integer

from data_pipeline.augmentation.mode_and_rubato import AS_PLAYED, VIEW_SIZE, Variation, vary, view
from data_pipeline.augmentation.transforms import (
    Augmentation,
    foreshadow,
    louden,
    room_to_louden,
    room_to_transpose,
    stretch_with_source,
    transpose,
)
from data_pipeline.maestro import SPLITS, DatasetError
from data_pipeline.prepare import MANIFEST_NAME, Manifest, PieceRecord, ShardRecord, shard_path
from music_ar.tokens.vocabulary import END, FINGERPRINT, PAD, START


class Batch(TypedDict):
    """B windows. Inputs are `tokens[:, :-1]`, targets `tokens[:, -N:]` with their `weights`; `view`: what was done."""

    tokens: Integer[np.ndarray, "B M+1"]
    weights: Float[np.ndarray, "B N"]
    view: Float[np.ndarray, f"B {VIEW_SIZE}"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """The pieces of one split, in memory or mapped from disk.

    Attributes:
        tokens: a piece an array, each START, events, END.
        records: the manifest's record of each: name, notes, seconds, composition.
        variations: how each differs from what was played.
    """

    tokens: tuple[Integer[np.ndarray, " _"], ...]
    records: tuple[PieceRecord, ...]
    variations: tuple[Variation, ...]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], split: str) -> Pieces:
        """Maps a split of a prepared folder after checking its shards against the manifest.

        Raises:
            DatasetError: no such split, an empty one, a manifest of another vocabulary, or a shard that is missing,
                truncated or edited; names the file.
        """
        if split not in SPLITS:
            raise DatasetError(f"expected a split of {', '.join(SPLITS)}; got {split!r}.")
        manifest = Manifest.load(folder)
        if manifest.fingerprint != FINGERPRINT:
            raise DatasetError(
                f"{Path(folder) / MANIFEST_NAME}: of the event vocabulary {manifest.fingerprint[:12]}…, expected "
                f"{FINGERPRINT[:12]}…. Prepare the data again with this version."
            )
        shards = [shard for shard in manifest.shards if shard.split == split]
        if not shards:
            raise DatasetError(f"{Path(folder) / MANIFEST_NAME}: the {split} split is empty.")
        tokens = [piece for shard in shards for piece in _map_shard(folder, shard)]
        records = [record for shard in shards for record in shard.pieces]
        return cls(tokens=tuple(tokens), records=tuple(records), variations=(AS_PLAYED,) * len(records))

    @classmethod
    def join(cls, parts: Iterable[Pieces]) -> Pieces:
        """All pieces of the parts, one part after another."""
        parts = list(parts)
        return cls(
            tokens=tuple(piece for part in parts for piece in part.tokens),
            records=tuple(record for part in parts for record in part.records),
            variations=tuple(variation for part in parts for variation in part.variations),
        )

    def varied(self, seed: int) -> Pieces:
        """The same pieces, each in a variation drawn for it (`variation.vary`); they are held in memory."""
        rngs = [np.random.default_rng((seed, index)) for index in range(len(self))]
        variations = tuple(Variation.draw(rng) for rng in rngs)
        tokens = tuple(map(vary, self.tokens, variations, rngs))
        return Pieces(tokens=tokens, records=self.records, variations=variations)

    def folds(self, count: int) -> list[Pieces]:
        """Cuts the pieces into folds of about equally many tokens, each composition whole in one of them.

        The largest composition comes first, and each goes to the fold that is the smallest so far: the same pieces
        give the same folds. Titles that differ only in case, accents, spaces or punctuation are one composition;
        otherwise what MAESTRO calls differently, such as a sonata and its first movement, counts as different.

        Raises:
            DatasetError: there are fewer compositions than folds, or the manifest does not tell the compositions.
        """
        sizes: Counter[str] = Counter()
        for record in self.records:
            sizes[_composition(record)] += record.tokens
        if not 1 <= count <= len(sizes):
            raise DatasetError(f"expected at least 1 fold and at most {len(sizes)}, one a composition; got {count}.")
        fold_of, totals = {}, [0] * count
        for composition, tokens in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
            fold_of[composition] = totals.index(min(totals))
            totals[fold_of[composition]] += tokens
        chosen = [fold_of[_composition(record)] for record in self.records]
        return [self._take([index for index, fold in enumerate(chosen) if fold == number]) for number in range(count)]

    def _take(self, indices: list[int]) -> Pieces:
        return Pieces(
            tokens=tuple(self.tokens[index] for index in indices),
            records=tuple(self.records[index] for index in indices),
            variations=tuple(self.variations[index] for index in indices),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def targets(self) -> int:
        """Number of tokens that are predicted once an epoch: all but the STARTs."""
        return sum(len(tokens) - 1 for tokens in self.tokens)


def _composition(record: PieceRecord) -> str:
    """A piece's composition by its letters and digits alone: MAESTRO has "Images Book II" and "Images, Book II"."""
    if record.composition is None:
        raise DatasetError(
            f"{MANIFEST_NAME}: folds are cut by composition, and an earlier version prepared this data without saying "
            f"what {record.name} is. Prepare the data again, into the same folder."
        )
    plain = unicodedata.normalize("NFKD", record.composition.casefold())
    return "".join(character for character in plain if character.isalnum())


def _map_shard(folder: str | os.PathLike[str], shard: ShardRecord) -> list[np.ndarray]:
    path = shard_path(folder, shard)
    try:
        # A plain view: slicing np.memmap itself is slow.
        flat = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: not a readable array ({error}). Prepare the data again.") from error
    starts = np.array([piece.start for piece in shard.pieces])
    ends = np.append(starts[1:], shard.tokens) - 1
    if flat.shape != (shard.tokens,) or flat.dtype != np.uint16:
        raise DatasetError(f"{path}: expected {shard.tokens} uint16 tokens, found {flat.dtype} {flat.shape}.")
    if not ((flat[starts] == START).all() and (flat[ends] == END).all()):
        raise DatasetError(f"{path}: its pieces do not lie where the manifest says. Prepare the data again.")
    return [flat[start : end + 1] for start, end in zip(starts, ends, strict=True)]


def batches(
    *parts: Pieces,
    context: int,
    latents: int,
    batch_size: int,
    seed: int,
    augmentation: Augmentation | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 1,
    workers: int = 0,
) -> grain.DatasetIterator[Batch]:
    """An endless iterator of batches, epoch after epoch, each shuffled anew.

    Deterministic in `seed`: batch i is the same however many threads and processes make it. `get_state()` gives the
    position as a small dict for a checkpoint; `set_state` on an iterator made with the same arguments goes on exactly
    there.

    Args:
        parts: what to cut windows from. Of several, the batch of all processes together, which put theirs one after
            another, holds an equal part of each, in order.
        context: M, inputs a window.
        latents: N, targets a window; at most M.
        batch_size: B, windows a batch of this process.
        seed: in [0, 2**32).
        augmentation: what to draw for each window; None leaves them as they are.
        process_index: which of `process_count` processes this is: its batches are these windows of those of all.
        process_count: number of processes that share the epochs.
        threads: threads that prepare batches ahead; 0 prepares each when it is asked for. One makes over a million
            targets a second; more mostly wait for each other (`benchmarks/loader.py`).
        workers: processes that prepare batches, each with such threads; 0 does it in this one. For contexts so long
            that one core cannot keep up with the device. A program that asks for them needs a guarded `__main__`.
    """
    if not 1 <= latents <= context:
        raise ValueError(f"expected 1 <= latents <= context, got latents {latents} and context {context}")
    if batch_size < 1 or min(threads, workers) < 0:
        raise ValueError(f"expected batch_size >= 1 and threads, workers >= 0, got {batch_size}, {threads}, {workers}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"expected 0 <= process_index < process_count, got {process_index} of {process_count}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"expected a seed in [0, 2**32), got {seed}")
    if not parts or batch_size * process_count % len(parts):
        raise ValueError(
            f"expected batch_size * process_count in {len(parts)} equal parts, got {batch_size} * {process_count}"
        )
    shuffled = []
    for number, pieces in enumerate(parts):
        own_seed = (seed + number) % 2**32  # or parts of equal length would come in the same order
        windows = _Windows(pieces=pieces, context=context, latents=latents, seed=own_seed, augmentation=augmentation)
        # Windows are made before the shuffle, where an index is (epoch, block): what a block looks like then does not
        # depend on when, or in which process, it comes. Nothing is computed until an index is asked for.
        dataset = grain.MapDataset.range(len(windows)).map_with_index(windows.cut)
        shuffled.append(dataset.random_map(windows.finish, seed=own_seed).shuffle(own_seed).repeat())
    rows = _Rows(parts=shuffled, batch_size=batch_size, process_index=process_index, process_count=process_count)
    dataset = grain.MapDataset.source(rows).batch(batch_size, drop_remainder=True)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    batched = dataset.to_iter_dataset(options)
    if workers == 0:
        return iter(batched)
    flags.FLAGS.mark_as_parsed()  # grain reads its own from there, and this is no absl program
    return iter(batched.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)))


def windows_per_epoch(pieces: Pieces, *, latents: int) -> int:
    """Number of windows in which all processes together see every target once."""
    return sum(_block_count(len(tokens) - 1, latents) for tokens in pieces.tokens)


def _block_count(targets: int, latents: int) -> int:
    return -(-targets // latents)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """The rows of one process's batches, one after another: of its share of a batch that holds each part in order."""

    parts: list[grain.MapDataset[dict[str, np.ndarray]]]
    batch_size: int
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch, row = divmod(index, self.batch_size)
        size = self.batch_size * self.process_count // len(self.parts)
        part, row = divmod(self.process_index * self.batch_size + row, size)
        window = self.parts[part][batch * size + row]
        assert window is not None  # none is filtered out
        return window


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cut:
    """Raw tokens [T] up to a block's last target, weights [T] of these tokens as targets, and whose they are."""

    tokens: np.ndarray
    weights: np.ndarray
    is_first: bool
    variation: Variation


@dataclass(frozen=True, kw_only=True, eq=False)
class _Windows:
    """All windows of all epochs, by index: `index // len` is the epoch, `index % len` the block."""

    pieces: Pieces
    context: int
    latents: int
    seed: int
    augmentation: Augmentation | None
    first_blocks: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        counts = [_block_count(len(tokens) - 1, self.latents) for tokens in self.pieces.tokens]
        object.__setattr__(self, "first_blocks", np.cumsum([0, *counts]))

    def __len__(self) -> int:
        return int(self.first_blocks[-1])

    def cut(self, index: int, _: int = 0) -> _Cut:
        """The window at `index`, before augmentation: long enough to fill M + 1 tokens after any stretch."""
        epoch, block = divmod(index, len(self))
        piece = int(np.searchsorted(self.first_blocks, block, side="right")) - 1
        tokens = self.pieces.tokens[piece]
        starts = self._block_starts(epoch, piece)
        start = int(starts[block - self.first_blocks[piece]])
        size = min(self.latents, len(tokens) - 1)
        stop = start + size + 1  # target t is token t + 1
        low = max(0, stop - self._raw_length())
        return _Cut(
            tokens=tokens[low:stop].astype(np.int32),
            weights=_target_weights(starts, size, low, stop),
            is_first=start == 0,
            variation=self.pieces.variations[piece],
        )

    def finish(self, cut: _Cut, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Draws the augmentation, applies it, and pads to M + 1 tokens and N weights."""
        tokens, weights = cut.tokens, cut.weights
        semitones, factor, louder = 0, 1.0, 0
        if self.augmentation is not None:
            semitones, factor, louder = self.augmentation.draw(rng)
            semitones, louder = room_to_transpose(tokens, semitones), room_to_louden(tokens, louder)
            tokens, source = stretch_with_source(louden(transpose(tokens, semitones), louder), factor)
            weights = weights[source]
        if cut.is_first:
            tokens, weights = tokens[: self.latents + 1], weights[: self.latents + 1]
        if self.augmentation is not None and rng.random() < self.augmentation.returns:
            tokens = self._with_return(tokens[-(self.context + 1) :], rng)
        return {
            "tokens": _last(tokens, self.context + 1, PAD),
            "weights": _last(weights, self.latents, 0),
            "view": view(semitones, factor, louder, cut.variation),
        }

    def _with_return(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The window with a passage of its targets heard before, among the inputs that are not latents."""
        assert self.augmentation is not None
        first = len(tokens) - self.latents  # of the targets
        size = int(rng.integers(min(64, self.latents), min(512, self.latents), endpoint=True))
        if first < size:
            return tokens
        start = int(rng.integers(first, len(tokens) - size, endpoint=True))
        at = int(rng.integers(int(tokens[0] == START), first - size, endpoint=True))
        _, factor, louder = self.augmentation.draw(rng)
        varied = foreshadow(tokens, slice(start, start + size), at, factor, louder)
        return np.concatenate([varied[:first], tokens[first:]])

    def _block_starts(self, epoch: int, piece: int) -> np.ndarray:
        """First target of each block of a piece: N apart from a random offset, the ends moved inside."""
        targets = len(self.pieces.tokens[piece]) - 1
        count = _block_count(targets, self.latents)
        slack = count * self.latents - targets
        offset = np.random.default_rng((self.seed, epoch, piece)).integers(0, slack, endpoint=True)
        last = max(0, targets - self.latents)
        return np.clip(np.arange(count) * self.latents - offset, 0, last)

    def _raw_length(self) -> int:
        """M + 1 tokens, and as many more as the strongest compression of time may take away."""
        shortest = 1.0 if self.augmentation is None else self.augmentation.min_stretch
        return math.ceil((self.context + 1) / shortest)


def _target_weights(starts: np.ndarray, size: int, low: int, stop: int) -> np.ndarray:
    """For tokens low..stop-1: 1 / the number of blocks of `size` targets that hold the token, or 0 if none does."""
    changes = np.zeros(stop - low + 1, np.int32)
    np.add.at(changes, np.clip(starts + 1 - low, 0, stop - low), 1)
    np.subtract.at(changes, np.clip(starts + 1 + size - low, 0, stop - low), 1)
    coverage = np.cumsum(changes[:-1])
    return np.where(coverage > 0, 1 / np.maximum(coverage, 1), 0).astype(np.float32)


def _last(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    """The last `length` values, with `fill` before them where there are fewer."""
    kept = values[-length:]
    padded = np.full(length, fill, values.dtype)
    padded[length - len(kept) :] = kept
    return padded
