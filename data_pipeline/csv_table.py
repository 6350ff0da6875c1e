"""CSV files with a header, as rows of text by column."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.manifest import DatasetError
from music_ar.files import read_file


def read_rows(table: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """Read a CSV file in UTF-8, with or without a byte order mark; errors as in `parse_rows`.

    Raises:
        DatasetError: it cannot be read.
    """
    try:
        content = read_file(table)
    except OSError as error:
        raise DatasetError(f"{table}: cannot be read ({error.strerror}).") from error
    return parse_rows(str(table), content, needed, encoding="utf-8-sig")


def parse_rows(table: str, content: bytes, needed: Sequence[str], *, encoding: str = "utf-8") -> list[dict[str, str]]:
    """Return all columns of every row; missing values are empty.

    Args:
        table: its name, for errors.
        content: the file.
        needed: columns that it must have.
        encoding: of the file.

    Raises:
        DatasetError: it is not such a file.
    """
    try:
        reader = csv.DictReader(io.StringIO(content.decode(encoding), newline=""), strict=True)
        columns = reader.fieldnames or ()
        if missing := [column for column in needed if column not in columns]:
            raise DatasetError(f"{table}: expected the columns {', '.join(needed)}; found no {', '.join(missing)}.")
        return [{column: row[column] or "" for column in columns} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{table}: not a readable CSV ({error}).") from error
