"""The pieces of a prepared split, their folds and their augmented copies."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from data_pipeline.augmentation.mode_and_rubato import ORIGINAL, PieceAugmentation, augmented_copy
from data_pipeline.manifest import MANIFEST_NAME, SPLITS, DatasetError, Manifest, PieceRecord, ShardRecord
from data_pipeline.splits import assign_folds
from music_ar.storage import open_folder
from music_ar.tokens.vocabulary import END, EVENT_CLASSES, FINGERPRINT, START


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """Pieces of one split, in memory or mapped from disk.

    Attributes:
        tokens: one array per piece: START, events, END.
        records: the manifest's record of each piece: name, notes, seconds, composition.
        augmentations: how each piece differs from the recorded performance.
        source: name of the part of the training data that they come from, if it has several.
    """

    tokens: tuple[Integer[np.ndarray, " _"], ...]
    records: tuple[PieceRecord, ...]
    augmentations: tuple[PieceAugmentation, ...]
    source: str | None = None

    @classmethod
    def open(cls, folder: str | os.PathLike[str], split: str, *, source: str | None = None) -> Pieces:
        """Map a split of a prepared folder, after checking its shards against the manifest.

        Args:
            folder: the folder.
            split: one of `SPLITS`.
            source: see the class.

        Raises:
            DatasetError: the split is unknown or empty, the manifest has a different vocabulary, or a shard is missing,
                truncated or edited; the message names the file.
        """
        if split not in SPLITS:
            raise DatasetError(f"expected one of the splits {', '.join(SPLITS)}; got {split!r}.")
        manifest, where = Manifest.load(folder), open_folder(folder).path(MANIFEST_NAME)
        if manifest.fingerprint != FINGERPRINT:
            raise DatasetError(
                f"{where}: expected the event vocabulary {FINGERPRINT[:12]}…, found "
                f"{manifest.fingerprint[:12]}…. Prepare the data again with this version."
            )
        shards = [shard for shard in manifest.shards if shard.split == split]
        if not shards:
            raise DatasetError(f"{where}: the {split} split is empty.")
        tokens = [piece for shard in shards for piece in _map_shard(folder, shard)]
        records = [record for shard in shards for record in shard.pieces]
        originals = (ORIGINAL,) * len(records)
        return cls(tokens=tuple(tokens), records=tuple(records), augmentations=originals, source=source)

    @classmethod
    def join(cls, parts: Iterable[Pieces]) -> Pieces:
        """All pieces of the parts, which have the same source, one part after another."""
        parts = list(parts)
        return cls(
            tokens=tuple(tokens for part in parts for tokens in part.tokens),
            records=tuple(record for part in parts for record in part.records),
            augmentations=tuple(augmentation for part in parts for augmentation in part.augmentations),
            source=parts[0].source if parts else None,
        )

    def augmented_copies(self, seed: int) -> Pieces:
        """One augmented copy of each piece, with random mode, dynamics and rubato; copies are held in memory."""
        rngs = [np.random.default_rng((seed, index)) for index in range(len(self))]
        augmentations = tuple(PieceAugmentation.draw(rng) for rng in rngs)
        tokens = tuple(map(augmented_copy, self.tokens, augmentations, rngs))
        return Pieces(tokens=tokens, records=self.records, augmentations=augmentations, source=self.source)

    def folds(self, count: int) -> list[Pieces]:
        """Divide the pieces into folds, each composition in one of them (`splits.assign_folds`).

        Raises:
            DatasetError: there are fewer compositions than folds, or the manifest does not name the compositions.
        """
        assigned = assign_folds(self.records, count)
        return [self._take([index for index, fold in enumerate(assigned) if fold == number]) for number in range(count)]

    def _take(self, indices: list[int]) -> Pieces:
        return Pieces(
            tokens=tuple(self.tokens[index] for index in indices),
            records=tuple(self.records[index] for index in indices),
            augmentations=tuple(self.augmentations[index] for index in indices),
            source=self.source,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def targets(self) -> int:
        """Number of training targets: all tokens but the STARTs."""
        return sum(len(tokens) - 1 for tokens in self.tokens)


def _map_shard(folder: str | os.PathLike[str], shard: ShardRecord) -> list[np.ndarray]:
    path = shard.verified_path(folder)
    try:
        # A plain view, because slicing np.memmap itself is slow.
        flat = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise DatasetError(f"{path}: not a readable array ({error}). Prepare the data again.") from error
    starts = np.array([piece.start for piece in shard.pieces])
    ends = np.append(starts[1:], shard.tokens) - 1
    if flat.shape != (shard.tokens,) or flat.dtype != np.uint16:
        raise DatasetError(f"{path}: expected {shard.tokens} uint16 tokens, found {flat.dtype} {flat.shape}.")
    if not ((flat[starts] == START).all() and (flat[ends] == END).all()):
        raise DatasetError(f"{path}: its pieces are not where the manifest says. Prepare the data again.")
    if np.count_nonzero(flat >= EVENT_CLASSES) != 2 * len(starts):  # the STARTs and ENDs
        raise DatasetError(f"{path}: it has tokens that are no events. Prepare the data again.")
    return [flat[start : end + 1] for start, end in zip(starts, ends, strict=True)]
