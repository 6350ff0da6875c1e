"""What an embedding knows about style: composer and era of held-out pieces, by a linear probe on passages of 30 s.

A logistic regression is trained on passages of the training split; its regularization is chosen on the validation
split, and it is scored on the test split, on passages and on whole pieces. No composition is in two splits. Beside the
embedding stand counts of pitches, counts of pitch classes from the commonest one, and the hand-made features of
wishes.py. Prints a table and one line of JSON for each.

    python benchmarks/composer_probe.py data/maestro [--encoder runs/encoder/model]
"""

import argparse
import json
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from wishes import features

from app.console import print_table
from data_pipeline.dataset import Pieces
from music_ar import Performance, decode
from music_ar.embedding import PieceEmbedder
from music_ar.embedding.index import embed_all
from music_ar.embedding.passages import PassageGrid
from music_ar.features.composers import canonical, era_of

SPLITS = ("train", "validation", "test")
STRENGTHS = (0.001, 0.01, 0.1, 1.0)
_LEAST_PIECES = 12  # of a composer in the training split

Represent = Callable[[Sequence[Performance]], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Set:
    """Passages of a split: the music, and for each the number of its piece and its composer."""

    passages: list[Performance]
    piece: np.ndarray
    composer: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="prepared MAESTRO")
    parser.add_argument("--encoder", help="folder of an encoder; without it, only the others are measured")
    parser.add_argument("--per-piece", type=int, default=6, help="passages of each piece, evenly spaced")
    parser.add_argument("--least-pieces", type=int, default=_LEAST_PIECES, help="of a composer in the training split")
    arguments = parser.parse_args()
    sets = {split: passages(Pieces.open(arguments.data, split), arguments.per_piece) for split in SPLITS}
    sets = known_everywhere(sets, arguments.least_pieces)
    rows = []
    for name, represent in representations(arguments.encoder):
        x = {split: represent(each.passages) for split, each in sets.items()}
        for label, of in (("composer", str), ("era", lambda composer: str(era_of(composer)))):
            y = {split: np.array([of(composer) for composer in each.composer]) for split, each in sets.items()}
            found = probe(x, y, sets["test"].piece)
            rows.append((label, name, *(f"{found[key]:.3f}" for key in ("passage", "piece", "chance"))))
            counts = {"passages": len(y["test"]), "pieces": len(set(sets["test"].piece.tolist()))}
            line = {"benchmark": "composer_probe", "label": label, "input": name, "numbers": x["test"].shape[1]}
            print(json.dumps({**line, **found, **counts, "machine": platform.node()}), flush=True)
    print_table(("label", "input", "passages", "pieces", "chance"), rows)


def passages(pieces: Pieces, per_piece: int) -> Set:
    """Evenly spaced passages of the pieces by composers who are known."""
    cut, found, owners, composers = PassageGrid(hop_s=30.0), [], [], []
    for number, (tokens, record) in enumerate(zip(pieces.tokens, pieces.records, strict=True)):
        composer = canonical(record.composer)
        if composer is None:
            continue
        each = list(cut.cut(decode(tokens)))
        chosen = np.unique(np.linspace(0, len(each) - 1, per_piece).round().astype(int)) if each else []
        found += [each[place] for place in chosen]
        owners += [number] * len(chosen)
        composers += [composer] * len(chosen)
    return Set(passages=found, piece=np.array(owners), composer=np.array(composers))


def known_everywhere(sets: dict[str, Set], least: int) -> dict[str, Set]:
    """The passages by composers with that many training pieces, who occur in the other splits too."""
    pieces = Counter(dict(zip(sets["train"].piece.tolist(), sets["train"].composer.tolist(), strict=True)).values())
    names = {name for name, count in pieces.items() if count >= least}
    names &= set(sets["validation"].composer.tolist()) & set(sets["test"].composer.tolist())
    if len(names) < 2:
        raise SystemExit("expected at least two composers in all three splits")

    def kept(each: Set) -> Set:
        known = np.isin(each.composer, list(names))
        music = [passage for passage, keep in zip(each.passages, known, strict=True) if keep]
        return Set(passages=music, piece=each.piece[known], composer=each.composer[known])

    return {split: kept(each) for split, each in sets.items()}


def representations(encoder: str | None) -> Iterator[tuple[str, Represent]]:
    """What the probe may read, by name."""

    def each(of: Callable[[Performance], np.ndarray]) -> Represent:
        return lambda music: np.stack([of(passage) for passage in music])

    yield "pitches", each(lambda passage: np.log1p(np.bincount(passage.pitch, minlength=128)[21:109]))
    yield "pitch classes, from the commonest", each(pitch_classes)
    yield "hand-made features", each(features)
    if encoder is not None:
        loaded = PieceEmbedder.from_pretrained(encoder)
        yield "embedding", lambda music: embed_all(loaded, music)


def pitch_classes(passage: Performance) -> np.ndarray:
    counts = np.bincount(passage.pitch % 12, minlength=12) / len(passage)
    return np.roll(counts, -int(counts.argmax()))


def probe(x: dict[str, np.ndarray], y: dict[str, np.ndarray], piece: np.ndarray) -> dict[str, Any]:
    """Balanced accuracy on passages and pieces of the test split, with the strength that is best on validation."""
    probes = [
        make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500, class_weight="balanced"))
        for strength in STRENGTHS
    ]
    for each in probes:
        each.fit(x["train"], y["train"])
    best = max(probes, key=lambda each: balanced_accuracy(each.predict(x["validation"]), y["validation"]))
    names, votes = best.classes_, best.predict_log_proba(x["test"])
    first = [int(np.flatnonzero(piece == number)[0]) for number in np.unique(piece)]
    of_pieces = [names[votes[piece == piece[place]].sum(axis=0).argmax()] for place in first]
    return {
        "passage": balanced_accuracy(names[votes.argmax(axis=1)], y["test"]),
        "piece": balanced_accuracy(np.array(of_pieces), y["test"][first]),
        "chance": 1 / len(names),
        "classes": len(names),
        "strength": STRENGTHS[probes.index(best)],
    }


def balanced_accuracy(told: np.ndarray, right: np.ndarray) -> float:
    """Mean over the classes of the share that is told."""
    return float(np.mean([(told[right == name] == name).mean() for name in np.unique(right)]))


if __name__ == "__main__":
    main()
