"""Sets generated pieces beside real ones: a table of musical figures, and a picture of piano rolls.

    python benchmarks/music.py maestro-v3.0.0-midi.zip [--pieces 8] [--seconds 60] [--picture docs/piano-roll.png]

Pieces are made from nothing with seeds 0, 1, ...; real ones are the beginnings, of equal length, of all pieces of the
test split, since generated pieces begin there too. Prints a table and, last, one line of JSON.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

from data_pipeline.maestro import MidiFiles, read_table
from music_ar import Generator, Performance, read_midi
from music_ar.statistics import Statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maestro", type=Path, help="the official zip or the unpacked folder")
    parser.add_argument("--checkpoint", help="default: the shipped one")
    parser.add_argument("--pieces", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=0.98)
    parser.add_argument("--picture", type=Path, help="PNG file for the piano rolls of the first two of each")
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
    figures = {
        kind: {name: [getattr(Statistics.of(piece), name) for piece in pieces] for name in names}
        for kind, pieces in (("real", real), ("generated", generated))
    }
    table = Table("minimum / median / maximum", "MAESTRO test", "generated")
    for name in names:
        table.add_row(name.replace("_", " "), spread(figures["real"][name]), spread(figures["generated"][name]))
    Console().print(table)
    if arguments.picture is not None:
        draw(real[:: len(real) // 2][:2], generated[:2], arguments.seconds, arguments.picture)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("maestro", "picture")}
    spreads = {kind: {name: spread(values) for name, values in of.items()} for kind, of in figures.items()}
    print(json.dumps({"benchmark": "music", **settings, "seconds_spent": round(spent_s, 1), **spreads}))


def real_beginnings(maestro: Path, seconds: float) -> list[Performance]:
    """The first seconds of every piece of the test split, each from its first note."""
    with MidiFiles(maestro) as files:
        performances = [read_midi(files.read(piece.path)) for piece in read_table(files) if piece.split == "test"]
    return [performance.crop(first := float(performance.onset_s[0]), first + seconds) for performance in performances]


def spread(values: list[float]) -> str:
    """Minimum, median and maximum."""
    return " / ".join(f"{value:.4g}" for value in (min(values), float(np.median(values)), max(values)))


def draw(real: list[Performance], generated: list[Performance], seconds: float, picture: Path) -> None:
    """Piano rolls, one below the other; darker is louder."""
    rows = [("MAESTRO test", piece) for piece in real] + [("generated", piece) for piece in generated]
    figure, axes = plt.subplots(len(rows), 1, figsize=(12, 2.1 * len(rows)), sharex=True, layout="constrained")
    for axis, (title, piece) in zip(np.atleast_1d(axes), rows, strict=True):
        axis.barh(
            piece.pitch,
            piece.offset_s - piece.onset_s,
            left=piece.onset_s,
            height=1.0,
            color=plt.get_cmap("viridis_r")(piece.velocity / 127),
        )
        axis.set(ylim=(20, 109), yticks=range(24, 109, 12), ylabel="MIDI pitch", xlim=(0, seconds))
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(axis="y", linewidth=0.3)
    np.atleast_1d(axes)[-1].set_xlabel("seconds")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
