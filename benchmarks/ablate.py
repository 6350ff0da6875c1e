"""Trains several configurations one after another, and scores each on validation: equal minutes, one line a run.

    python benchmarks/ablate.py data/maestro runs/ablation runs.json

`runs.json` is a list of runs, each with a name and what differs from the defaults:

    [{"name": "dropout 0.3", "preset": "small", "model": {"layers": 10}, "training": {"minutes": 10, "dropout": 0.3},
      "augmentation": {"velocity_bins": 3}, "teachers": ["runs/a/model"], "workers": 3, "latents": [1024, 512],
      "test": false}]

A run that fails is told and the next one begins. Of each finished one, OUTPUT/NAME/model holds the released model (the
weights that validated best, calibrated), OUTPUT/NAME/log.jsonl the log, and OUTPUT/results.jsonl its scores. Runs that
are in results.jsonl already are left out, and one that was interrupted is resumed; so the command can be given again.
"""

import argparse
import dataclasses
import json
import traceback
from pathlib import Path
from typing import Any

from flax import nnx

from data_pipeline.augmentation.transforms import Augmentation
from data_pipeline.loader import Pieces, batches
from music_ar.evaluation.calibration import calibrated
from music_ar.evaluation.likelihood import score
from music_ar.model.config import PRESETS
from music_ar.model.perceiver_ar import PerceiverAR, parameter_count
from music_ar.model.pretrained import load_released, save_released
from music_ar.training.log import Progress
from music_ar.training.trainer import TrainingConfig, fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that `music-ar prepare` wrote")
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", type=Path, help="JSON list of runs")
    parser.add_argument("--max-pieces", type=int, help="score only so many pieces, for a rehearsal")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = arguments.output / "results.jsonl"
    done = {json.loads(line)["name"] for line in results.read_text().splitlines()} if results.exists() else set()
    for run in json.loads(arguments.runs.read_text()):
        if run["name"] in done:
            continue
        try:
            result = train_and_score(run, arguments.data, arguments.output / run["name"], arguments.max_pieces)
        except Exception:
            traceback.print_exc()
            continue
        with results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)


def train_and_score(run: dict[str, Any], data: Path, output: Path, max_pieces: int | None) -> dict[str, Any]:
    """The run's scores in nats a token, with what it was."""
    model_config = dataclasses.replace(PRESETS[run.get("preset", "small")], **run.get("model", {}))
    config = TrainingConfig(**run["training"])
    validation = Pieces.open(data, "validation").tokens[:max_pieces]
    model = PerceiverAR(model_config, rngs=nnx.Rngs(config.seed))
    iterator: Any = batches(
        Pieces.open(data, "train"),
        context=model_config.window,
        latents=model_config.latents,
        batch_size=config.batch_size,
        seed=config.seed,
        augmentation=Augmentation(**run.get("augmentation", {})),
        workers=run.get("workers", 0),
    )

    def show(progress: Progress) -> None:
        if progress.step % 500 == 0:
            print(
                f"{run['name']}: step {progress.step}, loss {progress.loss:.4f}, rate {progress.rate:.2f}, "
                f"{progress.tokens_per_s / 1e6:.3f} M targets/s, {progress.elapsed_s:.0f} s",
                flush=True,
            )

    fitted = fit(
        model,
        config,
        iterator,
        output=output,
        teachers=[load_released(teacher) for teacher in run.get("teachers", [])],
        resume=(output / "training" / "settings.json").exists() and any((output / "training").glob("[0-9]*")),
        validate=lambda averaged: score(averaged, validation, stride=model_config.latents).nats_per_token,
        on_progress=show,
    )
    trained, calibration = calibrated(fitted.model, validation)
    save_released(trained, output / "model")
    released = load_released(output / "model")
    stride = min(512, model_config.latents)
    scores = {
        "validation, not calibrated": score(fitted.model, validation, stride=stride).nats_per_token,
        "validation float32": score(trained, validation, stride=stride).nats_per_token,
        "validation": score(released, validation, stride=stride).nats_per_token,
    }
    for latents in run.get("latents", []):
        found = score(released, validation, latents=latents, stride=max(1, latents // 4))
        scores[f"validation, {latents} latents"] = found.nats_per_token
    if run.get("test", False):
        scores["test"] = score(released, Pieces.open(data, "test").tokens[:max_pieces], stride=stride).nats_per_token
    return {
        **run,
        "parameters": parameter_count(model),
        "steps": fitted.step,
        "model_step": fitted.model_step,
        "calibration": calibration,
        "elapsed_s": round(fitted.elapsed_s, 1),
        "scores": {name: round(nats, 4) for name, nats in scores.items()},
    }


if __name__ == "__main__":
    main()
