"""Measure the speed of the sampled piano on one core: `python benchmarks/audio.py [MIDI FILE ...]`."""

import json
import os
import sys
import time
from pathlib import Path

from app.console import print_table
from music_ar.audio.synthesis import render
from music_ar.midi.io import read_midi

EXAMPLES = sorted(Path(__file__).parents[1].glob("tests/data/*.midi"))


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows, results = [], []
    for path in map(Path, sys.argv[1:] or EXAMPLES):
        piece = read_midi(path)
        spent_s = []
        for _ in range(2):  # the first run also reads the samples
            began_s = time.perf_counter()
            render(piece)
            spent_s.append(time.perf_counter() - began_s)
        speeds = [piece.duration_s / spent for spent in spent_s]
        results.append({"file": path.name, "seconds": piece.duration_s, "notes": len(piece), "times_real_time": speeds})
        rows.append((path.name, f"{piece.duration_s:.0f}", str(len(piece)), *(f"{speed:.0f}" for speed in speeds)))
    print_table(("file", "seconds", "notes", "times real time, first run", "second run"), rows)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
