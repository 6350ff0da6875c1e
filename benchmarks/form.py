"""Measure form over minutes: what of the prompt returns, and whether the texture holds, beside real pieces.

    python benchmarks/form.py data/maestro [--checkpoint NAME] [--pieces 32] [--latents 2048] [--choices 4]

Prompts are the first 20 s of pieces; the notes 30 to 120 s after the prompt are compared with it
(`music_ar.metrics.form`), of the continuation and of the piece itself. Prints the means, and last one line of JSON.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from app.console import print_table
from data_pipeline.dataset import Pieces
from music_ar.decoding.request import Request
from music_ar.generator import Generator
from music_ar.metrics.form import returning_share, texture, texture_distances
from music_ar.midi.performance import Performance
from music_ar.tokens import codec

PROMPT_S = 20.0
SECONDS = 120.0
LATER_S = (PROMPT_S + 30.0, PROMPT_S + SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--checkpoint")
    parser.add_argument("--pieces", type=int, default=32)
    parser.add_argument("--latents", type=int, default=2048)
    parser.add_argument("--choices", type=int, default=1)
    arguments = parser.parse_args()

    pieces = [codec.decode(tokens) for tokens in Pieces.open(arguments.data, arguments.split).tokens]
    real = [piece for piece in pieces if piece.duration_s >= LATER_S[1]][: arguments.pieces]
    generator = Generator.from_pretrained(arguments.checkpoint)
    requests = [
        Request(
            prompt=piece,
            prompt_seconds=PROMPT_S,
            seconds=SECONDS,
            latents=arguments.latents,
            choices=arguments.choices,
            seed=seed,
        )
        for seed, piece in enumerate(real)
    ]
    made = [each.performance for each in generator.generate_many(requests)]
    rows = {"real": means(real), "generated": means(made)}
    names = list(rows["real"])
    print_table(["", *names], [[row, *(f"{found[name]:.3f}" for name in names)] for row, found in rows.items()])
    print(
        json.dumps(
            {
                "benchmark": "form",
                "pieces": len(real),
                "latents": arguments.latents,
                "choices": arguments.choices,
                **rows,
            }
        )
    )


def means(pieces: list[Performance]) -> dict[str, float]:
    """Return the mean of each measure over the pieces."""
    found = [measured(piece) for piece in pieces]
    return {name: float(np.mean([value for each in found if (value := each[name]) is not None])) for name in found[0]}


def measured(piece: Performance) -> dict[str, float | None]:
    """Compare the later part of a piece with its first seconds."""
    prompt, later = between(piece, 0.0, PROMPT_S), between(piece, *LATER_S)
    distances = texture_distances(texture(piece, 0.0, PROMPT_S), texture(piece, *LATER_S))
    return {"returning": returning_share(prompt, later), **distances}


def between(piece: Performance, start_s: float, stop_s: float) -> Performance:
    """Return the notes that begin between two times."""
    return piece.select((piece.onset_s >= start_s) & (piece.onset_s < stop_s))


if __name__ == "__main__":
    main()
