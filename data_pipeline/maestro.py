"""Read MIDI files from a zip or folder, and check the official MAESTRO archive against its own table.

The archive contains one folder of MIDI files per year, and a table `maestro-vX.Y.Z.csv` with the split of every file
(Hawthorne et al., "Enabling Factorized Piano Music Modeling and Generation with the MAESTRO Dataset", ICLR 2019).
The official splits keep each composition in one split, so they are used as they are.
"""

from __future__ import annotations

import errno
import lzma
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from data_pipeline.csv_table import parse_rows
from data_pipeline.manifest import SPLITS, DatasetError
from music_ar.files import read_file
from music_ar.midi.folders import is_hidden, is_midi_name

MAX_FILE_BYTES = 64 * 2**20
_CSV_PATTERN = "maestro-*.csv"
_CSV_COLUMNS = ("canonical_composer", "canonical_title", "split", "midi_filename")


@dataclass(frozen=True, kw_only=True)
class MaestroPiece:
    """One row of the MAESTRO table.

    Attributes:
        name: path of the MIDI file below the root of the data set, with forward slashes.
        path: its path for `MidiFiles.read`; differs from `name` if the root is a folder inside the zip.
        split: one of `SPLITS`.
        composition: composer and title.
    """

    name: str
    path: str
    split: str
    composition: str


class MidiFiles:
    """The files of a data set by name, read from a zip without unpacking it, or from a folder.

    Hidden files and folders and the `__MACOSX` copies of macOS are not listed.

    Raises:
        DatasetError: there is no such zip or folder, or the zip is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._zip: zipfile.ZipFile | None = None
        if self.path.is_dir():
            self._files = dict.fromkeys(_walk(self.path))
        elif self.path.is_file():
            self._zip = _open_zip(self.path)
            self._files = {
                info.filename: info
                for info in self._zip.infolist()
                if not is_hidden(info.filename) and not info.is_dir()
            }
        else:
            raise DatasetError(f"{self.path}: no such zip or folder.")

    def __enter__(self) -> MidiFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the zip."""
        if self._zip is not None:
            self._zip.close()

    def names(self) -> list[str]:
        """Names of all listed files, sorted."""
        return sorted(self._files)

    def midi_names(self) -> list[str]:
        """Names of the MIDI files (`folders.is_midi_name`), sorted."""
        return [name for name in self.names() if is_midi_name(name)]

    def read(self, name: str) -> bytes:
        """The bytes of one file.

        Raises:
            DatasetError: the file cannot be read, or is larger than `MAX_FILE_BYTES`.
        """
        info = self._files[name]
        try:
            if self._zip is None or info is None:
                return read_file(self.path / name, max_bytes=MAX_FILE_BYTES)
            if info.file_size > MAX_FILE_BYTES:
                raise OSError(errno.EFBIG, f"it has more than {MAX_FILE_BYTES / 2**20:.4g} MB")
            return self._zip.read(name)
        except OSError as error:
            raise DatasetError(f"{name}: cannot be read ({error.strerror or error}).") from error
        # zipfile raises RuntimeError for an encrypted member, NotImplementedError for an unknown compression.
        except (EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError) as error:
            raise DatasetError(f"{name}: cannot be read ({error}).") from error

    def checksum(self, name: str) -> str:
        """Size and CRC-32 of one file, the same from a zip (read from its directory) and from the unpacked folder.

        Raises:
            DatasetError: the file cannot be read.
        """
        info = self._files[name]
        if info is not None:
            return f"{info.file_size} {info.CRC:08x}"
        content = self.read(name)
        return f"{len(content)} {zlib.crc32(content):08x}"


def read_table(files: MidiFiles) -> list[MaestroPiece]:
    """The pieces of the official MAESTRO archive in the order of its table, checked against the files present.

    Args:
        files: the archive; the table may be at its root or in a folder (the zip has `maestro-v3.0.0/`).

    Raises:
        DatasetError: there is no table or more than one, the table lacks official columns or splits, or its files are
            not exactly the MIDI files of the archive.
    """
    table = _find_table(files)
    root = PurePosixPath(table).parent
    pieces = [
        MaestroPiece(
            name=row["midi_filename"],
            path=str(root / row["midi_filename"]),
            split=row["split"],
            composition=f"{row['canonical_composer']}: {row['canonical_title']}",
        )
        for row in _parse_table(table, files.read(table))
    ]
    listed = {piece.path for piece in pieces}
    present = set(files.midi_names())
    problems = [
        _name_some("listed in the table but missing", sorted(listed - present)),
        _name_some("MIDI files not listed in the table", sorted(present - listed)),
    ]
    if any(problems):
        raise DatasetError(
            f"{files.path} does not match {table}: "
            + "; ".join(problem for problem in problems if problem)
            + ". Download or unpack the archive again, without adding or removing files."
        )
    return pieces


def _find_table(files: MidiFiles) -> str:
    tables = [name for name in files.names() if fnmatch(PurePosixPath(name).name, _CSV_PATTERN)]
    if len(tables) != 1:
        found = f"found {', '.join(tables)}" if tables else "found none"
        raise DatasetError(
            f"{files.path}: expected one MAESTRO table ({_CSV_PATTERN}), {found}. Pass the official "
            "maestro-v3.0.0-midi.zip or the folder it unpacks to; for other MIDI files, use `--midi FOLDER`."
        )
    return tables[0]


def _parse_table(table: str, content: bytes) -> list[dict[str, str]]:
    """The columns `_CSV_COLUMNS` of every row."""
    rows = [{column: row[column] for column in _CSV_COLUMNS} for row in parse_rows(table, content, _CSV_COLUMNS)]
    if not rows:
        raise DatasetError(f"{table}: no rows.")
    for row in rows:
        if row["split"] not in SPLITS:
            raise DatasetError(
                f"{table}: {row['midi_filename']!r} has split {row['split']!r}; expected one of {', '.join(SPLITS)}."
            )
    if repeated := [name for name, count in Counter(row["midi_filename"] for row in rows).items() if count > 1]:
        raise DatasetError(f"{table}: {_name_some('listed more than once', repeated)}.")
    return rows


def _name_some(what: str, names: Sequence[str], limit: int = 10) -> str:
    """List names, as in "3 missing: a, b, c", at most `limit` of them; empty without names."""
    if not names:
        return ""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} {what}: {', '.join(names[:limit])}{more}"


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{path}: neither a folder nor a readable zip ({error}).") from error


def _walk(folder: Path) -> Iterable[str]:
    for parent, _, names in os.walk(folder):
        for name in names:
            relative = (Path(parent) / name).relative_to(folder).as_posix()
            if not is_hidden(relative):
                yield relative
