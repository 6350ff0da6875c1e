"""MIDI files -> token shards and `manifest.json`, on all cores of this machine or of a cluster.

Preparing the same files again does nothing if the shards on disk match the manifest. `manifest.py` describes how a
prepared folder is laid out and kept complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.maestro import MidiFiles, read_table
from data_pipeline.manifest import (
    SPLITS,
    DatasetError,
    Manifest,
    PieceRecord,
    ShardRecord,
    SplitCounts,
    remove_stale,
    text_digest,
    write_file,
)
from data_pipeline.splits import assign_splits, check_shares
from data_pipeline.table import read_compositions
from music_ar.cluster import Cluster
from music_ar.midi.folders import MIDI_EXTENSIONS
from music_ar.midi.io import read_midi
from music_ar.midi.performance import MidiError
from music_ar.storage import Folder, open_folder
from music_ar.system import usable_cores
from music_ar.tokens.codec import encode
from music_ar.tokens.vocabulary import END, FINGERPRINT, START, EventError

SHARD_TOKENS = 8_000_000  # 16 MB per shard; MAESTRO's training split fills three
_FILES_PER_TASK = 8  # few enough that all workers finish together, enough that messages cost little


class Prepared(NamedTuple):
    """Result of preparing a folder.

    Attributes:
        manifest: the current contents of the folder.
        was_up_to_date: whether the folder had them already, so that nothing was written.
    """

    manifest: Manifest
    was_up_to_date: bool


def prepare_maestro(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    workers: int | Cluster | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Prepared:
    """Tokenize MAESTRO with its official splits.

    Args:
        source: the official zip, or the folder it unpacks to.
        output: folder to write, or its address, created if missing. Only shards and the manifest in it are ever
            replaced.
        workers: number of processes, or a cluster, whose cores encode files that are read here; None means one process
            per usable core.
        on_progress: called with the share of files tokenized, 0 to 1.

    Raises:
        DatasetError: the archive disagrees with its table, or files in it are not usable MIDI; the message names them.
    """
    with MidiFiles(source) as files:
        pieces = read_table(files)
        splits = {piece.name: piece.split for piece in pieces}
        task = _Task(
            files=files,
            paths={piece.name: piece.path for piece in pieces},
            compositions={piece.name: piece.composition for piece in pieces},
            assign_splits=lambda names: {name: splits[name] for name in names},
            settings={"kind": "maestro", "splits": text_digest(json.dumps(sorted(splits.items())))},
            skip_unusable=False,
        )
        return _prepare(task, output, workers, on_progress)


def prepare_midi(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    table: str | os.PathLike[str] | None = None,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    workers: int | Cluster | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Prepared:
    """Tokenize every MIDI file (.mid, .midi, .kar, .rmi) of a folder (or zip) and its subfolders.

    Files are assigned to splits by a hash of their names (`splits.assign_splits`). Files that are not usable MIDI are
    skipped; the manifest's `skipped` gives the reasons. Each file is a composition of its own, unless the table names
    it.

    Args:
        folder: where the MIDI files are.
        output: folder to write, or its address, created if missing. Only shards and the manifest in it are ever
            replaced.
        table: CSV file with composers and titles; see `table.read_compositions`.
        validation: share of the files for the validation split, in [0, 1); above 0, at least one file.
        test: the same for the test split.
        seed: random seed of the split assignment.
        workers: number of processes, or a cluster, whose cores encode files that are read here; None means one process
            per usable core.
        on_progress: called with the share of files tokenized, 0 to 1.

    Raises:
        DatasetError: there is no MIDI file, none is usable, or there are too few for the splits; or the table is not
            usable.
    """
    check_shares(validation, test)
    with MidiFiles(folder) as files:
        names = files.midi_names()
        if not names:
            raise DatasetError(f"{folder}: no MIDI file ({', '.join(MIDI_EXTENSIONS)}) in it or in its subfolders.")
        task = _Task(
            files=files,
            paths={name: name for name in names},
            compositions={name: name for name in names}
            | ({} if table is None else read_compositions(Path(table), names)),
            assign_splits=lambda usable: assign_splits(usable, validation=validation, test=test, seed=seed),
            settings={"kind": "midi", "validation": str(validation), "test": str(test), "seed": str(seed)},
            skip_unusable=True,
        )
        return _prepare(task, output, workers, on_progress)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """The files to tokenize and the rules for splitting them.

    Attributes:
        files: the zip or folder they are in.
        paths: name -> path in `files`.
        compositions: name -> composition.
        assign_splits: names of the usable files -> their splits.
        settings: everything that the splits depend on, except the files themselves.
        skip_unusable: whether to leave out files that are not usable MIDI; otherwise they are an error.
    """

    files: MidiFiles
    paths: Mapping[str, str]
    compositions: Mapping[str, str]
    assign_splits: Callable[[Sequence[str]], Mapping[str, str]]
    settings: Mapping[str, str]
    skip_unusable: bool

    def source(self) -> dict[str, str]:
        """The manifest's `source`; equal sources give equal shards."""
        compositions = json.dumps(sorted(self.compositions.items()))
        contents = [f"{name}\n{self._checksum(path)}\n" for name, path in sorted(self.paths.items())]
        digests = {"compositions": text_digest(compositions), "sha256": text_digest("".join(contents))}
        return {**self.settings, **digests}

    def _checksum(self, path: str) -> str:
        try:
            return self.files.checksum(path)
        except DatasetError as error:  # it may be skipped, as any file that is not MIDI
            if not self.skip_unusable:
                raise
            return str(error)


