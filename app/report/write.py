"""`write_report`: measures a model and writes text, charts, metrics and generated pieces into a folder."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from app.console import CommandError, ProgressLine
from app.report import charts, measure
from app.report.config import ReportConfig
from app.report.piano_roll import piano_rolls
from app.report.pieces import excerpts, generated_pieces
from app.report.text import markdown
from data_pipeline.dataset import Pieces
from music_ar.decoding.interface import check_generates
from music_ar.decoding.sampling import SamplingOptions
from music_ar.embedding.embedder import PieceEmbedder
from music_ar.embedding.library import shipped_encoder
from music_ar.evaluation.likelihood import ScoringConfig
from music_ar.files import write_atomically
from music_ar.metrics.distributions import FEATURES, features
from music_ar.midi.performance import Performance
from music_ar.model.perceiver_ar import PerceiverAR, parameter_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(
    folder: Path,
    model: PerceiverAR,
    splits: Mapping[str, Pieces],
    train: Pieces,
    *,
    checkpoint: str | None,
    scoring: ScoringConfig,
    max_pieces: int | None,
    config: ReportConfig,
    sampling: SamplingOptions,
) -> dict[str, dict[str, float | int]]:
    """Write the report into a folder, and return the scores of each split.

    Args:
        folder: where report.md, report.json, the charts and pieces/ go.
        model: the model to measure.
        splits: pieces of each split to score, at least two each. All other sections use the first split.
        train: pieces to search for copied passages.
        checkpoint: the model's name in the report; None for the shipped one.
        scoring: how tokens are scored.
        max_pieces: score only the first pieces of a split.
        config, sampling: what to generate and measure.

    Raises:
        CommandError: Matplotlib is not installed, a split is too small, or a piece cannot be generated.
        GenerationError: pieces are to be generated, and the model does not generate.
    """
    # These raise now, not after hours of work.
    charts.new_figure(1, 1)
    if config.generated is None:
        check_generates(model.config)
    if min(map(len, splits.values())) < 2:
        raise CommandError("a report compares real pieces with each other: every split needs at least two pieces")
    folder.mkdir(parents=True, exist_ok=True)
    first, encoder = next(iter(splits)), _encoder(config)
    scored = {split: pieces.tokens[:max_pieces] for split, pieces in splits.items()}
    with ProgressLine("measuring") as line:
        predicted = {
            split: measure.prediction(model, tokens, scoring, line.timed(f"scoring {split}"))
            for split, tokens in scored.items()
        }
        curve = measure.latents_curve(model, scored[first], scoring, line.timed)
        retrieval = measure.long_range(model, scored[first], splits[first].tokens, scoring, config, line.timed)
        real = excerpts(splits[first].tokens, config.prompt_seconds, config.seconds)
        generated = generated_pieces(model, splits[first].tokens, config, sampling, folder / "pieces", line.timed)
        line.report(0.0, "comparing with real music and with the training split")
        music = measure.compare_music(generated, real, train, config.seed)
        if encoder is not None:
            line.report(0.5, "embedding generated and real music")
            music["frechet_music_distance"] = measure.frechet_music_distance(encoder, generated, real, config.seed)
    metrics = {
        **_subject(checkpoint, model, scoring),
        "pieces": {split: len(tokens) for split, tokens in scored.items()},
        "prediction": predicted,
        "latents_curve": curve,
        **retrieval,
        "generation": {"pieces": len(generated), **_settings(config, sampling)},
        "split": first,
        **music,
    }
    for name, figure in draw(metrics, generated, real).items():
        charts.save(figure, folder / name)
    write_atomically(folder / "report.json", json.dumps(metrics, indent=1).encode() + b"\n")
    write_atomically(folder / "report.md", markdown(metrics).encode())
    return {split: found["score"] for split, found in predicted.items()}


def _encoder(config: ReportConfig) -> PieceEmbedder | None:
    """The encoder for the Fréchet music distance; None if none is named, and none ships."""
    named = config.encoder or shipped_encoder()
    return None if named is None else PieceEmbedder.from_pretrained(named)


def _subject(checkpoint: str | None, model: PerceiverAR, scoring: ScoringConfig) -> dict[str, Any]:
    """What was scored, where and how, as in report.json."""
    context, latents = scoring.sizes(model.config)
    return {
        "checkpoint": checkpoint,
        "parameters": parameter_count(model),
        "device": jax.devices()[0].device_kind,
        "context": context,
        "latents": latents,
        "stride": scoring.stride,
        "batch_size": scoring.batch_size,
    }


def _settings(config: ReportConfig, sampling: SamplingOptions) -> dict[str, Any]:
    """How the pieces were generated, as in report.json."""
    return {
        "from": None if config.generated is None else str(config.generated),
        "seconds": config.seconds,
        "prompt_seconds": config.prompt_seconds,
        "budget": config.generation_latents,
        **dataclasses.asdict(sampling),
        "seed": config.seed,
    }


def draw(
    metrics: Mapping[str, Any], generated: Sequence[Performance], real: Sequence[Performance]
) -> "dict[str, Figure]":
    """The charts of a report by file name."""
    generated_notes, real_notes = ([run["notes"] for run in metrics["copying"][of]] for of in ("generated", "real"))
    rolls = [("real", piece) for piece in real[:: max(len(real) // 2, 1)][:2]]
    return {
        "curves.png": charts.curves(metrics["latents_curve"], metrics["context_curve"]),
        "recall.png": charts.retrieval(
            metrics["natural_recall"]["by_distance"], metrics["planted_recall"]["by_distance"]
        ),
        "distributions.png": charts.distributions(_pooled(generated), _pooled(real), FEATURES),
        "copying.png": charts.shared_runs(generated_notes, real_notes),
        "rolls.png": piano_rolls(rolls + [("generated", piece) for piece in generated[:4]]),
    }


def _pooled(pieces: Sequence[Performance]) -> dict[str, np.ndarray]:
    of_each = [features(piece) for piece in pieces]
    return {name: np.concatenate([of[name] for of in of_each]) for name in FEATURES}
