"""A data set in MAESTRO's official layout, made of random music, for the tests of the data pipeline."""

import csv
import io
import json
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from music_ar.midi.io import write_midi
from music_ar.midi.performance import Performance

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
    """Content of every file of the data set, by its name below the root."""
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
    """Makes the manifest of a prepared folder what versions wrote that did not record compositions."""
    path = prepared / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["source"]["compositions"]
    for shard in manifest["shards"]:
        for piece in shard["pieces"]:
            del piece["composition"]
    path.write_text(json.dumps(manifest))
