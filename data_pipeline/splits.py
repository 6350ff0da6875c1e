"""Assign files to train, validation and test, and compositions to folds."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

from data_pipeline.manifest import MANIFEST_NAME, DatasetError, PieceRecord, text_digest


def check_shares(validation: float, test: float) -> None:
    """Check the shares of the validation and the test split.

    Raises:
        DatasetError: a share is outside [0, 1), or nothing is left for training.
    """
    if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise DatasetError(
            f"validation and test must be shares in [0, 1) that leave files to train on; got {validation} and {test}."
        )


def assign_splits(names: Sequence[str], *, validation: float, test: float, seed: int = 0) -> dict[str, str]:
    """Split of each file, by a hash of `seed` and the file's name.

    In order of the hash, the first files go to test, the next to validation, the rest to train. So the same names give
    the same splits, whatever their order.

    Args:
        names: names of the files.
        validation: share of the validation split in [0, 1); above 0, it gets at least one file.
        test: the same for the test split.
        seed: random seed of the assignment.

    Raises:
        DatasetError: the train split would be empty.
    """
    tests = max(1, round(test * len(names))) if test else 0
    validations = max(1, round(validation * len(names))) if validation else 0
    if tests + validations >= len(names):
        raise DatasetError(
            f"The train split would be empty: {len(names)} usable MIDI files, of which {validations} for validation "
            f"and {tests} for test. Add files, or lower the shares of validation and test, to 0 if need be."
        )
    order = sorted(names, key=lambda name: text_digest(f"{seed}/{name}"))
    splits = ["test"] * tests + ["validation"] * validations + ["train"] * (len(names) - tests - validations)
    return dict(zip(order, splits, strict=True))


def assign_folds(records: Sequence[PieceRecord], count: int) -> list[int]:
    """Fold of each piece, 0 to count - 1. Folds have about the same number of tokens, and each composition is in one.

    Compositions are assigned in order of size, the largest first, each to the fold that is smallest so far. So the same
    pieces give the same folds. Titles that differ only in case, accents, spaces or punctuation count as one
    composition. Any other difference counts: a sonata and its first movement are two compositions.

    Raises:
        DatasetError: there are fewer compositions than folds, or the manifest does not name the compositions.
    """
    keys = [_composition_key(record) for record in records]
    sizes: Counter[str] = Counter()
    for key, record in zip(keys, records, strict=True):
        sizes[key] += record.tokens
    if not 1 <= count <= len(sizes):
        raise DatasetError(f"expected 1 to {len(sizes)} folds, the number of compositions; got {count}.")
    fold_of, totals = {}, [0] * count
    for key, tokens in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        fold_of[key] = totals.index(min(totals))
        totals[fold_of[key]] += tokens
    return [fold_of[key] for key in keys]


def _composition_key(record: PieceRecord) -> str:
    """Key of a composition, its letters and digits alone: MAESTRO has "Images Book II" and "Images, Book II"."""
    if record.composition is None:
        raise DatasetError(
            f"{MANIFEST_NAME}: folds need the composition of each piece, but the version that prepared this data did "
            f"not record that of {record.name}. Prepare the data again, into the same folder."
        )
    plain = unicodedata.normalize("NFKD", record.composition.casefold())
    return "".join(character for character in plain if character.isalnum())
