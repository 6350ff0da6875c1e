"""Measure what models retrieve from far back: music that repeats itself, and motifs planted in other music.

    python benchmarks/copying.py data/maestro runs/a/model runs/b/model [--edges 2048 4096 16384 32768]

Natural repeats: notes whose last 6 pitches last occurred in a range of distances; their NLL with the model's whole
window. Planted motifs: nats a token saved on 256 tokens, because they were heard before. Validation split. Prints one
line of JSON for each model.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.dataset import Pieces
from music_ar.decoding import backend
from music_ar.evaluation.likelihood import ScoringConfig, score_tokens
from music_ar.evaluation.retrieval_probes import natural_copying, planted_copying
from music_ar.model.pretrained import load_pretrained

LATENTS = 1024
STRIDE = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--edges", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--motifs", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-pieces", type=int)
    arguments = parser.parse_args()
    pieces = Pieces.open(arguments.data, "validation").tokens[: arguments.max_pieces]
    for name in arguments.models:
        print(json.dumps({"benchmark": "copying", "model": name} | measured(arguments, name, pieces)), flush=True)


def measured(arguments: argparse.Namespace, name: str, pieces: Sequence[np.ndarray]) -> dict[str, object]:
    """NLL of notes by how far back their context occurred, and what planted motifs save."""
    model = load_pretrained(name, compute=backend.select().compute)
    latents = min(LATENTS, model.config.latents)
    scoring = ScoringConfig(latents=latents, stride=min(STRIDE, latents // 2), batch_size=arguments.batch_size)
    nll = [each[0] for each in score_tokens(model, pieces, scoring)]
    shortest = arguments.edges[0]
    # Edges are contexts to `natural_copying`; the same scores serve for all of them.
    groups = natural_copying(pieces, dict.fromkeys(arguments.edges, nll))
    motifs = [
        planted_copying(
            model,
            pieces,
            distance=distance,
            context=model.config.window,
            latents=latents,
            motif_tokens=latents // 4,
            count=arguments.motifs,
            batch_size=arguments.batch_size,
        )
        for distance in (edge - latents for edge in arguments.edges if edge > latents)
    ]
    return {
        "context": model.config.context,
        "natural": [
            {
                "above": each.above,
                "up_to": each.up_to,
                "notes": each.notes,
                "note_nll": each.note_nll[shortest],
            }
            for each in groups
        ],
        "planted": [{"distance": each.distance, "saved": each.gain} for each in motifs],
    }


if __name__ == "__main__":
    main()
