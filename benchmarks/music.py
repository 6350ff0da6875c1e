"""Compare generated with real pieces: a table of statistics, and a picture of piano rolls.

    python benchmarks/music.py maestro-v3.0.0-midi.zip [--pieces 8] [--picture docs/images/piano-roll.png]

Pieces are generated from scratch with seeds 0, 1, ... The real ones are the beginnings, of the same length, of all
pieces of the test split, since generated pieces also start at the beginning. Prints a table and, last, a
line of JSON.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from app.report.piano_roll import draw
from data_pipeline.maestro import MidiFiles, read_table
from music_ar import Generator, Performance, read_midi
from music_ar.metrics.statistics import Statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maestro", type=Path, help="the official zip or the unpacked folder")
    parser.add_argument("--checkpoint", help="default: the shipped model")
    parser.add_argument("--pieces", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=0.97)
    parser.add_argument("--picture", type=Path, help="PNG file for the piano rolls of two pieces of each")
    arguments = parser.parse_args()

    generator = Generator.from_pretrained(arguments.checkpoint)
    began = time.perf_counter()
    generated = [
        generator.generate(
            seconds=arguments.seconds,
            latents=arguments.latents,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=seed,
        )
        for seed in range(arguments.pieces)
    ]
    spent_s = time.perf_counter() - began
    real = real_beginnings(arguments.maestro, arguments.seconds)

    names = [field.name for field in dataclasses.fields(Statistics)]
    statistics = {
        side: {name: [getattr(Statistics.of(piece), name) for piece in pieces] for name in names}
        for side, pieces in (("real", real), ("generated", generated))
    }
    table = Table("minimum / median / maximum", "MAESTRO test", "generated")
    for name in names:
        table.add_row(name.replace("_", " "), spread(statistics["real"][name]), spread(statistics["generated"][name]))
    Console().print(table)
    if arguments.picture is not None:
        rolls = [("MAESTRO test", piece) for piece in real[:: max(len(real) // 2, 1)][:2]]
        draw(rolls + [("generated", piece) for piece in generated[:2]], arguments.picture, seconds=arguments.seconds)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("maestro", "picture")}
    spreads = {side: {name: spread(values) for name, values in of.items()} for side, of in statistics.items()}
    print(json.dumps({"benchmark": "music", **settings, "seconds_spent": round(spent_s, 1), **spreads}))


def real_beginnings(maestro: Path, seconds: float) -> list[Performance]:
    """The first seconds of every piece of the test split, from its first note."""
    with MidiFiles(maestro) as files:
        performances = [read_midi(files.read(piece.path)) for piece in read_table(files) if piece.split == "test"]
    return [performance.crop(first := float(performance.onset_s[0]), first + seconds) for performance in performances]


def spread(values: list[float]) -> str:
    """Minimum, median and maximum."""
    return " / ".join(f"{value:.4g}" for value in (min(values), float(np.median(values)), max(values)))


if __name__ == "__main__":
    main()
