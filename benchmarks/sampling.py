"""Find the sampling settings (temperature, top-p, steadiness) whose music is closest to real music.

    python benchmarks/sampling.py data/maestro [--temperatures 0.9 1] [--top-ps 0.95 0.97] [--steadiness 0 0.25]

All settings use the same seeds. For each, it reports the distances to the validation split relative to those between
real pieces (`music_ar.metrics.distributions`): their geometric mean and the largest. It also reports the longest run of
notes, without repeated patterns, that occurs in the training split, and that of real excerpts of the same length.
Prints a table and, last, one line of JSON.
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from app.report.pieces import excerpts, prompt_index
from data_pipeline.dataset import Pieces
from music_ar import Generator, Performance, Request, SamplingOptions, write_midi
from music_ar.generator import Piece
from music_ar.metrics.distributions import compare
from music_ar.metrics.memorization import longest_shared_runs
from music_ar.tokens import codec

Setting = tuple[float, float, float]  # temperature, top-p, steadiness


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="dataset written by `music-ar prepare`")
    parser.add_argument("--checkpoint", help="default: the shipped model")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.9, 1.0, 1.1])
    parser.add_argument("--top-ps", type=float, nargs="+", default=[0.95, 0.97, 1.0])
    parser.add_argument("--steadiness", type=float, nargs="+", default=[SamplingOptions().steadiness])
    parser.add_argument("--pieces", type=int, default=16, help="pieces per setting")
    parser.add_argument("--first-seed", type=int, default=0, help="random seed of the first piece of each setting")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument(
        "--prompt-seconds", type=float, default=0.0, help="continue the beginnings of validation pieces"
    )
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--choices", type=int, default=1)
    parser.add_argument("--output", type=Path, help="folder for the pieces")
    arguments = parser.parse_args()

    validation = Pieces.open(arguments.data, "validation").tokens
    real = excerpts(validation, arguments.prompt_seconds, arguments.seconds)
    prompts = excerpts(validation, 0.0, arguments.prompt_seconds) if arguments.prompt_seconds else [None]
    began = time.perf_counter()
    generated = generate(prompts, arguments)
    spent_s = time.perf_counter() - began

    corpus = [codec.decode(tokens) for tokens in Pieces.open(arguments.data, "train").tokens]
    pieces = [piece.continuation for of_setting in generated.values() for piece in of_setting]
    runs = [run.notes for run in longest_shared_runs([*pieces, *real], corpus, repeated_patterns=False)]
    rows, start = [], 0
    for setting, of_setting in generated.items():
        longest = max(runs[start : start + len(of_setting)])
        rows.append(row(setting, of_setting, real, arguments.seconds) | {"longest_run": longest})
        start += len(of_setting)
    print_rows(rows)
    result = {
        "benchmark": "sampling",
        **{name: value for name, value in vars(arguments).items() if name not in ("data", "output")},
        "device": jax.devices()[0].device_kind,
        "seconds_spent": round(spent_s),
        "real_run": max(runs[len(pieces) :]),
        "rows": rows,
    }
    print(json.dumps(result))


def generate(prompts: Sequence[Performance | None], arguments: argparse.Namespace) -> dict[Setting, list[Piece]]:
    """The pieces of each setting, in the order they are finished."""
    settings = list(itertools.product(arguments.temperatures, arguments.top_ps, arguments.steadiness))
    requests = [
        Request(
            prompt=prompts[prompt_index(number, arguments.pieces, len(prompts))],
            seconds=arguments.seconds,
            latents=arguments.latents,
            choices=arguments.choices,
            sampling=SamplingOptions(temperature=temperature, top_p=top_p, steadiness=steadiness),
            seed=arguments.first_seed + number,
            continuation_only=True,
            tag=(temperature, top_p, steadiness),
        )
        for temperature, top_p, steadiness in settings
        for number in range(arguments.pieces)
    ]
    generated: dict[Setting, list[Piece]] = {setting: [] for setting in settings}
    for piece in Generator.from_pretrained(arguments.checkpoint).generate_many(requests):
        generated[piece.request.tag].append(piece)
        if arguments.output is not None:
            folder = arguments.output / "t{}-p{}-s{}".format(*piece.request.tag)
            folder.mkdir(parents=True, exist_ok=True)
            write_midi(piece.continuation, folder / f"{piece.request.seed:04}.mid")
    return generated


def row(setting: Setting, pieces: Sequence[Piece], real: Sequence[Performance], seconds: float) -> dict[str, Any]:
    """The result of a setting."""
    comparisons = compare([piece.continuation for piece in pieces], real)
    ratios = {name: comparison.ratio for name, comparison in comparisons.items()}
    farthest = max(ratios, key=lambda name: ratios[name])
    return {
        "temperature": setting[0],
        "top_p": setting[1],
        "steadiness": setting[2],
        "mean_ratio": float(np.exp(np.mean(np.log(list(ratios.values()))))),
        "largest_ratio": ratios[farthest],
        "largest": farthest,
        "ratios": ratios,
        "nats_per_token": float(np.mean([piece.nats_per_token for piece in pieces])),
        "ended": sum(piece.continuation.duration_s < seconds - 1 for piece in pieces),
    }


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    columns = [name for name in rows[0] if name != "ratios"]
    table = Table(*(name.replace("_", " ") for name in columns))
    for each in rows:
        table.add_row(*(f"{each[name]:.4g}" if isinstance(each[name], float) else str(each[name]) for name in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
