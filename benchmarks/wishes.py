"""Whether a model follows wishes: what came against what was wished.

Three tables, and one line of JSON:

- for each number, Spearman's rank correlation between the wish and what is measured in the generated music;
- for each composer, how often a classifier that was trained on real pieces takes the generated music for theirs, beside
  chance and beside real pieces of the validation split (needs the extra `bench`);
- NLL on the validation split without wishes, and with each window's own.

    python benchmarks/wishes.py data/maestro --checkpoint runs/wishes/model --pieces 60 --seconds 45
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from scipy.stats import rankdata

from app.console import print_table
from data_pipeline.dataset import Pieces
from data_pipeline.window_wishes import WindowWishes, WishDropout
from data_pipeline.windows import Windows
from music_ar import Generator, Performance, Request, decode, encode
from music_ar.features.composers import canonical
from music_ar.features.measured import measure
from music_ar.features.wish_options import NUMBERS
from music_ar.features.wishes import WishTable
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.pretrained import load_pretrained
from music_ar.training.losses import token_nll

_PASSAGES = 3  # of each real piece
_LEAST_PASSAGES = 60  # of a composer in the training split, to train the classifier on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="prepared MAESTRO")
    parser.add_argument("--checkpoint", required=True, help="a model that takes wishes")
    parser.add_argument("--pieces", type=int, default=60, help="pieces for each number, and for all composers")
    parser.add_argument("--seconds", type=float, default=45.0, help="length of each piece")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--windows", type=int, default=200, help="validation windows to score; 0: none")
    parser.add_argument("--latents", type=int, default=None)
    arguments = parser.parse_args()
    generator = Generator.from_pretrained(arguments.checkpoint)
    table = generator.config.wishes
    if table is None:
        raise SystemExit(f"{arguments.checkpoint} takes no wishes: train it with `music-ar train --wishes`")
    options = {
        "seconds": arguments.seconds,
        "latents": arguments.latents or min(1024, generator.config.most_latents),
        "guidance": arguments.guidance,
    }
    found: dict[str, Any] = {"benchmark": "wishes", "checkpoint": arguments.checkpoint, **options}
    found["pieces"] = arguments.pieces
    found["rank_correlation"] = correlations(generator, table, arguments.pieces, options)
    found["composers"] = composers(generator, table, arguments.data, arguments.pieces, options)
    if arguments.windows:
        found["nats_per_token"] = likelihoods(arguments.checkpoint, table, arguments.data, arguments.windows)
    print(json.dumps(found))


def correlations(generator: Generator, table: WishTable, pieces: int, options: dict[str, Any]) -> dict[str, float]:
    """Rank correlation of each number with what came, over wishes spread evenly over the buckets."""
    found, rows = {}, []
    for name, edges in zip(NUMBERS, table.edges, strict=True):
        middles = (np.array(edges[1:]) + np.array(edges[:-1])) / 2
        wished = middles[np.linspace(0, len(middles) - 1, pieces).round().astype(int)]
        music = generate(generator, [{name: float(wish)} for wish in wished], options)
        pairs = [
            (wish, value)
            for wish, piece in zip(wished, music, strict=True)
            if piece is not None and (value := getattr(measure(encode(piece)), name)) is not None
        ]
        if len(pairs) < 3:
            found[name] = float("nan")
            continue
        asked, came = np.array(pairs).T
        found[name] = float(np.corrcoef(rankdata(asked), rankdata(came))[0, 1])
        low, high = ([value for _, value in sorted(pairs)[part]] for part in (slice(3), slice(-3, None)))
        rows.append((name, f"{found[name]:.2f}", f"{np.mean(low):.3g}", f"{np.mean(high):.3g}", str(len(pairs))))
    print_table(("number", "rank correlation", "three lowest", "three highest", "pieces"), rows)
    return found


def generate(
    generator: Generator, wishes: Sequence[dict[str, Any]], options: dict[str, Any]
) -> list[Performance | None]:
    """A piece for each of the wishes; None if it failed or has no notes."""
    requests = [
        Request.of(None, seed=seed, tag=seed, continuation_only=True, **options, **each)
        for seed, each in enumerate(wishes)
    ]
    found: list[Performance | None] = [None] * len(requests)
    for piece in generator.generate_many(requests):
        if piece.error is None and len(piece.performance):
            found[piece.request.tag] = piece.performance
    return found


def composers(
    generator: Generator, table: WishTable, data: str, pieces: int, options: dict[str, Any]
) -> dict[str, Any] | None:
    """How often generated music is taken for that of the composer who was wished."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        print("composers: not measured, which needs scikit-learn: pip install '.[bench]'")
        return None
    real = {split: passages(Pieces.open(data, split), table, options["seconds"]) for split in ("train", "validation")}
    counts = Counter(name for name, _ in real["train"])
    chosen = [name for name in table.composers if counts[name] >= _LEAST_PASSAGES]
    if len(chosen) < 2:
        print(f"composers: not measured, since fewer than two have {_LEAST_PASSAGES // _PASSAGES} pieces in {data}")
        return None
    fit, held_out = ([(name, x) for name, x in real[split] if name in chosen] for split in ("train", "validation"))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=2000, class_weight="balanced"))
    classifier.fit(np.stack([x for _, x in fit]), [name for name, _ in fit])
    wished = [chosen[number % len(chosen)] for number in range(pieces)]
    music = generate(generator, [{"composer": name} for name in wished], options)
    made = [(name, features(piece)) for name, piece in zip(wished, music, strict=True) if piece is not None]
    result = {
        "chance": 1 / len(chosen),
        "real": balanced_accuracy(classifier, held_out),
        "generated": balanced_accuracy(classifier, made),
        "composers": len(chosen),
    }
    print_table(("composer told", "share"), [(name, f"{result[name]:.3f}") for name in ("chance", "real", "generated")])
    return result