class _Tokenized(NamedTuple):
    """A piece: `tokens` are uint16, with START and END."""

    name: str
    tokens: np.ndarray
    notes: int
    seconds: float


class _Unusable(NamedTuple):
    """A file that is not usable MIDI, and why."""

    name: str
    reason: str


def _prepare(
    task: _Task,
    output: str | os.PathLike[str],
    workers: int | Cluster | None,
    on_progress: Callable[[float], None] | None,
) -> Prepared:
    folder = _make_folder(output)
    source = task.source()
    if (existing := _up_to_date(folder, source)) is not None:
        return Prepared(existing, was_up_to_date=True)
    # All tokens are held in memory (0.3 MB per hour of music), since splits depend on which files are usable.
    results = list(_tokenize_all(task, workers, on_progress))
    skipped = {result.name: result.reason for result in results if isinstance(result, _Unusable)}
    pieces = [result for result in results if isinstance(result, _Tokenized)]
    if skipped and not (task.skip_unusable and pieces):
        reasons = describe_skipped(skipped)
        raise DatasetError(f"{task.files.path}: {len(skipped)} of {len(results)} files are not usable MIDI: {reasons}")
    splits = task.assign_splits([piece.name for piece in pieces])
    try:
        shards = _write_shards(folder, pieces, splits, task.compositions)
        counts = {split: _count(split, shards) for split in SPLITS}
        manifest = Manifest(splits=counts, fingerprint=FINGERPRINT, source=source, skipped=skipped, shards=shards)
        manifest.save(str(folder))
    finally:
        remove_stale(folder)
    return Prepared(manifest, was_up_to_date=False)


def _make_folder(output: str | os.PathLike[str]) -> Folder:
    folder = open_folder(output)
    try:
        folder.prepare()
    except OSError as error:
        raise DatasetError(f"{folder}: cannot create this folder for the shards ({error.strerror}).") from error
    return folder


def _up_to_date(folder: Folder, source: Mapping[str, str]) -> Manifest | None:
    """The manifest in `folder`, if its source and vocabulary match and every shard is complete."""
    try:
        manifest = Manifest.load(str(folder))
        if (manifest.source, manifest.fingerprint) != (source, FINGERPRINT):
            return None
        for shard in manifest.shards:
            shard.verified_path(str(folder))
    except DatasetError:
        return None
    return manifest


def describe_skipped(skipped: Mapping[str, str], limit: int = 10) -> str:
    """Names and reasons of skipped files in one line, at most `limit` of them."""
    lines = [reason if name in reason else f"{name}: {reason}" for name, reason in list(skipped.items())[:limit]]
    return "; ".join(lines) + (f"; and {len(skipped) - limit} more" if len(skipped) > limit else "")


# --- tokenizing ------------------------------------------------------------------------------------------------------


class _File(NamedTuple):
    """A file to tokenize: its bytes, or why it cannot be read."""

    name: str
    content: bytes | str


_worker_files: MidiFiles | None = None


def _start_worker(path: str) -> None:
    global _worker_files  # opened once per process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_files = MidiFiles(path)


