"""Compare the pedal that `write_midi(..., pedal=True)` finds with the pianists' own, and check that it plays the same.

    python benchmarks/pedal.py maestro-v3.0.0-midi.zip [--split validation]

Each piece is encoded and decoded, which leaves its notes with the pedal folded into their lengths, as in a generated
piece. Then it is written with the pedal. Precision, recall and F1 are of the time for which the pedal is down (sustain
controller at 64 or more), over all pieces of the split. Prints a table and, last, a line of JSON.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from data_pipeline.maestro import MidiFiles, read_table
from data_pipeline.manifest import SPLITS
from music_ar import decode, encode, read_midi, write_midi
from music_ar.midi.raw_events import CONTROL, RawFile
from music_ar.midi.sustain import PEDAL_DOWN_VALUE, SUSTAIN_CONTROLLER

RATE = 1000  # frames per second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maestro", type=Path, help="the official zip or the unpacked folder")
    parser.add_argument("--split", choices=SPLITS, default="validation")
    arguments = parser.parse_args()

    both_s = found_s = played_s = 0.0
    pieces = different = 0
    with MidiFiles(arguments.maestro) as files:
        for piece in read_table(files):
            if piece.split != arguments.split:
                continue
            pieces += 1
            data, written = files.read(piece.path), io.BytesIO()
            notes = decode(encode(read_midi(data)))
            write_midi(notes, written, pedal=True)
            different += not np.array_equal(encode(read_midi(written.getvalue())), encode(notes))
            played, found = pedal_down(data), pedal_down(written.getvalue())
            length = min(len(played), len(found))
            both_s += (played[:length] & found[:length]).sum() / RATE
            played_s, found_s = played_s + played.sum() / RATE, found_s + found.sum() / RATE

    precision, recall = both_s / found_s, both_s / played_s
    f1 = 2 * precision * recall / (precision + recall)
    table = Table("split", "pieces", "hours down", "precision", "recall", "F1", "played differently")
    row = (precision, recall, f1)
    table.add_row(
        arguments.split,
        str(pieces),
        f"{played_s / 3600:.1f}",
        *(f"{value:.3f}" for value in row),
        str(different),
    )
    Console().print(table)
    measured = dict(zip(("precision", "recall", "f1"), (round(value, 4) for value in row), strict=True))
    print(
        json.dumps(
            {"benchmark": "pedal", "split": arguments.split, "pieces": pieces, **measured, "different": different}
        )
    )


def pedal_down(midi: bytes) -> np.ndarray:
    """Whether the pedal is down in each frame of a file."""
    file = RawFile.parse(midi)
    events = sorted(
        (event.tick, event.data[2] >= PEDAL_DOWN_VALUE)
        for track in file.tracks
        for event in track
        if event.kind == CONTROL and event.data[1] == SUSTAIN_CONTROLLER
    )
    if not events:
        return np.zeros(0, bool)
    ticks, down = (np.array(column) for column in zip(*events, strict=True))
    frames = np.rint(file.clock().seconds(ticks) * RATE).astype(int)
    return np.repeat(np.append(False, down[:-1]), np.diff(frames, prepend=0))


if __name__ == "__main__":
    main()
