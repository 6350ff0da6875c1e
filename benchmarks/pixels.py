"""Images pixel by pixel, in raster order and in others: nats a pixel of held-out digits, and a few that are drawn.

    python benchmarks/pixels.py --output pixels [--steps 600] [--seeds 0 1 2] [--orders raster shuffled]

The 1,797 digits of scikit-learn, 8 by 8 pixels of 17 levels. Before each pixel stands a token that says which one it
is, so that a model knows in any order what to predict; only the pixels are scored. "shuffled" is one permutation for
all images, another for each seed. Prints a line of JSON for the references and for each model.
"""

import argparse
from pathlib import Path

import numpy as np
from any_order import nats_per_symbol, report, trained
from jaxtyping import Int
from sklearn.datasets import load_digits

from music_ar.decoding.any_sequence import draw_sequences
from music_ar.model.config import ModelConfig
from music_ar.model.perceiver_ar import PerceiverAR

PIXELS, LEVELS, HELD_OUT = 64, 17, 360
PLACE, PADDING = LEVELS, LEVELS + PIXELS  # tokens: the levels, the places, padding
CONFIG = ModelConfig(
    vocabulary_size=PADDING + 1, padding=PADDING, context=2 * PIXELS, latents=PIXELS // 2, conv_width=2,
    width=64, layers=2, heads=4, kv_heads=4, head_size=16, hidden=192,
)  # fmt: skip
SHADES = " .:-=+*#@"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--orders", nargs="+", choices=["raster", "shuffled"], default=["raster", "shuffled"])
    arguments = parser.parse_args()
    images = np.asarray(load_digits(return_X_y=True)[0], np.int32)[np.random.default_rng(0).permutation(1797)]
    report(benchmark="pixels", **references(images[HELD_OUT:], images[:HELD_OUT]))
    is_level = np.arange(CONFIG.vocabulary_size) < LEVELS
    for seed in arguments.seeds:
        for order in arguments.orders:
            shuffled = np.random.default_rng(seed).permutation(PIXELS)
            places = np.arange(PIXELS) if order == "raster" else shuffled
            sequences = [written(image, places) for image in images]
            folder = arguments.output / f"{order}-{seed}"
            model = trained(CONFIG, sequences[HELD_OUT:], is_level, arguments.steps, seed, folder)
            nats = nats_per_symbol(model, sequences[:HELD_OUT], is_level, CONFIG.latents)
            report(order=order, seed=seed, steps=arguments.steps, nats_per_pixel=nats)
            print(as_text(drawn(model, places, 6, seed)), flush=True)


def written(image: Int[np.ndarray, "64"], places: Int[np.ndarray, "64"]) -> Int[np.ndarray, "128"]:
    """An image as tokens: each place, then the level of its pixel."""
    return np.stack([PLACE + places, image[places]], axis=1).ravel().astype(np.int32)


def references(train: Int[np.ndarray, "A 64"], held_out: Int[np.ndarray, "B 64"]) -> dict[str, float]:
    """Nats a pixel without context: by how often each level occurs (plus one), anywhere and at each pixel."""
    counts = np.stack([(train == level).sum(axis=0) + 1 for level in range(LEVELS)])
    at_pixel = np.log(counts / counts.sum(axis=0))[held_out, np.arange(PIXELS)]
    anywhere = np.log(counts.sum(axis=1) / counts.sum())[held_out]
    return {"unigram": float(-anywhere.mean()), "unigram_of_each_pixel": float(-at_pixel.mean())}


def drawn(model: PerceiverAR, places: Int[np.ndarray, "64"], count: int, seed: int) -> Int[np.ndarray, "B 64"]:
    """New images, drawn pixel by pixel."""
    tokens, images = np.zeros((count, 0), np.int32), np.zeros((count, PIXELS), np.int32)
    for number, place in enumerate(places):
        tokens = np.pad(tokens, ((0, 0), (0, 1)), constant_values=PLACE + place)
        level_Bx1 = draw_sequences(model, tokens, 1, seed=seed * PIXELS + number)
        tokens = np.concatenate([tokens, level_Bx1], axis=1)
        images[:, place] = np.minimum(level_Bx1[:, 0], LEVELS - 1)
    return images


def as_text(images: Int[np.ndarray, "B 64"]) -> str:
    """Images side by side, two characters a pixel."""
    rows = images.reshape(-1, 8, 8).swapaxes(0, 1) // 2
    return "\n".join("   ".join("".join(2 * SHADES[shade] for shade in row) for row in line) for line in rows)


if __name__ == "__main__":
    main()