def _end_with_parent() -> None:
    """End this worker as soon as its parent has ended, even if that was killed and could not say so."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tokenize_in_worker(name: str, path: str) -> _Tokenized | _Unusable:
    assert _worker_files is not None
    return _tokenize(_read(_worker_files, name, path))


def _read(files: MidiFiles, name: str, path: str) -> _File:
    try:
        return _File(name, files.read(path))
    except DatasetError as error:
        return _File(name, str(error))


def _tokenize(file: _File) -> _Tokenized | _Unusable:
    if isinstance(file.content, str):
        return _Unusable(file.name, file.content)
    try:
        performance = read_midi(file.content)
        events = encode(performance)
    except (MidiError, EventError) as error:
        return _Unusable(file.name, str(error))
    tokens = np.empty(len(events) + 2, np.uint16)
    tokens[0], tokens[1:-1], tokens[-1] = START, events, END
    return _Tokenized(file.name, tokens, len(performance), performance.duration_s)


def _tokenize_all(
    task: _Task, workers: int | Cluster | None, on_progress: Callable[[float], None] | None
) -> Iterator[_Tokenized | _Unusable]:
    """Results in the order of `task.paths`."""
    if isinstance(workers, Cluster):
        mapped = _map_on_ray(task.files, task.paths, workers)
    else:
        mapped = _map_files(task.files, task.paths, workers)
    with contextlib.closing(mapped) as results:
        for done, result in enumerate(results, start=1):
            if on_progress is not None:
                on_progress(done / len(task.paths))
            yield result


def _map_files(files: MidiFiles, paths: Mapping[str, str], workers: int | None) -> Generator[_Tokenized | _Unusable]:
    workers = min(workers or usable_cores(), -(-len(paths) // _FILES_PER_TASK))
    if workers <= 1:
        yield from (_tokenize(_read(files, name, path)) for name, path in paths.items())
        return
    # "spawn" exists on every platform, and "fork" is not safe with JAX's threads.
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(str(files.path),),
    ) as pool:
        try:
            yield from pool.map(_tokenize_in_worker, paths.keys(), paths.values(), chunksize=_FILES_PER_TASK)
        except BrokenProcessPool as error:
            raise DatasetError(
                f"{files.path}: a worker process was killed, most likely for want of memory; try fewer workers."
            ) from error
        finally:  # after an interrupt, workers finish the few files that they have begun
            pool.shutdown(cancel_futures=True)


def _map_on_ray(files: MidiFiles, paths: Mapping[str, str], cluster: Cluster) -> Generator[_Tokenized | _Unusable]:
    """Results in the order of the paths. The files are read here, so that no node needs them."""
    names = list(paths)
    parts = [range(first, min(first + _FILES_PER_TASK, len(names))) for first in range(0, len(names), _FILES_PER_TASK)]
    finished: dict[int, list[_Tokenized | _Unusable]] = {}
    with cluster.workers(_TokenizerOnWorker, on_each="core", at_most=len(parts)) as workers:
        items = ((part, [_read(files, names[number], paths[names[number]]) for number in part]) for part in parts)
        following = 0
        for (part, _), results, error in workers.map(items):
            if error is not None:
                raise DatasetError(f"{files.path}: {', '.join(names[number] for number in part)}: {error}.")
            finished[part.start] = results
            while following in finished:
                yield from finished.pop(following)
                following += _FILES_PER_TASK


class _TokenizerOnWorker:
    """What a worker of a cluster holds: nothing but the code."""

    def __call__(self, part: tuple[range, list[_File]]) -> list[_Tokenized | _Unusable]:
        return [_tokenize(file) for file in part[1]]


# --- writing ---------------------------------------------------------------------------------------------------------


def _write_shards(
    folder: Folder, pieces: Sequence[_Tokenized], splits: Mapping[str, str], compositions: Mapping[str, str]
) -> tuple[ShardRecord, ...]:
    shards = []
    for split in SPLITS:
        of_split = sorted((piece for piece in pieces if splits[piece.name] == split), key=lambda piece: piece.name)
        for index, of_shard in enumerate(_shard_pieces(of_split)):
            shards.append(_write_shard(folder, f"{split}-{index:05d}", split, of_shard, compositions))
    return tuple(shards)


def _shard_pieces(pieces: Iterable[_Tokenized]) -> Iterator[list[_Tokenized]]:
    """Group pieces into shards, each ending with the piece that reaches `SHARD_TOKENS`."""
    shard: list[_Tokenized] = []
    size = 0
    for piece in pieces:
        shard.append(piece)
        size += len(piece.tokens)
        if size >= SHARD_TOKENS:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _write_shard(
    folder: Folder, stem: str, split: str, pieces: Sequence[_Tokenized], compositions: Mapping[str, str]
) -> ShardRecord:
    starts = np.cumsum([0] + [len(piece.tokens) for piece in pieces]).tolist()
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate([piece.tokens for piece in pieces]))
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    name = f"{stem}-{digest[:12]}.npy"
    write_file(folder, name, content)
    records = [
        PieceRecord(
            name=piece.name,
            start=start,
            tokens=len(piece.tokens) - 2,
            notes=piece.notes,
            seconds=round(piece.seconds, 3),
            composition=compositions[piece.name],
        )
        for piece, start in zip(pieces, starts[:-1], strict=True)
    ]
    return ShardRecord(
        file=name, split=split, sha256=digest, bytes=len(content), tokens=starts[-1], pieces=tuple(records)
    )


def _count(split: str, shards: Iterable[ShardRecord]) -> SplitCounts:
    pieces = [piece for shard in shards if shard.split == split for piece in shard.pieces]
    return SplitCounts(
        pieces=len(pieces),
        notes=sum(piece.notes for piece in pieces),
        tokens=sum(piece.tokens for piece in pieces),
        hours=round(sum(piece.seconds for piece in pieces) / 3600, 4),
    )
