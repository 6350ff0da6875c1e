"""The measurements of a report, a function per section. docs/results/evaluation.md defines each."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from app.report.config import ReportConfig
from data_pipeline.dataset import Pieces
from music_ar.embedding.index import Embeds, embed_all
from music_ar.embedding.passages import PassageGrid
from music_ar.evaluation.calibration import best_temperature
from music_ar.evaluation.likelihood import Score, ScoringConfig, score_by_type, score_tokens
from music_ar.evaluation.retrieval_probes import natural_copying, planted_copying
from music_ar.metrics.distributions import compare
from music_ar.metrics.frechet import FEWEST_GENERATED, FEWEST_REAL, compare_embeddings
from music_ar.metrics.memorization import SharedRun, longest_shared_runs
from music_ar.midi.performance import Performance
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.tokens import codec

TEMPERATURES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
CURVE_LATENTS = 1024
"""Maximum number of latents when contexts are compared, so that a short context has as many."""
SHORT_CONTEXT = 2048
"""The context that the longest one is compared with. Notes that repeat within it do not need a longer one."""
MOTIF_TOKENS = 256

Tokens = Sequence[np.ndarray]
Timed = Callable[[str], Callable[[float], None]]
"""`ProgressLine.timed`: starts a task with this text, and returns a function that takes its finished share."""


def prediction(
    model: PerceiverAR, tokens: Tokens, scoring: ScoringConfig, on_progress: Callable[[float], None]
) -> dict[str, Any]:
    """The NLL of a split, overall and by token type, and the temperature at which it would be lowest."""
    nll = score_tokens(model, tokens, scoring, temperatures=TEMPERATURES, on_progress=on_progress)
    plain = [of_piece[TEMPERATURES.index(1.0)] for of_piece in nll]
    types: dict[str, Any] = score_by_type(plain, tokens)
    at_each = [score_by_type([of_piece[number] for of_piece in nll], tokens) for number in range(len(TEMPERATURES))]
    for name, of_type in types.items():
        of_type["best_temperature"], _ = best_temperature(
            TEMPERATURES, np.array([types_at[name]["nats_per_token"] for types_at in at_each])
        )
    mean_nll = np.concatenate(nll, axis=1).mean(axis=1, dtype=np.float64)
    best, lowest = best_temperature(TEMPERATURES, mean_nll)
    return {
        "score": Score.of(float(np.concatenate(plain).sum(dtype=np.float64)), tokens).metrics(),
        "kinds": types,
        "calibration": {
            "best_temperature": best,
            "nats_per_token": lowest,
            "gain": float(mean_nll[TEMPERATURES.index(1.0)]) - lowest,
        },
    }


def latents_curve(model: PerceiverAR, tokens: Tokens, scoring: ScoringConfig, timed: Timed) -> dict[int, float]:
    """NLL per token as the number of latents is halved; at least half of the latents come before each token."""
    _, most = scoring.sizes(model.config)
    curve = {}
    for latents in halvings(most, most // 8):
        fewer = _with_latents(scoring, latents)
        curve[latents] = _mean(score_tokens(model, tokens, fewer, on_progress=timed(f"{latents} latents")))
    return curve


def long_range(
    model: PerceiverAR, tokens: Tokens, all_tokens: Tokens, scoring: ScoringConfig, config: ReportConfig, timed: Timed
) -> dict[str, Any]:
    """NLL by context length, and what the model retrieves from far back: natural repeats and planted motifs.

    Args:
        model: the model.
        tokens: pieces to score.
        all_tokens: pieces from which motifs and the music around them are taken.
        scoring: the longest context, and how to score.
        config: how many motifs, and their seed.
        timed: shows progress.
    """
    longest, most = scoring.sizes(model.config)
    latents = min(most, CURVE_LATENTS)
    scoring = _with_latents(scoring, latents)
    nll: dict[int, list[np.ndarray]] = {}
    for context in halvings(longest, latents):
        shorter = dataclasses.replace(scoring, context=context)
        scored = score_tokens(model, tokens, shorter, on_progress=timed(f"context {context}"))
        nll[context] = [of_piece[0] for of_piece in scored]
    return {
        "curve_latents": latents,
        "context_curve": {context: _mean(of_context) for context, of_context in nll.items()},
        "natural_recall": natural_repeats(tokens, nll),
        "planted_recall": planted_motifs(model, all_tokens, scoring, config, timed),
    }


def natural_repeats(tokens: Tokens, nll: Mapping[int, list[np.ndarray]]) -> dict[str, Any]:
    """How much a long context gains on notes whose preceding pitches last occurred far back.

    Args:
        tokens: pieces.
        nll: context length -> NLL of each token except the first of each piece.
    """
    contexts, groups = sorted(nll), natural_copying(tokens, nll)
    long = contexts[-1]
    short = max((context for context in contexts[:-1] if context <= SHORT_CONTEXT), default=contexts[0])
    between = [each for each in groups if each.above is not None and each.above >= short and each.up_to and each.notes]
    notes = sum(each.notes for each in between)
    gain = sum(each.notes * (each.gain(short, long) or 0.0) for each in between)
    return {
        "short": short,
        "long": long,
        "notes": notes,
        "share": notes / sum(each.notes for each in groups),
        "saved": gain / notes if notes else None,
        "by_distance": [
            {
                "tokens_ago": _range(each.above, each.up_to),
                "above": each.above,
                "up_to": each.up_to,
                "notes": each.notes,
                "share": each.share,
                "repeating": each.copying,
                "pitch_nats": each.note_nll,
            }
            for each in groups
            if each.notes
        ],
    }


def planted_motifs(
    model: PerceiverAR, tokens: Tokens, scoring: ScoringConfig, config: ReportConfig, timed: Timed
) -> dict[str, Any]:
    """NLL of motifs that occurred before, at growing distances, and of the same motifs where they did not."""
    context, latents = scoring.sizes(model.config)
    motif_tokens = min(MOTIF_TOKENS, latents // 2, context // 8)
    longest = max(map(len, tokens))
    other_tokens = sum(map(len, tokens)) - longest  # at least this many are outside the motif's piece
    distances = (*halvings(context // 2, 4 * motif_tokens), 3 * context // 4)
    found = [
        planted_copying(
            model,
            tokens,
            distance=distance,
            context=context,
            latents=latents,
            motif_tokens=motif_tokens,
            count=config.motifs,
            batch_size=scoring.batch_size,
            seed=config.seed,
            on_progress=timed(f"motifs, {distance} tokens in between"),
        )
        for distance in distances
        if distance + motif_tokens <= other_tokens and longest >= 2 * motif_tokens
    ]
    return {
        "theme_tokens": motif_tokens,
        "by_distance": [
            {
                "distance": each.distance,
                "themes": each.motifs,
                "heard": each.repeated,
                "unheard": each.new,
                "saved": each.gain,
            }
            for each in found
        ],
    }


def compare_music(
    generated: Sequence[Performance], real: Sequence[Performance], train: Pieces, seed: int
) -> dict[str, Any]:
    """Distances between generated and real music, and the longest runs that each shares with the training split."""
    corpus = [codec.decode(piece) for piece in train.tokens]
    return {
        "real_pieces": len(real),
        "distances": {
            name: {
                "distance": each.distance,
                "yardstick": each.baseline,
                "yardstick_most": each.baseline_max,
                "unit": each.unit,
                "ratio": each.ratio,
            }
            for name, each in compare(generated, real, seed=seed).items()
        },
        "copying": {
            **_shared_runs(generated, real, corpus, train, repeated_patterns=True),
            "apart_from_figures": _shared_runs(generated, real, corpus, train, repeated_patterns=False),
        },
    }


def frechet_music_distance(
    encoder: Embeds, generated: Sequence[Performance], real: Sequence[Performance], seed: int
) -> dict[str, Any] | None:
    """The Fréchet distance between the embeddings of passages; None if there are too few pieces for it."""
    cut = PassageGrid()
    sides = [
        [vectors for piece in side if len(vectors := embed_all(encoder, list(cut.cut(piece))))]
        for side in (generated, real)
    ]
    if len(sides[0]) < FEWEST_GENERATED or len(sides[1]) < FEWEST_REAL:
        return None
    found = compare_embeddings(*sides, seed=seed)
    return {
        "distance": found.distance,
        "yardstick": found.baseline,
        "yardstick_most": found.baseline_max,
        "ratio": found.distance / found.baseline if found.baseline else None,
        "pieces": found.pieces,
        "encoder": encoder.digest,
    }


def _shared_runs(
    generated: Sequence[Performance],
    real: Sequence[Performance],
    corpus: Sequence[Performance],
    train: Pieces,
    *,
    repeated_patterns: bool,
) -> dict[str, Any]:
    runs = longest_shared_runs([*generated, *real], corpus, repeated_patterns=repeated_patterns)
    ours, theirs = runs[: len(generated)], runs[len(generated) :]
    return {
        "generated": [_run(run, train) for run in ours],
        "real": [_run(run, train) for run in theirs],
        "longer_than_any_real": sum(run.notes > max(each.notes for each in theirs) for run in ours),
    }


def _run(run: SharedRun, train: Pieces) -> dict[str, Any]:
    return {**dataclasses.asdict(run), "source": train.records[run.source].name if run.notes else None}


def halvings(largest: int, smallest: int) -> tuple[int, ...]:
    """`largest`, half of it, a quarter and so on down to `smallest` (at least 1), in ascending order."""
    sizes = [largest]
    while sizes[0] // 2 >= max(smallest, 1):
        sizes.insert(0, sizes[0] // 2)
    return tuple(sizes)


def _with_latents(scoring: ScoringConfig, latents: int) -> ScoringConfig:
    """The scoring config with this many latents, and a stride that leaves at least half of them before each token."""
    return dataclasses.replace(scoring, latents=latents, stride=min(scoring.stride, max(latents // 2, 1)))


def _mean(nll: Sequence[np.ndarray]) -> float:
    """NLL in nats per token over all pieces."""
    return float(np.concatenate(nll, axis=-1).mean(dtype=np.float64))


def _range(above: int | None, up_to: int | None) -> str:
    if above is None:
        return "never"
    return f"{above:,} +" if up_to is None else f"{above:,} to {up_to:,}"
