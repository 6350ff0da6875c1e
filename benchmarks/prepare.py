"""Time the tokenization of MAESTRO, and note-seq on a sample of the same files if it is installed.

    python benchmarks/prepare.py maestro-v3.0.0-midi.zip [--workers 2] [--sample 8]

Prints a table and, as the last line, JSON. note-seq's time for all files is its time for the sample, scaled by notes.
"""

import argparse
import importlib.util
import json
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_pipeline.maestro import MidiFiles, read_table
from data_pipeline.manifest import SPLITS, Manifest
from data_pipeline.prepare import prepare_maestro


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maestro", type=Path, help="the official zip, or the folder it unpacks to")
    parser.add_argument("--workers", type=int, help="number of processes; default: one per core")
    parser.add_argument("--sample", type=int, default=8, help="number of files for note-seq")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        manifest, _ = prepare_maestro(arguments.maestro, folder, workers=arguments.workers)
        seconds = time.perf_counter() - start
    reference = note_seq_seconds(arguments.maestro, manifest, arguments.sample)
    ratio = None if reference is None else reference / seconds

    table = Table("split", "pieces", "hours", "notes", "tokens")
    for split in SPLITS:
        counts = manifest.splits[split]
        table.add_row(split, f"{counts.pieces}", f"{counts.hours:.1f}", f"{counts.notes:,}", f"{counts.tokens:,}")
    console = Console()
    console.print(table)
    console.print(f"prepare: {seconds:.1f} s with {arguments.workers or 'all'} workers")
    if reference is None:
        console.print("note-seq: not installed (python -m pip install note-seq)")
    else:
        console.print(
            f"note-seq: {reference:.0f} s, estimated from {arguments.sample} files; {ratio:.0f} times as long"
        )
    result = {
        "benchmark": "prepare",
        "seconds": round(seconds, 2),
        "workers": arguments.workers,
        "tokens": {split: manifest.splits[split].tokens for split in SPLITS},
        "note_seq_seconds": reference and round(reference, 1),
        "ratio": ratio and round(ratio, 1),
    }
    print(json.dumps(result))


def note_seq_seconds(maestro: Path, manifest: Manifest, sample: int) -> float | None:
    """Estimated time of note-seq for all files (reading, pedal, encoding); None if it is not installed."""
    if importlib.util.find_spec("note_seq") is None:
        return None
    import note_seq  # pyright: ignore[reportMissingImports]
    from note_seq.performance_lib import Performance  # pyright: ignore[reportMissingImports]

    with MidiFiles(maestro) as files:
        pieces = read_table(files)
        chosen = pieces[:: max(1, len(pieces) // sample)][:sample]
        contents = [files.read(piece.path) for piece in chosen]
    start = time.perf_counter()
    for content in contents:
        sequence = note_seq.apply_sustain_control_changes(note_seq.midi_to_note_sequence(content))
        quantized = note_seq.quantize_note_sequence_absolute(sequence, steps_per_second=100)
        Performance(quantized, num_velocity_bins=32)
    seconds = time.perf_counter() - start
    notes = {record.name: record.notes for shard in manifest.shards for record in shard.pieces}
    return seconds * sum(notes.values()) / sum(notes[piece.name] for piece in chosen)


if __name__ == "__main__":
    main()
