"""Which sampling settings make music most like real music: temperature, top-p, steadiness; from nothing or prompts.

    python benchmarks/sampling.py data/maestro [--temperatures 0.9 1] [--top-ps 0.95 0.97] [--steadiness 0 0.25]

Pieces of all settings have the same seeds. For each setting: the distances to the validation split over those between
real pieces (see `music_ar.comparison`), as a geometric mean and the largest; and the longest run of notes, apart from
figures that go on, that stands in the training set, beside that of as long excerpts of real pieces. Prints a table and,
last, one line of JSON.
"""

import argparse
import itertools
import json
import time
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from app.report.measure import excerpts, spread
from data_pipeline.loader import Pieces
from music_ar import Generator, write_midi
from music_ar.decoding.sampling import SamplingOptions
from music_ar.generator import Piece, Request
from music_ar.metrics.distributions import compare
from music_ar.metrics.memorization import longest_runs
from music_ar.tokens import codec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that `music-ar prepare` wrote")
    parser.add_argument("--checkpoint", help="default: the shipped one")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.9, 1.0, 1.1])
    parser.add_argument("--top-ps", type=float, nargs="+", default=[0.95, 0.97, 1.0])
    parser.add_argument("--steadiness", type=float, nargs="+", default=[SamplingOptions().steadiness])
    parser.add_argument("--pieces", type=int, default=16, help="of each setting")
    parser.add_argument("--first-seed", type=int, default=0, help="of the pieces of a setting")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--prompt-seconds", type=float, default=0.0, help="go on from so much of validation pieces")
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--output", type=Path, help="folder for the pieces")
    arguments = parser.parse_args()

    validation = Pieces.open(arguments.data, "validation").tokens
    real = excerpts(validation, arguments.prompt_seconds, arguments.seconds)
    prompts = excerpts(validation, 0.0, arguments.prompt_seconds) if arguments.prompt_seconds else [None]
    settings = list(itertools.product(arguments.temperatures, arguments.top_ps, arguments.steadiness))
    requests = [
        Request(
            prompt=prompts[spread(number, arguments.pieces, len(prompts))],
            seconds=arguments.seconds,
            latents=arguments.latents,
            options=SamplingOptions(temperature=temperature, top_p=top_p, steadiness=steadiness),
            seed=arguments.first_seed + number,
            continuation_only=True,
            tag=(temperature, top_p, steadiness),
        )
        for temperature, top_p, steadiness in settings
        for number in range(arguments.pieces)
    ]
    began = time.perf_counter()
    made: dict[tuple[float, ...], list[Piece]] = defaultdict(list)
    for piece in Generator.from_pretrained(arguments.checkpoint).generate_many(requests):
        made[piece.request.tag].append(piece)
        if arguments.output is not None:
            folder = arguments.output / "t{}-p{}-s{}".format(*piece.request.tag)
            folder.mkdir(parents=True, exist_ok=True)
            write_midi(piece.continuation, folder / f"{piece.request.seed:04}.mid")
    spent_s = time.perf_counter() - began

    corpus = [codec.decode(tokens) for tokens in Pieces.open(arguments.data, "train").tokens]
    everything = [piece.continuation for setting in settings for piece in made[setting]]
    runs = [run.notes for run in longest_runs([*everything, *real], corpus, figures=False)]
    rows = []
    for number, setting in enumerate(settings):
        generated = [piece.continuation for piece in made[setting]]
        ratios = {name: each.ratio for name, each in compare(generated, real).items()}
        farthest = max(ratios, key=lambda name: ratios[name])
        rows.append(
            {
                "temperature": setting[0],
                "top_p": setting[1],
                "steadiness": setting[2],
                "mean_ratio": float(np.exp(np.mean(np.log(list(ratios.values()))))),
                "largest_ratio": ratios[farthest],
                "largest": farthest,
                "ratios": ratios,
                "nats_per_token": float(np.mean([piece.nats_per_token for piece in made[setting]])),
                "ended": sum(piece.continuation.duration_s < arguments.seconds - 1 for piece in made[setting]),
                "longest_run": max(runs[number * arguments.pieces : (number + 1) * arguments.pieces]),
            }
        )
    columns = [name for name in rows[0] if name != "ratios"]
    table = Table(*(name.replace("_", " ") for name in columns))
    for row in rows:
        table.add_row(*(f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in columns))
    Console().print(table)
    facts = {name: value for name, value in vars(arguments).items() if name not in ("data", "output")}
    real_run = max(runs[len(everything) :])
    device = jax.devices()[0].device_kind
    print(
        json.dumps(
            {
                "benchmark": "sampling",
                **facts,
                "device": device,
                "seconds_spent": round(spent_s),
                "real_run": real_run,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
