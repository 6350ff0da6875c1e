"""Random music for the tests of the data pipeline: in MAESTRO's official layout, and as prepared pieces."""

import csv
import io
import json
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from data_pipeline.augmentation.mode_and_rubato import ORIGINAL
from data_pipeline.dataset import Pieces
from data_pipeline.manifest import PieceRecord
from music_ar.midi.io import write_midi
from music_ar.midi.performance import Performance
from music_ar.tokens.codec import encode
from music_ar.tokens.vocabulary import END, START

PIECES = {
    "2004/aria.midi": "train",
    "2004/bagatelle.midi": "train",
    "2006/caprice.midi": "train",
    "2006/dance.midi": "validation",
    "2018/etude.midi": "test",
}


def random_performance(seed: int, notes: int = 40) -> Performance:
    rng = np.random.default_rng(seed)
    onset_s = np.cumsum(rng.exponential(0.15, notes))
    return Performance(
        onset_s=onset_s,
        offset_s=onset_s + rng.uniform(0.02, 1.5, notes),
        pitch=rng.integers(30, 100, notes, np.int32),
        velocity=rng.integers(1, 128, notes, np.int32),
    )


def midi_bytes(seed: int, notes: int = 40) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "piece.mid"
        write_midi(random_performance(seed, notes), path)
        return path.read_bytes()


def table(pieces: dict[str, str]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["canonical_composer", "canonical_title", "split", "year", "midi_filename"])
    for name, split in pieces.items():
        writer.writerow(["Composer, A.", Path(name).stem, split, name[:4], name])
    return text.getvalue().encode()


def archive_files(pieces: dict[str, str] = PIECES) -> dict[str, bytes]:
    """Name below the root -> content, for every file of the data set."""
    files = {name: midi_bytes(seed, notes=40 + 10 * seed) for seed, name in enumerate(pieces)}
    return {**files, "maestro-v3.0.0.csv": table(pieces), "LICENSE": b"CC BY-NC-SA 4.0"}


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        target.mkdir("maestro-v3.0.0")
        for name, content in files.items():
            target.writestr(f"maestro-v3.0.0/{name}", content)
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def forget_compositions(prepared: Path) -> None:
    """Turn the manifest of a prepared folder into one of versions that did not record compositions."""
    path = prepared / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["source"]["compositions"]
    for shard in manifest["shards"]:
        for piece in shard["pieces"]:
            del piece["composition"]
    path.write_text(json.dumps(manifest))


# --- prepared pieces -------------------------------------------------------------------------------------------------

# Shorter than, as long as, and longer than a block of 8 targets; multiples and not; longer than a context of 24.
LENGTHS = (2, 5, 8, 9, 10, 16, 17, 24, 60, 101)


def pieces_of(arrays, compositions=None):
    records = [
        PieceRecord(name=str(number), start=0, tokens=len(tokens) - 2, notes=1, seconds=1.0, composition=composition)
        for number, (tokens, composition) in enumerate(
            zip(arrays, compositions or map(str, range(len(arrays))), strict=True)
        )
    ]
    return Pieces(tokens=tuple(arrays), records=tuple(records), augmentations=(ORIGINAL,) * len(records))


def numbered_pieces():
    """Pieces whose tokens are all different numbers, so that a window shows where it was cut; no number is PAD."""
    starts = 1000 + np.cumsum((0, *LENGTHS))
    return pieces_of(
        [np.arange(start, start + length, dtype=np.uint16) for start, length in zip(starts[:-1], LENGTHS, strict=True)]
    )


def random_pieces():
    """Six pieces of real events."""
    events = [encode(random_performance(seed, notes)) for seed, notes in enumerate((10, 40, 80, 160, 300, 500))]
    return pieces_of([np.array([START, *tokens, END], np.uint16) for tokens in events])
