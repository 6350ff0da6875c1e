"""The report of `music-ar evaluate --report`: measures a model, and writes text, pictures, figures and what it made."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from app.console import CommandError, ProgressLine
from app.report import charts
from app.report.piano_roll import draw
from data_pipeline.loader import Pieces
from data_pipeline.maestro import MidiFiles
from music_ar.decoding.sampling import SamplingOptions
from music_ar.evaluation.calibration import best_temperature
from music_ar.evaluation.likelihood import Score, score_kinds, score_tokens
from music_ar.evaluation.retrieval_probes import natural_recall, planted_recall
from music_ar.files import write_atomically
from music_ar.generator import DEFAULT_LATENTS, Generator, Request
from music_ar.metrics.distributions import FEATURES, compare, features
from music_ar.metrics.memorization import Run, longest_runs
from music_ar.midi.io import read_midi, write_midi
from music_ar.midi.performance import Performance
from music_ar.model.perceiver_ar import PerceiverAR, parameter_count
from music_ar.tokens import codec

if TYPE_CHECKING:
    from app.commands.evaluate import Evaluate

TEMPERATURES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
CURVE_LATENTS = 1024
"""The most latents to compare contexts with: few enough for a short context to have them too."""
SHORT_CONTEXT = 2048
"""What a long context is set against: what notes that return within it have anyway."""
THEME_TOKENS = 256
DRAWN_BY = ("temperature", "top_p", "min_p", "steadiness")
"""The sampling options that a report's pieces are made with."""

Tokens = Sequence[np.ndarray]
Sizes = dict[str, Any]
"""Whole numbers for `score_tokens`: context, latents, stride and batch_size."""


def write_report(
    options: "Evaluate",
    model: PerceiverAR,
    splits: Mapping[str, Pieces],
    *,
    context: int,
    latents: int,
    stride: int,
) -> dict[str, dict[str, float | int]]:
    """Writes the report to `options.report`, and returns the scores of each split.

    Raises:
        CommandError: matplotlib is missing, a split is too small, or a piece cannot be made.
        DatasetError: there is no train split to look for copies in.
    """
    folder = options.report
    assert folder is not None
    charts.blank(1, 1)  # refused now rather than after hours
    if min(map(len, splits.values())) < 2:
        raise CommandError("a report needs splits of at least two pieces, since it sets real ones beside each other")
    folder.mkdir(parents=True, exist_ok=True)
    train, first = Pieces.open(options.data, "train"), next(iter(splits))
    sizes: Sizes = {"context": context, "latents": latents, "stride": stride, "batch_size": options.batch_size}
    tokens = splits[first].tokens[: options.max_pieces]
    with ProgressLine("measuring") as line:
        scores = {
            split: prediction(model, pieces.tokens[: options.max_pieces], sizes, line.timed(f"scoring {split}"))
            for split, pieces in splits.items()
        }
        far = recall(model, tokens, splits[first].tokens, sizes, options.themes, options.seed, line.timed)
        by_latents = latent_curve(model, tokens, sizes, line.timed)
        real = excerpts(splits[first].tokens, options.prompt_seconds, options.seconds)
        generated = made(options, model, splits[first].tokens, folder, line.timed)
        line.report(0.0, "comparing with real music and with the training set")
        music = musical(generated, real, train, options.seed)
    figures = {
        "checkpoint": options.checkpoint,
        "parameters": parameter_count(model),
        "device": jax.devices()[0].device_kind,
        **sizes,
        "pieces": {split: len(pieces.tokens[: options.max_pieces]) for split, pieces in splits.items()},
        "prediction": scores,
        "latents_curve": by_latents,
        **far,
        "generation": {
            "pieces": len(generated),
            "from": None if options.made is None else str(options.made),
            **{name: getattr(options, name) for name in ("seconds", "prompt_seconds", "budget", *DRAWN_BY, "seed")},
        },
        "split": first,
        **music,
    }
    draw_all(figures, generated, real, folder)
    write_atomically(folder / "report.json", json.dumps(figures, indent=1).encode() + b"\n")
    write_atomically(folder / "report.md", markdown(figures).encode())
    return {split: of_split["score"] for split, of_split in scores.items()}


