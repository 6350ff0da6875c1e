"""Composers and titles of a folder of MIDI files, from a CSV table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from data_pipeline.csv_table import read_rows
from data_pipeline.manifest import DatasetError

_NEEDED = ("file", "composer")


def read_compositions(table: Path, names: Sequence[str]) -> dict[str, str]:
    """The composition of each file that the table names: "composer: title".

    A row belongs to a file if one of their paths ends with the other, so the table may count paths from a folder above
    or below that of the files. Rows of other files, and rows without a composer, are skipped.

    Args:
        table: a CSV file with the columns file and composer. The title is that of the column title, or else the file's
            path.
        names: paths of the files, with forward slashes.

    Raises:
        DatasetError: the table is not such a file, or names none of the files.
    """
    rows = _read_rows(table)
    by_last_part: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_last_part.setdefault(PurePosixPath(row["file"]).name, []).append(row)
    found = {}
    for name in names:
        candidates = by_last_part.get(PurePosixPath(name).name, [])
        row = next((row for row in candidates if _is_same(name, row["file"])), None)
        if row is not None:
            found[name] = row
    if not found:
        raise DatasetError(
            f"{table}: none of its {len(rows)} rows names one of the {len(names)} MIDI files; expected their paths in "
            f"the column file, such as {names[0]}."
        )
    return {name: f"{row['composer']}: {row['title'] or name}" for name, row in found.items() if row["composer"]}


def _read_rows(table: Path) -> list[dict[str, str]]:
    """The columns file, composer and title of every row."""
    names = (*_NEEDED, "title")
    rows = [{name: row.get(name, "").strip() for name in names} for row in read_rows(table, _NEEDED)]
    return [row | {"file": row["file"].replace("\\", "/")} for row in rows]


def _is_same(one: str, other: str) -> bool:
    """Whether one path ends with the other."""
    shorter, longer = sorted((PurePosixPath(one).parts, PurePosixPath(other).parts), key=len)
    return longer[len(longer) - len(shorter) :] == shorter