def balanced_accuracy(classifier: Any, passages: Sequence[tuple[str, np.ndarray]]) -> float:
    """Mean over the composers of the share of passages that are told."""
    told = classifier.predict(np.stack([x for _, x in passages]))
    by_name: dict[str, list[bool]] = {}
    for (name, _), guess in zip(passages, told, strict=True):
        by_name.setdefault(name, []).append(guess == name)
    return float(np.mean([np.mean(right) for right in by_name.values()]))


def passages(pieces: Pieces, table: WishTable, seconds: float) -> list[tuple[str, np.ndarray]]:
    """Composer and features of passages of real pieces, as long as the generated ones."""
    found = []
    for tokens, record in zip(pieces.tokens, pieces.records, strict=True):
        name = canonical(record.composer)
        if name not in table.composers:
            continue
        piece = decode(np.asarray(tokens, np.int32))
        for begin_s in np.linspace(0, max(0.0, piece.duration_s - seconds), _PASSAGES):
            passage = piece.crop(float(begin_s), float(begin_s) + seconds)
            if len(passage) >= 20:
                found.append((name, features(passage)))
    return found


def features(piece: Performance) -> np.ndarray:
    """What the classifier sees, none of it the key: intervals, pitch classes from the commonest, texture, dynamics."""
    pitch, onset_s, length_s = piece.pitch.astype(int), piece.onset_s, piece.offset_s - piece.onset_s
    steps = np.clip(np.diff(pitch), -24, 24) + 24
    classes = np.bincount(pitch % 12, length_s.clip(0, 1), minlength=12)
    classes = np.roll(classes, -int(classes.argmax()))
    waits = np.diff(onset_s)
    parts = [
        np.bincount(steps, minlength=49) / max(len(steps), 1),
        classes / max(classes.sum(), 1e-9),
        np.bincount(pitch // 6, minlength=22) / len(pitch),
        np.histogram(np.log(waits.clip(0.005, 4)), 12, (np.log(0.005), np.log(4)))[0] / max(len(waits), 1),
        np.histogram(np.log(length_s.clip(0.02, 8)), 12, (np.log(0.02), np.log(8)))[0] / len(pitch),
        np.histogram(piece.velocity, 12, (0, 128))[0] / len(pitch),
        [np.log(len(piece) / max(piece.duration_s, 1.0)), pitch.std() / 12, piece.velocity.std() / 20],
    ]
    return np.concatenate(parts)


def likelihoods(checkpoint: str, table: WishTable, data: str, windows: int) -> dict[str, float]:
    """NLL of validation windows, without wishes and with their own; each window predicts as many targets as latents."""
    model = load_pretrained(checkpoint)
    cut = Windows(
        pieces=Pieces.open(data, "validation"),
        context=model.config.window,
        latents=model.config.latents,
        seed=0,
        augmentation=None,
        wishes=WindowWishes(table=table, dropout=WishDropout(wish_dropout=0.0, without_wishes=0.0)),
    )
    graph, params = nnx.split(model)

    @jax.jit
    def nll(params: nnx.State, tokens: jax.Array, wishes: jax.Array) -> jax.Array:
        wishful: PerceiverAR = nnx.merge(graph, params)
        logits = wishful(tokens[:, :-1], latents=cut.latents, wishes_BxPxW=wishes)
        return token_nll(logits, tokens[:, -cut.latents :])

    sums, rng = np.zeros(3), np.random.default_rng(0)
    for index in np.unique(np.linspace(0, len(cut) - 1, windows).astype(int)).tolist():
        window = cut.augment(cut.cut(index), rng)
        assert "wishes" in window
        tokens, weights, own = window["tokens"][None], window["weights"], window["wishes"][None]
        given = [float((np.asarray(nll(params, tokens, wishes))[0] * weights).sum()) for wishes in (own * 0, own)]
        sums += np.array([*given, weights.sum()])
    result = {"without_wishes": sums[0] / sums[2], "with_own_wishes": sums[1] / sums[2]}
    print_table(("nats a token", ""), [(name, f"{value:.4f}") for name, value in result.items()])
    return result


if __name__ == "__main__":
    main()
