"""Whether a score tells real continuations from generated ones, as `music-ar render --keep-best` would like to.

Prompts are the beginnings of validation pieces. The real continuation of each, and generated ones of the same length,
are scored by `plausibility` and by embeddings of their passages:

- typical: minus the Mahalanobis distance to the training split's passages (a Gaussian, shrunk);
- near: the similarity of the nearest passage of the training split;
- like the prompt: the similarity to the prompt, by which `--keep-best` ranks.

Prints the AUC of each: how often a real continuation scores above a generated one, of any prompt and of the same one;
0.5 is chance. And one line of JSON.

    python benchmarks/ranking.py data/maestro [--encoder runs/encoder/model] [--prompts 50]
"""

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.console import print_table
from data_pipeline.dataset import Pieces
from music_ar import Generator, Performance, Request, decode, encode
from music_ar.decoding import backend
from music_ar.embedding.index import directions, embed_all
from music_ar.embedding.library import Library
from music_ar.embedding.passages import PassageGrid
from music_ar.embedding.search import likeness
from music_ar.evaluation.likelihood import ScoringConfig, score_tokens
from music_ar.metrics.frechet import fit
from music_ar.metrics.statistics import plausibility
from music_ar.model.pretrained import load_pretrained
from music_ar.tokens.codec import event_steps
from music_ar.tokens.vocabulary import END, START, STEPS_PER_SECOND

