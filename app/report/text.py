"""The text of a report, in Markdown, from its metrics alone (the content of report.json)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from music_ar.decoding.sampling import SamplingOptions

Metrics = Mapping[str, Any]


def markdown(metrics: Metrics) -> str:
    """The whole report."""
    head = (
        f"{metrics['checkpoint'] or 'The shipped checkpoint'}, {metrics['parameters'] / 1e6:.1f} M parameters, on "
        f"{metrics['device']}. Context {metrics['context']:,}, {metrics['latents']:,} latents, stride "
        f"{metrics['stride']:,}. Unless another split is named, results are for {metrics['split']}. All metrics: "
        "[report.json](report.json). The documentation defines them under Results: Measuring music."
    )
    sections = (_prediction, _curves, _retrieval, _music, _memorization)
    return "\n\n".join(["# Evaluation", head, *(part for section in sections for part in section(metrics))]) + "\n"


def _prediction(metrics: Metrics) -> list[str]:
    units = ("token", "note", "second")
    splits, types = [], []
    for split, found in metrics["prediction"].items():
        score = found["score"]
        nats = [f"{score[f'nats_per_{unit}']:.4f}" for unit in units]
        splits.append([split, metrics["pieces"][split], f"{score['tokens']:,}", *nats])
        for name, of_type in found["kinds"].items():
            nats, best = f"{of_type['nats_per_token']:.4f}", f"{of_type['best_temperature']:.3f}"
            types.append([name, split, f"{of_type['tokens']:,}", nats, f"{of_type['share']:.1%}", best])
    calibration = metrics["prediction"][metrics["split"]]["calibration"]
    return [
        "## Prediction",
        "Negative log-likelihood (NLL) of real music, in nats.",
        table(["split", "pieces", "tokens", *(f"NLL per {unit}" for unit in units)], splits),
        table(["token type", "split", "tokens", "NLL per token", "share of the NLL", "best temperature"], types),
        f"Calibration: NLL is lowest at temperature {calibration['best_temperature']:.3f} (1 means calibrated), by "
        f"{calibration['gain']:.5f} nats per token.",
    ]


def _curves(metrics: Metrics) -> list[str]:
    curves = [
        table([name, *metrics[key]], [["NLL per token", *(f"{nats:.4f}" for nats in metrics[key].values())]])
        for name, key in (("latents", "latents_curve"), ("context", "context_curve"))
    ]
    return [
        "## Latents and context",
        f"NLL in nats per token by number of latents (context {metrics['context']:,}) and by context length "
        f"({metrics['curve_latents']:,} latents).",
        "![NLL by latents and context](curves.png)",
        *curves,
    ]


def _retrieval(metrics: Metrics) -> list[str]:
    natural, planted = metrics["natural_recall"], metrics["planted_recall"]
    by_distance = []
    for row in natural["by_distance"]:
        repeating = "" if row["above"] is None else f"{row['repeating']:.0%}"
        nats = map(_nats, row["pitch_nats"].values())
        by_distance.append([row["tokens_ago"], f"{row['notes']:,}", f"{row['share']:.2%}", repeating, *nats])
    contexts = [f"NLL per note, context {int(context):,}" for context in metrics["context_curve"]]
    motifs = [
        [f"{row['distance']:,}", row["themes"], *(f"{row[name]:.3f}" for name in ("unheard", "heard", "saved"))]
        for row in planted["by_distance"]
    ]
    return [
        "## Long-range retrieval",
        f"**Natural repeats.** For {natural['notes']:,} notes ({natural['share']:.2%}), the six pitches before them "
        f"last occurred {natural['short']:,} to {natural['long']:,} tokens ago. On these notes, a context of "
        f"{natural['long']:,} saves {_nats(natural['saved'])} nats per note over a context of {natural['short']:,}.",
        "![Long-range retrieval](recall.png)",
        table(["tokens ago", "notes", "share", "same pitch followed", *contexts], by_distance),
        f"**Planted motifs.** A motif of {planted['theme_tokens']} tokens, other music, the motif again; NLL in "
        "nats per token of the second occurrence, and of the same motif where it did not occur before.",
        table(["tokens in between", "motifs", "did not occur before", "occurred before", "saved"], motifs),
    ]


def _music(metrics: Metrics) -> list[str]:
    generation, distances = metrics["generation"], metrics["distances"]
    farthest = max(distances, key=lambda name: distances[name]["ratio"])
    how = f"from {generation['from']}"
    if generation["from"] is None:
        names = (field.name for field in dataclasses.fields(SamplingOptions))
        how = ", ".join(f"{name.replace('_', '-')} {generation[name]:g}" for name in names)
    prompts = f", continuing {generation['prompt_seconds']:g} s of real pieces" if generation["prompt_seconds"] else ""
    columns = ("distance", "yardstick", "yardstick_most", "ratio")
    frechet = metrics.get("frechet_music_distance")
    rows = [[name, each["unit"], *(f"{each[key]:.4g}" for key in columns)] for name, each in distances.items()]
    return [
        "## Generated and real music",
        f"{generation['pieces']} generated pieces of {generation['seconds']:g} s ({how}{prompts}) and "
        f"{metrics['real_pieces']} real excerpts of the same length. Distances are 1-Wasserstein, in the feature's "
        "unit. The baseline is the distance between as many real pieces and other real pieces: its mean and its "
        f"largest value over random splits. Largest ratio: {farthest}, {distances[farthest]['ratio']:.2f}.",
        "![Distributions of features](distributions.png)",
        table(["feature", "unit", "generated to real", "real to real", "largest real to real", "ratio"], rows),
        *([] if frechet is None else [_frechet(frechet)]),
        "![Piano rolls](rolls.png)",
    ]


def _frechet(found: Metrics) -> str:
    ratio = "" if found["ratio"] is None else f", a ratio of {found['ratio']:.2f}"
    return (
        f"Fréchet music distance, on embeddings of passages of 30 s (encoder {found['encoder'][:12]}): "
        f"{found['distance']:.4g} generated to real, {found['yardstick']:.4g} real to real (at most "
        f"{found['yardstick_most']:.4g}){ratio}. {found['pieces']} pieces a side, means over random splits."
    )


def _memorization(metrics: Metrics) -> list[str]:
    copying = metrics["copying"]
    rows, sentences = [], []
    for name, runs in (("all", copying), ("without repeated patterns", copying["apart_from_figures"])):
        for side in ("generated", "real"):
            notes = [run["notes"] for run in runs[side]]
            rows.append([name, side, len(notes), *(f"{np.percentile(notes, rank):.0f}" for rank in (0, 50, 95, 100))])
        longest = max(runs["generated"], key=lambda run: run["notes"])
        sentences.append(
            f"Notes, {name}: {runs['longer_than_any_real']} generated pieces have a longer run than any real one. "
            f"The longest is from {longest['source']}."
        )
    return [
        "## Memorization",
        "The longest run of notes of each piece that also occurs in the training split, in any key and rhythm: over "
        "all notes, and without repeated patterns of up to eight notes, such as trills, tremolos and scales.",
        table(["notes", "", "pieces", "min", "median", "95 %", "max"], rows),
        *sentences,
        "![Longest shared runs](copying.png)",
    ]


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _nats(value: float | None) -> str:
    """An NLL, or a dash if nothing was measured."""
    return "-" if value is None else f"{value:.3f}"
