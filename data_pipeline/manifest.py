"""`manifest.json`: the contents of a prepared folder.

A prepared folder holds shards and one manifest. A shard is a flat `uint16` array (.npy, memory-mappable) of pieces of
one split, each as START, events, END. The manifest says where each piece starts.

A shard's name contains the start of its SHA-256, and the manifest is renamed into place last. So at any moment the
folder is either the complete old data set or the complete new one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from music_ar.files import parse_json
from music_ar.ranges import check_ranges, number, shown, whole
from music_ar.storage import PART, Folder, open_folder

SPLITS = ("train", "validation", "test")
MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1
_SHARD_NAME = re.compile(r"(?:train|validation|test)-\d{5}-[0-9a-f]{12}\.npy")


class DatasetError(ValueError):
    """Training data that cannot be used; the message names the file, what was expected and what to do."""


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """Totals of one split.

    Attributes:
        pieces: number of pieces.
        notes: number of notes.
        tokens: number of events, without START and END.
        hours: length of the music, each piece up to the end of its last note.
    """

    pieces: int = whole()
    notes: int = whole()
    tokens: int = whole()
    hours: float = number(least=0)

    def __post_init__(self) -> None:
        check_ranges(self, ValueError)


@dataclass(frozen=True, kw_only=True)
class PieceRecord:
    """One piece of a shard.

    Attributes:
        name: path of the MIDI file below the root of its data set.
        start: index of the piece's START in the shard.
        tokens: number of events, without START and END.
        notes: number of notes.
        seconds: length up to the end of the last note.
        composition: the composition, by which folds are assigned: "composer: title" if a table names it. None in data
            prepared by versions without folds.
    """

    name: str
    start: int = whole()
    tokens: int = whole()
    notes: int = whole()
    seconds: float = number(least=0)
    composition: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self, ValueError)
        if not isinstance(self.name, str) or not isinstance(self.composition, str | None):
            raise ValueError(f"a piece is called {shown(self.name)}, of the composition {shown(self.composition)}")

    @property
    def composer(self) -> str | None:
        """The composer, as the table of the data set spells it; None if it is not known."""
        composer, colon, _ = (self.composition or "").partition(": ")
        return composer if colon else None

    @property
    def title(self) -> str:
        """The title, as the table of the data set spells it; the name of the file if it is not known."""
        named = self.composition or self.name
        return named.partition(": ")[2] if self.composer is not None else named


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One shard file.

    Attributes:
        file: name of the file in the prepared folder.
        split: one of `SPLITS`.
        sha256: of the file, in hexadecimal.
        bytes: size of the file.
        tokens: length of the array, including START and END.
        pieces: its pieces, in order, without gaps.
    """

    file: str
    split: str
    sha256: str
    bytes: int = whole(least=1)
    tokens: int = whole(least=1)
    pieces: tuple[PieceRecord, ...]

    def __post_init__(self) -> None:
        check_ranges(self, ValueError)
        if not _SHARD_NAME.fullmatch(self.file) or self.split not in SPLITS:
            raise ValueError(f"shard {self.file!r} of split {self.split!r}")
        end = 0
        for piece in self.pieces:
            if piece.start != end or piece.tokens < 1:
                raise ValueError(f"piece {piece.name!r} in {self.file}: start {piece.start}, tokens {piece.tokens}")
            end = piece.start + piece.tokens + 2
        if end != self.tokens:
            raise ValueError(f"{self.file}: its pieces end at {end} of {self.tokens} tokens")

    def verified_path(self, folder: str | os.PathLike[str]) -> Path:
        """Path of the shard, fetched if the folder is remote, once the file is checked to be complete and unchanged.

        Raises:
            DatasetError: the file is missing, or its size or SHA-256 does not match the manifest.
        """
        advice = "Prepare the data again."
        path = open_folder(folder).path(self.file)
        try:
            path = open_folder(folder).local_copy(self.file)
            size = path.stat().st_size
            if size != self.bytes:
                raise DatasetError(f"{path}: expected {self.bytes} bytes, found {size}: truncated or edited. {advice}")
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DatasetError(f"{path}: cannot be read ({error.strerror}). {advice}") from error
        if digest != self.sha256:
            raise DatasetError(f"{path}: expected SHA-256 {self.sha256[:12]}…, found {digest[:12]}…: edited. {advice}")
        return path


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a prepared folder.

    Attributes:
        splits: totals of every split.
        fingerprint: of the vocabulary and encoding rules of the tokens (`music_ar.tokens.vocabulary.FINGERPRINT`).
        source: what the data was prepared from: kind, settings of the splits, and SHA-256 digests of the compositions
            and of the files' names and contents.
        skipped: name -> reason, for files that are not usable MIDI.
        shards: the shards, in order of split and piece.
        format: version of this schema.
    """

    splits: Mapping[str, SplitCounts]
    fingerprint: str
    source: Mapping[str, str]
    skipped: Mapping[str, str]
    shards: tuple[ShardRecord, ...]
    format: int = MANIFEST_FORMAT

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Read and check the manifest of a prepared folder.

        Raises:
            DatasetError: there is no manifest, it is damaged, or it has a different format.
        """
        opened = open_folder(folder)
        path = opened.path(MANIFEST_NAME)
        try:
            content = parse_json(opened.read(MANIFEST_NAME))
        except FileNotFoundError as error:
            raise DatasetError(f"{path}: no such file. Prepare the data first: `music-ar prepare`.") from error
        except OSError as error:
            raise DatasetError(f"{path}: cannot be read ({error.strerror}). Prepare the data again.") from error
        except ValueError as error:
            raise DatasetError(f"{path}: cannot be read ({error}). Prepare the data again.") from error
        found = content.get("format") if isinstance(content, dict) else None
        if found != MANIFEST_FORMAT:
            raise DatasetError(f"{path}: expected format {MANIFEST_FORMAT}, found {found!r}. Prepare the data again.")
        try:
            return _manifest_from_json(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DatasetError(f"{path}: damaged or edited ({error}). Prepare the data again.") from error

    def split_digest(self, split: str) -> str:
        """SHA-256 of the pieces of a split and of their names, in hexadecimal."""
        shards = [
            [shard.sha256, [piece.name for piece in shard.pieces]] for shard in self.shards if shard.split == split
        ]
        return text_digest(json.dumps([self.fingerprint, shards]))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the manifest atomically."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        write_file(open_folder(folder), MANIFEST_NAME, text.encode("ascii"))


def write_file(folder: Folder, name: str, content: bytes) -> None:
    """Write a file of a prepared folder atomically; `remove_stale` removes what a killed run leaves behind.

    Raises:
        DatasetError: the file cannot be written.
    """
    try:
        folder.write(name, content)
    except OSError as error:
        raise DatasetError(f"{folder.path(name)}: cannot be written ({error.strerror}).") from error


def remove_stale(folder: Folder) -> None:
    """Remove shards that the manifest does not list and the leftovers of killed runs, but no other file."""
    try:
        current = {shard.file for shard in Manifest.load(str(folder)).shards}
    except DatasetError:
        current = set()
    for name in folder.names():
        written = name.removeprefix(PART)
        is_ours = _SHARD_NAME.fullmatch(written) or written == MANIFEST_NAME
        if is_ours and name not in {MANIFEST_NAME, *current}:
            folder.remove(name)


def text_digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal; file names that are not Unicode are allowed."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _manifest_from_json(content: dict[str, Any]) -> Manifest:
    shards = tuple(
        ShardRecord(**{**shard, "pieces": tuple(PieceRecord(**piece) for piece in shard["pieces"])})
        for shard in content["shards"]
    )
    for texts in (content["source"], content["skipped"], {"fingerprint": content["fingerprint"]}):
        if not all(isinstance(text, str) for text in texts.values()):
            raise ValueError("source, skipped and fingerprint must be texts")
    splits = {split: SplitCounts(**content["splits"][split]) for split in SPLITS}
    return Manifest(**{**content, "shards": shards, "splits": splits})
