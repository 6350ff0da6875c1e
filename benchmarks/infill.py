"""Measure how well a model fills gaps: likelihood of real middles, the joins, and the length of the gap.

    python benchmarks/infill.py data/maestro [--checkpoint runs/a/model] [--gaps 2 8 30] [--count 64]

Gaps are cut from pieces of the validation split. For each length: the NLL of the real middle given both sides, and
given what comes before it alone. Then gaps are filled, and the seconds around each join (`--around` on either side of
it) are compared with the same seconds of the real pieces: `music_ar.metrics.distributions` gives the distance, and that
between real ones. Last, how far what follows the gap is from its place, in milliseconds, and whether any key is struck
while it is down. Prints tables and one line of JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data_pipeline.dataset import Pieces
from music_ar import Generator, Performance, Request
from music_ar.evaluation import draw_gaps, score_middles
from music_ar.metrics.distributions import compare
from music_ar.model.pretrained import load_pretrained
from music_ar.tokens import codec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="dataset written by `music-ar prepare`")
    parser.add_argument("--checkpoint", help="default: the shipped model")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--gaps", type=float, nargs="+", default=[2.0, 8.0, 30.0], help="lengths in seconds")
    parser.add_argument("--count", type=int, default=64, help="gaps of each length to score")
    parser.add_argument("--filled", type=int, default=16, help="gaps of each length to fill; 0 fills none")
    parser.add_argument("--around", type=float, default=4.0, help="seconds on either side of a join")
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()

    pieces = Pieces.open(arguments.data, arguments.split).tokens
    model = load_pretrained(arguments.checkpoint)
    generator = Generator.from_pretrained(arguments.checkpoint) if arguments.filled else None
    results: list[dict[str, Any]] = []
    for seconds in arguments.gaps:
        gaps = draw_gaps(pieces, seconds, arguments.count)
        score = score_middles(model, gaps, batch_size=arguments.batch_size)
        result = {"seconds": seconds, "count": len(gaps), **score.nats_per_token(), "gain": score.gain}
        if generator is not None:
            result |= filling(generator, pieces, seconds, arguments)
        results.append(result)
    show(results)
    settings = {name: value for name, value in vars(arguments).items() if name != "data"}
    print(json.dumps({"benchmark": "infill", **settings, "results": results}))


def filling(
    generator: Generator, pieces: tuple[np.ndarray, ...], seconds: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Fill gaps in the middle of excerpts; compare the joins with real ones, and measure the gaps."""
    excerpts = [_excerpt(codec.decode(tokens), 60 + seconds) for tokens in pieces]
    real = [piece for piece in excerpts if piece is not None][: arguments.filled]
    begin_s, end_s = 30.0, 30.0 + seconds
    requests = [
        Request.replacing(piece, begin_s, end_s, seed=seed, latents=arguments.latents)
        for seed, piece in enumerate(real)
    ]
    began = time.perf_counter()
    filled = {piece.request.seed: piece for piece in generator.generate_many(requests)}
    spent_s = time.perf_counter() - began
    made = [filled[seed].performance for seed in range(len(real))]
    if errors := [piece.error for piece in filled.values() if piece.error is not None]:
        raise SystemExit(f"{len(errors)} gaps were not filled: {errors[0]}")
    joins = {
        name: _ratios(made, real, lambda piece, at_s=at_s: _around(piece, at_s, arguments.around))
        for name, at_s in (("left join", begin_s), ("right join", end_s))
    }
    return {
        "filled": len(made),
        "seconds_spent": round(spent_s, 1),
        **joins,
        "most_ms_off": max(1000 * _off_s(piece, ours, end_s) for piece, ours in zip(real, made, strict=True)),
        "struck_while_down": sum(map(_struck_while_down, made)),
    }


def _excerpt(piece: Performance, seconds: float) -> Performance | None:
    """The first seconds of a piece, if it is that long."""
    first = float(piece.onset_s[0])
    return piece.crop(first, first + seconds) if piece.duration_s >= first + seconds else None


def _around(piece: Performance, at_s: float, seconds: float) -> Performance:
    return piece.crop(at_s - seconds, at_s + seconds)


def _ratios(
    made: list[Performance], real: list[Performance], part: Callable[[Performance], Performance]
) -> dict[str, float]:
    """Distance to real music over that between real pieces: geometric mean over the features, and the largest."""
    compared = compare([part(piece) for piece in made], [part(piece) for piece in real])
    ratios = {name: each.ratio for name, each in compared.items() if 0 < each.ratio < np.inf}
    return {"mean": float(np.exp(np.mean(np.log(list(ratios.values()))))), "largest": max(ratios.values())}


def _off_s(real: Performance, made: Performance, end_s: float) -> float:
    """How far what follows the gap is from its place."""
    expected, found = (np.sort(piece.onset_s[piece.onset_s >= end_s - 1e-6]) for piece in (real, made))
    return float(np.abs(expected - found).max(initial=0.0)) if len(expected) == len(found) else np.inf


def _struck_while_down(piece: Performance) -> int:
    """Number of notes that begin while the same key sounds."""
    count = 0
    for pitch in np.unique(piece.pitch):
        of_key = piece.pitch == pitch
        order = np.argsort(piece.onset_s[of_key], kind="stable")
        onset_s, offset_s = piece.onset_s[of_key][order], piece.offset_s[of_key][order]
        count += int((onset_s[1:] < offset_s[:-1] - 1e-9).sum())
    return count


def show(results: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table("gap", "both sides", "left only", "gain (nats/token)", "left join", "right join", "ms off", "doubled")
    for result in results:
        joins = [result[name]["mean"] if name in result else np.nan for name in ("left join", "right join")]
        table.add_row(
            f"{result['seconds']:g} s",
            f"{result['both']:.3f}",
            f"{result['left']:.3f}",
            f"{result['gain']:.3f}",
            *(f"{join:.2f}" for join in joins),
            f"{result.get('most_ms_off', np.nan):.2f}",
            f"{result.get('struck_while_down', '')}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