def prediction(
    model: PerceiverAR, tokens: Tokens, sizes: Sizes, on_progress: Callable[[float], None]
) -> dict[str, Any]:
    """Score, score by kind of event, and the temperature that would score best, in all and by kind."""
    nats = score_tokens(model, tokens, **sizes, temperatures=TEMPERATURES, on_progress=on_progress)
    plain = [each[TEMPERATURES.index(1.0)] for each in nats]
    kinds: dict[str, Any] = score_kinds(plain, tokens)
    at_each = [score_kinds([each[number] for each in nats], tokens) for number in range(len(TEMPERATURES))]
    for name, kind in kinds.items():
        kind["best_temperature"], _ = best_temperature(
            TEMPERATURES, np.array([of[name]["nats_per_token"] for of in at_each])
        )
    in_all = np.concatenate(nats, axis=1).mean(axis=1, dtype=np.float64)
    best, least = best_temperature(TEMPERATURES, in_all)
    return {
        "score": Score.of(float(np.concatenate(plain).sum(dtype=np.float64)), tokens).report(),
        "kinds": kinds,
        "calibration": {
            "best_temperature": best,
            "nats_per_token": least,
            "gain": float(in_all[TEMPERATURES.index(1.0)]) - least,
        },
    }


def latent_curve(
    model: PerceiverAR, tokens: Tokens, sizes: Sizes, timed: Callable[[str], Callable[[float], None]]
) -> dict[int, float]:
    """Nats a token under smaller and smaller latent budgets; each token has at least half of a budget before it."""
    found = {}
    for budget in halvings(sizes["latents"], sizes["latents"] // 8):
        stride = min(sizes["stride"], max(budget // 2, 1))
        nats = score_tokens(
            model, tokens, **{**sizes, "latents": budget, "stride": stride}, on_progress=timed(f"{budget} latents")
        )
        found[budget] = mean(nats)
    return found


def recall(
    model: PerceiverAR,
    tokens: Tokens,
    all_tokens: Tokens,
    sizes: Sizes,
    themes: int,
    seed: int,
    timed: Callable[[str], Callable[[float], None]],
) -> dict[str, Any]:
    """Nats a token against context, and what the longest one recalls, naturally and of planted themes."""
    context, latents = sizes["context"], min(sizes["latents"], CURVE_LATENTS)
    contexts = halvings(context, latents)
    of_context: Sizes = {
        "latents": latents,
        "stride": min(sizes["stride"], max(latents // 2, 1)),
        "batch_size": sizes["batch_size"],
    }
    nats = {
        each: [
            of[0]
            for of in score_tokens(model, tokens, context=each, **of_context, on_progress=timed(f"context {each}"))
        ]
        for each in contexts
    }
    natural = natural_recall(tokens, nats)
    short = max((each for each in contexts[:-1] if each <= SHORT_CONTEXT), default=contexts[0])
    between = [row for row in natural if row.above is not None and row.above >= short and row.up_to and row.notes]
    notes = sum(row.notes for row in between)
    saved = sum(row.notes * (row.saved(short, context) or 0.0) for row in between)
    theme_tokens = min(THEME_TOKENS, latents // 2, context // 8)
    longest = max(map(len, all_tokens))
    other_tokens = sum(map(len, all_tokens)) - longest  # at least so many lie beside the piece of a theme
    planted = [
        planted_recall(
            model,
            all_tokens,
            distance=distance,
            context=context,
            latents=latents,
            theme_tokens=theme_tokens,
            count=themes,
            batch_size=sizes["batch_size"],
            seed=seed,
            on_progress=timed(f"themes, {distance} tokens between"),
        )
        for distance in (*halvings(context // 2, 4 * theme_tokens), 3 * context // 4)
        if distance + theme_tokens <= other_tokens and longest >= 2 * theme_tokens
    ]
    return {
        "curve_latents": latents,
        "context_curve": {each: mean(of) for each, of in nats.items()},
        "natural_recall": {
            "short": short,
            "long": context,
            "notes": notes,
            "share": notes / sum(row.notes for row in natural),
            "saved": saved / notes if notes else None,
            "by_distance": [
                {"tokens_ago": _range(row.above, row.up_to), **dataclasses.asdict(row)} for row in natural if row.notes
            ],
        },
        "planted_recall": {
            "theme_tokens": theme_tokens,
            "by_distance": [{**dataclasses.asdict(row), "saved": row.saved} for row in planted],
        },
    }


def excerpts(tokens: Tokens, start_s: float, seconds: float) -> list[Performance]:
    """The same seconds of every piece that lasts so long, counted from its first note."""
    whole = [codec.decode(piece) for piece in tokens]
    cut = [piece.crop(at := float(piece.onset_s[0]) + start_s, at + seconds) for piece in whole if len(piece)]
    return [piece for piece in cut if len(piece)]


def spread(number: int, pieces: int, prompts: int) -> int:
    """Which of the prompts the piece of this number goes on from: few pieces take theirs from all over the split."""
    return number * prompts // pieces if pieces < prompts else number % prompts


def made(
    options: "Evaluate",
    model: PerceiverAR,
    tokens: Tokens,
    folder: Path,
    timed: Callable[[str], Callable[[float], None]],
) -> list[Performance]:
    """The pieces to judge: those of a folder, or new ones, which are written to `folder`/pieces.

    Raises:
        CommandError: the folder holds no MIDI, or a piece cannot be made.
    """
    if options.made is not None:
        with MidiFiles(options.made) as files:
            read = [read_midi(files.read(name)) for name in files.midi_names()[: options.pieces]]
        if not read:
            raise CommandError(f"{options.made} holds no MIDI file")
        return [piece.crop(0, options.seconds) for piece in read]
    sampling = SamplingOptions(**{name: getattr(options, name) for name in DRAWN_BY})
    prompts = excerpts(tokens, 0.0, options.prompt_seconds) if options.prompt_seconds else [None]
    budget = min(DEFAULT_LATENTS, model.config.latents) if options.budget is None else options.budget
    requests = [
        Request(
            prompt=prompts[spread(number, options.pieces, len(prompts))],
            seconds=options.seconds,
            latents=budget,
            options=sampling,
            seed=options.seed + number,
            continuation_only=True,
        )
        for number in range(options.pieces)
    ]
    done, report = 0.0, timed(f"making {len(requests)} pieces")

    def progress(seconds: float) -> None:
        nonlocal done
        done += seconds / (options.seconds * len(requests))
        report(min(done, 1.0))

    pieces = sorted(Generator(model).generate_many(requests, progress=progress), key=lambda piece: piece.request.seed)
    (folder / "pieces").mkdir(exist_ok=True)
    for piece in pieces:
        if piece.error is not None:
            raise CommandError(f"the piece of seed {piece.request.seed} could not be made: {piece.error}")
        write_midi(piece.continuation, folder / "pieces" / f"{piece.request.seed:04}.mid")
    return [piece.continuation for piece in pieces]


def musical(generated: Sequence[Performance], real: Sequence[Performance], train: Pieces, seed: int) -> dict[str, Any]:
    """Distances between generated and real music, and the longest runs of notes of both in the training set."""
    corpus = [codec.decode(piece) for piece in train.tokens]

    def copying(figures: bool) -> dict[str, Any]:
        runs = longest_runs([*generated, *real], corpus, figures=figures)
        ours, theirs = runs[: len(generated)], runs[len(generated) :]
        return {
            "generated": [_run(run, train) for run in ours],
            "real": [_run(run, train) for run in theirs],
            "longer_than_any_real": sum(run.notes > max(each.notes for each in theirs) for run in ours),
        }

    return {
        "real_pieces": len(real),
        "distances": {
            name: {**dataclasses.asdict(each), "ratio": each.ratio}
            for name, each in compare(generated, real, seed=seed).items()
        },
        "copying": {**copying(figures=True), "apart_from_figures": copying(figures=False)},
    }


def _run(run: Run, train: Pieces) -> dict[str, Any]:
    return {**dataclasses.asdict(run), "source": train.records[run.source].name if run.notes else None}


def draw_all(
    figures: Mapping[str, Any], generated: Sequence[Performance], real: Sequence[Performance], folder: Path
) -> None:
    """Draws the pictures that the report shows."""
    charts.draw_curves(figures["latents_curve"], figures["context_curve"], folder / "curves.png")
    charts.draw_recall(
        figures["natural_recall"]["by_distance"], figures["planted_recall"]["by_distance"], folder / "recall.png"
    )
    charts.draw_distributions(_pooled(generated), _pooled(real), FEATURES, folder / "distributions.png")
    made, usual = ([run["notes"] for run in figures["copying"][side]] for side in ("generated", "real"))
    charts.draw_runs(made, usual, folder / "copying.png")
    rolls = [("real", piece) for piece in real[:: max(len(real) // 2, 1)][:2]]
    draw(rolls + [("generated", piece) for piece in generated[:4]], folder / "rolls.png")


def _pooled(pieces: Sequence[Performance]) -> dict[str, np.ndarray]:
    of_each = [features(piece) for piece in pieces]
    return {name: np.concatenate([of[name] for of in of_each]) for name in FEATURES}


def markdown(figures: Mapping[str, Any]) -> str:
    """The report as text, from its figures alone."""
    head = (
        f"{figures['checkpoint'] or 'The shipped checkpoint'}, {figures['parameters'] / 1e6:.1f} M parameters, on "
        f"{figures['device']}. Context {figures['context']:,}, {figures['latents']:,} latents, windows of "
        f"{figures['stride']:,} targets. What is not said to be of another split is of {figures['split']}. How each "
        "figure is measured: docs/evaluation.md in the source; all of them: [report.json](report.json)."
    )
    sections = (_prediction_text, _curves_text, _recall_text, _music_text, _copying_text)
    return "\n\n".join(["# Evaluation", head, *(part for section in sections for part in section(figures))]) + "\n"


def _prediction_text(figures: Mapping[str, Any]) -> list[str]:
    units = ("token", "note", "second")
    scores, kinds = [], []
    for split, found in figures["prediction"].items():
        score = found["score"]
        nats = [f"{score[f'nats_per_{unit}']:.4f}" for unit in units]
        scores.append([split, figures["pieces"][split], f"{score['tokens']:,}", *nats])
        for name, kind in found["kinds"].items():
            nats, best = f"{kind['nats_per_token']:.4f}", f"{kind['best_temperature']:.3f}"
            kinds.append([name, split, f"{kind['tokens']:,}", nats, f"{kind['share']:.1%}", best])
    calibration = figures["prediction"][figures["split"]]["calibration"]
    return [
        "## Prediction",
        table(["split", "pieces", "tokens", *(f"nats a {unit}" for unit in units)], scores),
        table(["kind of event", "split", "tokens", "nats a token", "share of all nats", "best temperature"], kinds),
        f"Calibration: likelihood is best at temperature {calibration['best_temperature']:.3f} (1 is calibrated), by "
        f"{calibration['gain']:.5f} nats a token.",
    ]


def _curves_text(figures: Mapping[str, Any]) -> list[str]:
    curves = [
        table([name, *figures[of]], [["nats a token", *(f"{each:.4f}" for each in figures[of].values())]])
        for name, of in (("latents", "latents_curve"), ("context", "context_curve"))
    ]
    return [
        "## Latents and context",
        f"Nats a token against latents (context {figures['context']:,}) and against context "
        f"({figures['curve_latents']:,} latents).",
        "![Nats against latents and context](curves.png)",
        *curves,
    ]


def _recall_text(figures: Mapping[str, Any]) -> list[str]:
    natural, planted = figures["natural_recall"], figures["planted_recall"]
    by_distance = []
    for row in natural["by_distance"]:
        repeating = "" if row["above"] is None else f"{row['repeating']:.0%}"
        nats = map(number, row["pitch_nats"].values())
        by_distance.append([row["tokens_ago"], f"{row['notes']:,}", f"{row['share']:.2%}", repeating, *nats])
    contexts = [f"nats, context {context:,}" for context in figures["context_curve"]]
    themes = [
        [f"{row['distance']:,}", row["themes"], *(f"{row[name]:.3f}" for name in ("unheard", "heard", "saved"))]
        for row in planted["by_distance"]
    ]
    return [
        "## Recall",
        f"**Natural recall.** {natural['notes']:,} notes ({natural['share']:.2%}) come where the last six pitches last "
        f"occurred {natural['short']:,} to {natural['long']:,} tokens ago. On these, a context of {natural['long']:,} "
        f"saves {number(natural['saved'])} nats a note over one of {natural['short']:,}.",
        "![Recall](recall.png)",
        table(["tokens ago", "notes", "share", "same pitch as then", *contexts], by_distance),
        f"**Planted recall.** A theme of {planted['theme_tokens']} tokens, other music, the theme again.",
        table(["tokens between", "themes", "nats a token, not heard before", "heard before", "saved"], themes),
    ]


def _music_text(figures: Mapping[str, Any]) -> list[str]:
    made, distances = figures["generation"], figures["distances"]
    farthest = max(distances, key=lambda name: distances[name]["ratio"])
    how = f"from {made['from']}"
    if made["from"] is None:
        how = ", ".join(f"{name.replace('_', '-')} {made[name]:g}" for name in DRAWN_BY)
    after = f", going on from {made['prompt_seconds']:g} s of real pieces" if made["prompt_seconds"] else ""
    rows = [
        [name, each["unit"], *(f"{each[of]:.4g}" for of in ("distance", "yardstick", "yardstick_most", "ratio"))]
        for name, each in distances.items()
    ]
    return [
        "## Generated beside real",
        f"{made['pieces']} pieces of {made['seconds']:g} s ({how}{after}) beside as much of {figures['real_pieces']} "
        "real ones. Distances are 1-Wasserstein, in the figure's unit; the yardstick is that between real pieces, as "
        "many as were made, and other real pieces: its mean and its largest over some draws. Largest ratio: "
        f"{farthest}, {distances[farthest]['ratio']:.2f}.",
        "![Distributions](distributions.png)",
        table(["figure", "unit", "generated to real", "real to real", "at most", "ratio"], rows),
        "![Piano rolls](rolls.png)",
    ]


def _copying_text(figures: Mapping[str, Any]) -> list[str]:
    ways = {"all": figures["copying"], "apart from figures that go on": figures["copying"]["apart_from_figures"]}
    rows, told = [], []
    for way, copying in ways.items():
        for side in ("generated", "real"):
            notes = [run["notes"] for run in copying[side]]
            rows.append([way, side, len(notes), *(f"{np.percentile(notes, share):.0f}" for share in (0, 50, 95, 100))])
        longest = max(copying["generated"], key=lambda run: run["notes"])
        told.append(
            f"Notes, {way}: {copying['longer_than_any_real']} generated pieces have a longer run than any real one. "
            f"The longest is from {longest['source']}."
        )
    return [
        "## Copying",
        "The longest run of notes of each piece, in any key and rhythm, that stands in the training set: of all notes, "
        "and apart from those that only go on with a figure of at most eight, as trills, tremolos and scales do.",
        table(["notes", "", "pieces", "least", "median", "95 %", "most"], rows),
        *told,
        "![Copied runs](copying.png)",
    ]


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def number(value: float | None) -> str:
    """Nats, or a dash where there is nothing to measure."""
    return "-" if value is None else f"{value:.3f}"


def halvings(largest: int, smallest: int) -> tuple[int, ...]:
    """`largest`, its half and so on, down to `smallest` (1 at least) at the lowest; rising."""
    sizes = [largest]
    while sizes[0] // 2 >= max(smallest, 1):
        sizes.insert(0, sizes[0] // 2)
    return tuple(sizes)


def mean(nats: Sequence[np.ndarray]) -> float:
    """Nats a token over all pieces."""
    return float(np.concatenate(nats, axis=-1).mean(dtype=np.float64))


def _range(above: int | None, up_to: int | None) -> str:
    if above is None:
        return "never"
    return f"{above:,} +" if up_to is None else f"{above:,} to {up_to:,}"