_FEWEST_NOTES = 20


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A prompt and its continuation, real or generated."""

    number: int
    prompt: Performance
    continuation: Performance

    @classmethod
    def of(cls, number: int, whole: Performance, arguments: argparse.Namespace) -> "Piece":
        """Divide a piece into its prompt and what follows."""
        prompt_s = arguments.prompt_seconds
        return cls(
            number=number,
            prompt=whole.crop(0, prompt_s),
            continuation=whole.crop(prompt_s, prompt_s + arguments.seconds),
        )

    @property
    def is_usable(self) -> bool:
        """Whether there are enough notes to compare."""
        return min(len(self.prompt), len(self.continuation)) >= _FEWEST_NOTES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="prepared MAESTRO")
    parser.add_argument("--encoder", help="folder of an encoder; without it, only plausibility is measured")
    parser.add_argument("--index", help="file of its index of the training split; default: that in its folder")
    parser.add_argument("--checkpoint", default=None, help="model that generates and scores; default: the shipped one")
    parser.add_argument("--prompt-seconds", type=float, default=20.0)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--variations", type=int, default=2, help="generated continuations of each prompt")
    parser.add_argument("--seconds", type=float, default=40.0, help="length of the continuations")
    parser.add_argument("--latents", type=int, default=1024)
    arguments = parser.parse_args()
    real = real_pieces(arguments)
    made = generated_pieces(real, arguments)
    scores = {"plausibility": plausibilities([*real, *made], arguments)}
    if arguments.encoder is not None:
        library = Library.open(arguments.encoder, arguments.index)
        scores |= {name: list(map(score, [*real, *made])) for name, score in embedding_scores(library).items()}
    settings = {"prompts": len(real), "generated": len(made), "seconds": arguments.seconds}
    found: dict[str, Any] = {"benchmark": "ranking", **settings, "latents": arguments.latents, "scores": {}}
    for name, values in scores.items():
        ours, theirs = np.array(values[: len(real)]), np.array(values[len(real) :])
        same = np.array([[one.number == other.number for other in made] for one in real])
        found["scores"][name] = {"any_prompt": auc(ours, theirs), "same_prompt": auc(ours, theirs, same)}
    rows = [(name, *(f"{value:.3f}" for value in each.values())) for name, each in found["scores"].items()]
    print_table(("AUC, real above generated", "any prompt", "same prompt"), rows)
    print(json.dumps({**found, "machine": platform.node()}))


def auc(real: np.ndarray, generated: np.ndarray, counted: np.ndarray | None = None) -> float:
    """Share of the pairs in which the real one scores higher; ties count half."""
    higher = (real[:, None] > generated) + 0.5 * (real[:, None] == generated)
    return float(higher.mean() if counted is None else higher[counted].mean())


def real_pieces(arguments: argparse.Namespace) -> list[Piece]:
    """The beginnings of validation pieces that are long enough, evenly spaced over the split."""
    end_s, found = arguments.prompt_seconds + arguments.seconds, []
    for tokens in Pieces.open(arguments.data, "validation").tokens:
        piece = decode(tokens)
        piece = piece.shift(-float(piece.onset_s[0]))
        if piece.duration_s > end_s and Piece.of(0, piece, arguments).is_usable:
            found.append(piece)
    if not found:
        raise SystemExit(f"expected pieces of more than {end_s:g} s in the validation split, found none")
    chosen = np.unique(np.linspace(0, len(found) - 1, arguments.prompts).round().astype(int))
    return [Piece.of(number, found[place], arguments) for number, place in enumerate(chosen)]


def generated_pieces(real: Sequence[Piece], arguments: argparse.Namespace) -> list[Piece]:
    """Continuations of the same prompts that have notes."""
    generator = Generator.from_pretrained(arguments.checkpoint)
    requests = [
        Request(
            prompt=piece.prompt,
            seconds=arguments.seconds,
            latents=min(arguments.latents, generator.config.most_latents),
            seed=1000 * variation + piece.number,
            tag=piece.number,
        )
        for variation in range(arguments.variations)
        for piece in real
    ]
    made = sorted(generator.generate_many(requests), key=lambda piece: piece.request.tag)
    pieces = [Piece.of(each.request.tag, each.performance, arguments) for each in made if not each.error]
    return [piece for piece in pieces if piece.is_usable]


def plausibilities(pieces: Sequence[Piece], arguments: argparse.Namespace) -> list[float]:
    """The plausibility of each continuation, with its NLL under the model."""
    model = load_pretrained(arguments.checkpoint, compute=backend.select().compute)
    prompt_steps = round(arguments.prompt_seconds * STEPS_PER_SECOND)
    tokens = [np.array([START, *encode(joined(piece, arguments)), END], np.int32) for piece in pieces]
    last = [int((event_steps(each) >= prompt_steps).sum()) for each in tokens]
    context = min(model.config.window, 1 << (max(map(len, tokens)) - 1).bit_length())  # all of a piece, not all zeros
    latents = min(arguments.latents, model.config.latents, context)
    scoring = ScoringConfig(context=context, latents=latents, stride=max(1, latents // 2), batch_size=4)
    nll = score_tokens(model, tokens, scoring, last=last)
    return [plausibility(piece.continuation, float(of.mean())) for piece, of in zip(pieces, nll, strict=True)]


def joined(piece: Piece, arguments: argparse.Namespace) -> Performance:
    """The prompt and its continuation, as one piece; all prompts end in the same way."""
    parts = piece.prompt, piece.continuation.shift(arguments.prompt_seconds)
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("onset_s", "offset_s", "pitch", "velocity")
    }
    return Performance(**columns)


def embedding_scores(library: Library) -> dict[str, Callable[[Piece], float]]:
    """The scores that embeddings give, by name."""
    grid, known = PassageGrid(), directions(library.index.vectors)
    gaussian = fit(known)
    precision = np.linalg.inv(gaussian.covariance + 1e-9 * np.eye(len(gaussian.mean)))

    def embedded(piece: Performance) -> np.ndarray:
        return embed_all(library.encoder, list(grid.cut(piece)))

    def typical(piece: Piece) -> float:
        apart = embedded(piece.continuation) - gaussian.mean
        return -float(np.sqrt(np.einsum("ni,ij,nj->n", apart, precision, apart)).mean())

    def near(piece: Piece) -> float:
        return float((embedded(piece.continuation) @ known.T).max(axis=1).mean())

    def like_the_prompt(piece: Piece) -> float:
        alike = likeness(library.encoder, piece.prompt, piece.continuation)
        assert alike is not None  # see `Piece.is_usable`
        return alike

    return {"typical": typical, "near": near, "like the prompt": like_the_prompt}


if __name__ == "__main__":
    main()
