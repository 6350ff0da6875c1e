"""The table of `music-ar train --sources`: several prepared folders, and the share of each in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.csv_table import read_rows
from data_pipeline.manifest import DatasetError
from music_ar.ranges import shown
from music_ar.storage import is_url

COLUMNS = ("source", "data", "share")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One row of the table.

    Attributes:
        name: what the model is told; None if there is only one source.
        data: the prepared folder, or its address.
        share: of the training windows; the shares of a table sum to 1.
    """

    name: str | None
    data: str
    share: float = 1.0


def read_sources(table: Path) -> list[Source]:
    """Read a CSV file with the columns source, data and share. Folders are relative to the file, addresses are not.

    Shares may be any positive numbers; they are divided by their sum.

    Raises:
        DatasetError: it is not such a file.
    """
    sources = [_source(table, number, row) for number, row in enumerate(read_rows(table, COLUMNS), start=2)]
    _check_names(table, sources)
    total = sum(source.share for source in sources)
    return [Source(name=each.name, data=each.data, share=each.share / total) for each in sources]


def _source(table: Path, line: int, row: dict[str, str]) -> Source:
    name, data, share = (row[column].strip() for column in COLUMNS)
    try:
        number = float(share)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise DatasetError(f"{table}, line {line}: share must be a number above 0, got {shown(share)}.")
    if not name or not data:
        raise DatasetError(f"{table}, line {line}: expected a name and a folder, got {shown(name)} and {shown(data)}.")
    return Source(name=name, data=data if is_url(data) else str(table.parent / data), share=number)


def _check_names(table: Path, sources: Sequence[Source]) -> None:
    names = [str(source.name) for source in sources]
    if not names:
        raise DatasetError(f"{table}: no rows; expected one for each prepared folder.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DatasetError(f"{table}: each source must have one row, {', '.join(twice)} has more.")
