"""MIDI files -> token shards and `manifest.json`, on all cores, atomically.

A prepared folder holds flat `uint16` arrays (.npy, memory-mappable), each the pieces of one split one after another as
START, events, END, and a manifest that says where every piece lies. A shard's name contains the start of its SHA-256
and the manifest is renamed into place last: at any moment the folder holds either the old data set or the new, whole.
Re-running on the same inputs does nothing once the shards on disk are found to be the manifest's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_pipeline.maestro import SPLITS, DatasetError, MidiFiles, read_table
from music_ar.files import write_atomically
from music_ar.midi.io import read_midi
from music_ar.midi.performance import MidiError
from music_ar.system import usable_cores
from music_ar.tokens.codec import encode
from music_ar.tokens.vocabulary import END, FINGERPRINT, START, EventError

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1
SHARD_TOKENS = 8_000_000  # 16 MB a shard: MAESTRO's training split makes three
_SHARD_NAME = re.compile(r"(?:train|validation|test)-\d{5}-[0-9a-f]{12}\.npy")
_TEMPORARY_SUFFIX = ".partial"
_CHUNK = 8  # files a worker takes at a time: little traffic, and an even end


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """Totals of one split. `tokens` counts events, without START and END; `hours` is music, up to each last note."""

    pieces: int
    notes: int
    tokens: int
    hours: float


@dataclass(frozen=True, kw_only=True)
class PieceRecord:
    """One piece in a shard: START at index `start`, `tokens` events, END; `seconds` up to its last note's end.

    `composition` is what is played, by which folds are cut; earlier versions did not record it.
    """

    name: str
    start: int
    tokens: int
    notes: int
    seconds: float
    composition: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One shard file of `tokens` entries, START and END included."""

    file: str
    split: str
    sha256: str
    bytes: int
    tokens: int
    pieces: tuple[PieceRecord, ...]

    def __post_init__(self) -> None:
        if not _SHARD_NAME.fullmatch(self.file) or self.split not in SPLITS:
            raise ValueError(f"shard {self.file!r} of split {self.split!r}")
        end = 0
        for piece in self.pieces:
            if piece.start != end or piece.tokens < 1:
                raise ValueError(f"piece {piece.name!r} in {self.file}: start {piece.start}, tokens {piece.tokens}")
            end = piece.start + piece.tokens + 2
        if end != self.tokens:
            raise ValueError(f"{self.file}: its pieces end at {end} of {self.tokens} tokens")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared folder holds.

    Attributes:
        splits: totals of every split.
        fingerprint: of the vocabulary and encoding rules that made the tokens (`music_ar.events.FINGERPRINT`).
        source: what it was made from: kind, settings of the splits, SHA-256 over compositions and over names and
            contents.
        skipped: name -> reason, of files that are not usable MIDI.
        shards: the files, in order of split and piece.
    """

    splits: Mapping[str, SplitCounts]
    fingerprint: str
    source: Mapping[str, str]
    skipped: Mapping[str, str]
    shards: tuple[ShardRecord, ...]
    format: int = MANIFEST_FORMAT

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Reads `manifest.json`.

        Raises:
            DatasetError: there is none, it is damaged, or it has another format.
        """
        path = Path(folder) / MANIFEST_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DatasetError(f"{path}: no such file. Prepare the data first: `music-ar prepare`.") from error
        except (OSError, ValueError) as error:
            raise DatasetError(f"{path}: cannot be read ({error}). Prepare the data again.") from error
        found = content.get("format") if isinstance(content, dict) else None
        if found != MANIFEST_FORMAT:
            raise DatasetError(f"{path}: expected format {MANIFEST_FORMAT}, found {found!r}. Prepare the data again.")
        try:
            return _manifest_from_json(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DatasetError(f"{path}: damaged or edited ({error}). Prepare the data again.") from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `manifest.json` under a temporary name and renames it."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        _write_file(Path(folder) / MANIFEST_NAME, text.encode("ascii"))


def prepare_maestro(
    source: str | os.PathLike[str], output: str | os.PathLike[str], *, workers: int | None = None, progress: bool = True
) -> Manifest:
    """Tokenises MAESTRO with its official splits.

    Args:
        source: the official zip, or the folder that it unpacks to.
        output: folder to write; made if missing. Only shards and the manifest in it are ever replaced.
        workers: processes; None means one a usable core.
        progress: whether to show a progress bar on standard error.

    Raises:
        DatasetError: the archive disagrees with its CSV, or files in it are not usable MIDI; names them.
    """
    with MidiFiles(source) as files:
        pieces = read_table(files)
        splits = {piece.name: piece.split for piece in pieces}
        job = _Job(
            paths={piece.name: piece.path for piece in pieces},
            compositions={piece.name: piece.composition for piece in pieces},
            deal=lambda names: {name: splits[name] for name in names},
            settings={"kind": "maestro", "splits": _sha256(json.dumps(sorted(splits.items())))},
            skip_bad=False,
        )
        return _prepare(files, job, output, workers=workers, progress=progress)


def prepare_midi(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Tokenises every .mid and .midi file in a folder (or zip) and the folders below it.

    Files are dealt to splits by a hash of their names and `seed`: the same files, the same splits. Files that are not
    usable MIDI are skipped; the manifest's `skipped` names them with the reason. Each file is its own composition.

    Args:
        folder: where the MIDI files are.
        output: folder to write; made if missing. Only shards and the manifest in it are ever replaced.
        validation: share of the files for the validation split, in [0, 1); at least one file if it is above 0.
        test: the same for the test split.
        seed: another number gives other splits.
        workers: processes; None means one a usable core.
        progress: whether to show a progress bar on standard error.

    Raises:
        DatasetError: no MIDI file, none usable, or too few of them for the splits asked for.
    """
    if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise DatasetError(
            f"validation and test must be shares in [0, 1) that leave files to train on; got {validation} and {test}."
        )
    with MidiFiles(folder) as files:
        names = files.midi_names()
        if not names:
            raise DatasetError(f"{folder}: no MIDI file (.mid, .midi) in it or in the folders below it.")
        job = _Job(
            paths={name: name for name in names},
            compositions={name: name for name in names},
            deal=lambda usable: assign_splits(usable, validation=validation, test=test, seed=seed),
            settings={"kind": "midi", "validation": str(validation), "test": str(test), "seed": str(seed)},
            skip_bad=True,
        )
        return _prepare(files, job, output, workers=workers, progress=progress)


def assign_splits(names: Sequence[str], *, validation: float, test: float, seed: int = 0) -> dict[str, str]:
    """Deals files to splits: ordered by a hash of (seed, name), the first go to test, the next to validation.

    Raises:
        DatasetError: nothing would be left for a split that was asked for.
    """
    tests = max(1, round(test * len(names))) if test else 0
    validations = max(1, round(validation * len(names))) if validation else 0
    if tests + validations >= len(names):
        raise DatasetError(
            f"The train split would be empty: {len(names)} usable MIDI files, of which {validations} for validation "
            f"and {tests} for test. Add files, or set the shares of validation and test lower or to 0."
        )
    order = sorted(names, key=lambda name: _sha256(f"{seed}/{name}"))
    splits = ["test"] * tests + ["validation"] * validations + ["train"] * (len(names) - tests - validations)
    return dict(zip(order, splits, strict=True))


def shard_path(folder: str | os.PathLike[str], shard: ShardRecord) -> Path:
    """Path of a shard after checking that its file is whole and unchanged.

    Raises:
        DatasetError: the file is missing, of another size, or its SHA-256 is not the manifest's.
    """
    path = Path(folder) / shard.file
    advice = "Prepare the data again."
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            raise DatasetError(f"{path}: expected {shard.bytes} bytes, found {size}: truncated or edited. {advice}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror}). {advice}") from error
    if digest != shard.sha256:
        raise DatasetError(f"{path}: expected SHA-256 {shard.sha256[:12]}…, found {digest[:12]}…: edited. {advice}")
    return path


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What to tokenise.

    Attributes:
        paths: name -> path in the `MidiFiles`.
        compositions: name -> what is played.
        deal: names of the usable files -> their splits.
        settings: all that decides about splits; with the files' contents it identifies the result.
        skip_bad: whether to go on without files that are not usable MIDI.
    """

    paths: Mapping[str, str]
    compositions: Mapping[str, str]
    deal: Callable[[Sequence[str]], Mapping[str, str]]
    settings: Mapping[str, str]
    skip_bad: bool


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """A worker's result: `tokens` uint16 with START and END, or the reason why there are none."""

    name: str
    tokens: np.ndarray | None = None
    notes: int = 0
    seconds: float = 0.0
    reason: str = ""


def _prepare(
    files: MidiFiles, job: _Job, output: str | os.PathLike[str], *, workers: int | None, progress: bool
) -> Manifest:
    console = Console(stderr=True, quiet=not progress)
    folder = _make_folder(output)
    contents = "".join(f"{name}\n{files.checksum(path)}\n" for name, path in sorted(job.paths.items()))
    compositions = _sha256(json.dumps(sorted(job.compositions.items())))
    source = {**job.settings, "compositions": compositions, "sha256": _sha256(contents)}
    if (existing := _up_to_date(folder, source)) is not None:
        console.print(f"{folder} is up to date.", highlight=False)
        return existing
    # All tokens are held in memory, 0.3 MB for an hour of music: bad files must be known before splits are dealt.
    results = list(_encode_all(files, job.paths, workers, console))
    skipped = {result.name: result.reason for result in results if result.tokens is None}
    usable = [result for result in results if result.tokens is not None]
    if skipped and not (job.skip_bad and usable):
        raise DatasetError(f"{files.path}: {len(skipped)} files are not usable MIDI: {_reasons(skipped)}")
    splits = job.deal([result.name for result in usable])
    try:
        manifest = _write(folder, usable, splits, job.compositions, source, skipped)
    finally:
        _remove_stale(folder)
    if skipped:
        console.print(f"Skipped {len(skipped)} files: {_reasons(skipped)}", markup=False, highlight=False)
    return manifest


def _up_to_date(folder: Path, source: Mapping[str, str]) -> Manifest | None:
    """The manifest in `folder` if it is of this source and vocabulary and every shard is whole."""
    try:
        manifest = Manifest.load(folder)
        if (manifest.source, manifest.fingerprint) != (source, FINGERPRINT):
            return None
        for shard in manifest.shards:
            shard_path(folder, shard)
    except DatasetError:
        return None
    return manifest


# --- tokenising ------------------------------------------------------------------------------------------------------

_worker_files: MidiFiles | None = None


def _start_worker(path: str) -> None:
    global _worker_files  # one open zip a process
    _worker_files = MidiFiles(path)


def _encode_in_worker(name: str, path: str) -> _Encoded:
    assert _worker_files is not None
    return _encode_file(_worker_files, name, path)


def _encode_file(files: MidiFiles, name: str, path: str) -> _Encoded:
    try:
        performance = read_midi(files.read(path))
        events = encode(performance)
    except (DatasetError, MidiError, EventError) as error:
        return _Encoded(name=name, reason=str(error))
    tokens = np.empty(len(events) + 2, np.uint16)
    tokens[0], tokens[1:-1], tokens[-1] = START, events, END
    return _Encoded(name=name, tokens=tokens, notes=len(performance), seconds=performance.duration_s)


def _encode_all(
    files: MidiFiles, paths: Mapping[str, str], workers: int | None, console: Console
) -> Iterator[_Encoded]:
    """Results in the order of `paths`, with a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        yield from bar.track(_map_files(files, paths, workers), total=len(paths), description="Tokenising")


def _map_files(files: MidiFiles, paths: Mapping[str, str], workers: int | None) -> Iterator[_Encoded]:
    workers = min(workers or usable_cores(), -(-len(paths) // _CHUNK))
    if workers <= 1:
        yield from (_encode_file(files, name, path) for name, path in paths.items())
        return
    # "spawn" is the one start method that every platform has and that is safe beside JAX's threads.
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(str(files.path),),
    ) as pool:
        try:
            yield from pool.map(_encode_in_worker, paths.keys(), paths.values(), chunksize=_CHUNK)
        finally:
            pool.shutdown(cancel_futures=True)


# --- writing ---------------------------------------------------------------------------------------------------------


def _write(
    folder: Path,
    usable: Sequence[_Encoded],
    splits: Mapping[str, str],
    compositions: Mapping[str, str],
    source: Mapping[str, str],
    skipped: Mapping[str, str],
) -> Manifest:
    shards = []
    for split in SPLITS:
        pieces = sorted((result for result in usable if splits[result.name] == split), key=lambda piece: piece.name)
        shards += [_write_shard(folder, split, index, part, compositions) for index, part in enumerate(_parts(pieces))]
    manifest = Manifest(
        splits={split: _count(split, shards) for split in SPLITS},
        fingerprint=FINGERPRINT,
        source=source,
        skipped=skipped,
        shards=tuple(shards),
    )
    manifest.save(folder)
    return manifest


def _parts(pieces: Iterable[_Encoded]) -> Iterator[list[_Encoded]]:
    """Pieces in parts that end with the piece that reaches `SHARD_TOKENS`."""
    part: list[_Encoded] = []
    size = 0
    for piece in pieces:
        part.append(piece)
        size += len(_tokens(piece))
        if size >= SHARD_TOKENS:
            yield part
            part, size = [], 0
    if part:
        yield part


def _tokens(piece: _Encoded) -> np.ndarray:
    assert piece.tokens is not None
    return piece.tokens


def _write_shard(
    folder: Path, split: str, index: int, pieces: Sequence[_Encoded], compositions: Mapping[str, str]
) -> ShardRecord:
    arrays = [_tokens(piece) for piece in pieces]
    starts = np.cumsum([0] + [len(tokens) for tokens in arrays]).tolist()
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate(arrays))
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    name = f"{split}-{index:05d}-{digest[:12]}.npy"
    _write_file(folder / name, content)
    return ShardRecord(
        file=name,
        split=split,
        sha256=digest,
        bytes=len(content),
        tokens=starts[-1],
        pieces=tuple(
            PieceRecord(
                name=piece.name,
                start=start,
                tokens=len(_tokens(piece)) - 2,
                notes=piece.notes,
                seconds=round(piece.seconds, 3),
                composition=compositions[piece.name],
            )
            for piece, start in zip(pieces, starts, strict=False)
        ),
    )


def _write_file(path: Path, content: bytes) -> None:
    """Writes a file of the folder; what a killed run left of one is found by its name, see `_remove_stale`."""
    try:
        write_atomically(path, content, part=path.with_name(path.name + _TEMPORARY_SUFFIX))
    except OSError as error:
        raise DatasetError(f"{path}: cannot be written ({error.strerror}).") from error


def _make_folder(output: str | os.PathLike[str]) -> Path:
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be made into a folder for the shards ({error.strerror}).") from error
    return folder


def _remove_stale(folder: Path) -> None:
    """Removes shards that the manifest does not list and what an interrupted run left; no file of another name."""
    try:
        current = {shard.file for shard in Manifest.load(folder).shards}
    except DatasetError:
        current = set()
    for path in folder.iterdir():
        written = path.name.removesuffix(_TEMPORARY_SUFFIX)
        is_ours = _SHARD_NAME.fullmatch(written) or written == MANIFEST_NAME
        if is_ours and path.name not in {MANIFEST_NAME, *current}:
            path.unlink(missing_ok=True)


def _count(split: str, shards: Iterable[ShardRecord]) -> SplitCounts:
    pieces = [piece for shard in shards if shard.split == split for piece in shard.pieces]
    return SplitCounts(
        pieces=len(pieces),
        notes=sum(piece.notes for piece in pieces),
        tokens=sum(piece.tokens for piece in pieces),
        hours=round(sum(piece.seconds for piece in pieces) / 3600, 4),
    )


def _reasons(skipped: Mapping[str, str], limit: int = 10) -> str:
    lines = [reason if name in reason else f"{name}: {reason}" for name, reason in list(skipped.items())[:limit]]
    return "; ".join(lines) + (f"; and {len(skipped) - limit} more" if len(skipped) > limit else "")


def _manifest_from_json(content: dict[str, Any]) -> Manifest:
    shards = tuple(
        ShardRecord(**{**shard, "pieces": tuple(PieceRecord(**piece) for piece in shard["pieces"])})
        for shard in content["shards"]
    )
    splits = {split: SplitCounts(**content["splits"][split]) for split in SPLITS}
    return Manifest(**{**content, "shards": shards, "splits": splits})


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
