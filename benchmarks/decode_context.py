"""Time decoding after a long prompt: Perceiver AR and its baselines.

    python benchmarks/decode_context.py [--contexts 4096 16384 65536] [--models perceiver-ar transformer] [--batch 1 16]

The models have random weights, the same sizes, and no conditioning features. Perceiver AR has N latents; the
Transformer keeps every input in the caches of every layer; Transformer-XL keeps two segments of N tokens, whatever the
length of the prompt. Prints a table and, last, one line of JSON.
"""

import argparse
import dataclasses
import itertools
import json
import tempfile
from pathlib import Path

import jax
from context_length import MODELS, of_family
from flax import nnx

from app.commands.timing import decode_rows
from app.console import print_table
from music_ar.decoding.budget import Setting
from music_ar.model.config import PRESETS
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.pretrained import save_pretrained
from music_ar.model.weights import read_weights

COLUMNS = ("model", "context", "batch", "first_note_s", "tokens_per_s", "cache_mb")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--latents", type=int, default=1024, help="or the length of a segment")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args()

    rows: list[dict[str, float | str]] = []
    for model, context in itertools.product(arguments.models, arguments.contexts):
        try:
            rows += timed(arguments, model, context)
        except jax.errors.JaxRuntimeError as error:
            print(f"{model}, {context}: {error}".splitlines()[0], flush=True)
    print_table(list(COLUMNS), [[f"{row[column]}" for column in COLUMNS] for row in rows])
    facts = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "preset": arguments.preset}
    print(json.dumps({"benchmark": "decode_context", **facts, "rows": rows}))


def timed(arguments: argparse.Namespace, model: str, context: int) -> list[dict[str, float | str]]:
    """Return a row for each batch."""
    sizes = dataclasses.replace(PRESETS[arguments.preset], onsets=0, retrieval_notes=0)
    config = of_family(sizes, model, context, min(context, arguments.latents))
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(PerceiverAR(config, rngs=nnx.Rngs(0)), Path(folder))
        weights = read_weights(folder)
    found, _ = decode_rows(
        weights, [context], [Setting(config.most_latents, config.layers)], arguments.batch, arguments.tokens, []
    )
    layers = config.layers * config.most_latents + (config.reach if model == "perceiver-ar" else config.most_latents)
    of_token = 2 * config.kv_heads * config.head_size  # numbers of a key and a value
    return [
        {
            "model": model,
            "context": context,
            "latents": config.most_latents,
            "batch": row.batch,
            "first_note_s": round(row.first_note_s, 3),
            "tokens_per_s": round(row.tokens_per_s, 1),
            "cache_mb": round(row.batch * layers * of_token * 2 / 1e6, 1),
        }
        for row in found
    ]


if __name__ == "__main__":
    main()
