"""Train several configurations one after another and score each on the validation split.

    python benchmarks/ablate.py data/maestro runs/ablation runs.json

`runs.json` is a list of runs. Each has a name and what differs from the defaults:

    [{"name": "dropout 0.3", "preset": "small", "model": {"layers": 10}, "training": {"minutes": 10, "dropout": 0.3},
      "augmentation": {"velocity_bins": 3}, "teachers": ["runs/a/model"], "workers": 3, "latents": [1024, 512],
      "test": false}]

`model` may have a tape, such as {"tape": {"tokens": 16}}; benchmarks/tape_runs.json is a list of such runs. The result
of a run has the operations of a training step per target for each number of latents, with the mean number of tape
tokens.

If a run fails, its error is printed and the next one begins. OUTPUT/NAME/model is the model of a finished run (the
weights that validated best, calibrated), OUTPUT/NAME/log.jsonl its log, and OUTPUT/results.jsonl has the scores of all.
The command can be repeated: it skips runs that are in results.jsonl, and resumes one that was interrupted.
"""

import argparse
import dataclasses
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from flax import nnx

from data_pipeline.augmentation.transforms import Augmentation
from data_pipeline.dataset import Pieces
from data_pipeline.loader import LoaderConfig, batches
from music_ar.decoding import backend
from music_ar.evaluation.calibration import calibrate
from music_ar.evaluation.likelihood import ScoringConfig, score
from music_ar.model.config import PRESETS, ModelConfig, TapeConfig
from music_ar.model.perceiver_ar import PerceiverAR, parameter_count
from music_ar.model.pretrained import load_pretrained, save_pretrained
from music_ar.training.config import TrainingConfig
from music_ar.training.distillation import Ensemble
from music_ar.training.log import Progress
from music_ar.training.next_tokens import NextTokens
from music_ar.training.trainer import Fitted, Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="dataset written by `music-ar prepare`")
    parser.add_argument("output", type=Path, help="folder of the runs and of results.jsonl")
    parser.add_argument("runs", type=Path, help="JSON list of runs")
    parser.add_argument("--max-pieces", type=int, help="score only this many pieces, to try out the runs")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = arguments.output / "results.jsonl"
    done = {json.loads(line)["name"] for line in results.read_text().splitlines()} if results.exists() else set()
    for run in json.loads(arguments.runs.read_text()):
        if run["name"] in done:
            continue
        try:
            result = train_and_score(run, arguments.data, arguments.output / run["name"], arguments.max_pieces)
        except KeyboardInterrupt:
            sys.exit("stopped; the same command resumes the run")
        except Exception:
            traceback.print_exc()
            continue
        with results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)


def train_and_score(run: dict[str, Any], data: Path, output: Path, max_pieces: int | None) -> dict[str, Any]:
    """Return the run with its scores in nats per token."""
    validation = Pieces.open(data, "validation").tokens[:max_pieces]
    fitted = train(run, data, output, validation)
    if not fitted.finished:
        raise KeyboardInterrupt  # by a signal, which the trainer has caught
    calibrated, fits = calibrate(fitted.model, validation)
    save_pretrained(calibrated, output / "model")
    saved = load_pretrained(output / "model", compute=fitted.model.compute)
    config = ScoringConfig(stride=min(512, saved.config.latents))
    scores = {
        "validation, not calibrated": score(fitted.model, validation, config),
        "validation float32": score(calibrated, validation, config),
        "validation": score(saved, validation, config),
    }
    tape_tokens = tape_length(output)
    costs = {str(saved.config.latents): cost(saved.config, saved.config.latents, tape_tokens)}
    for latents in run.get("latents", []):
        costs[str(latents)] = cost(saved.config, latents, tape_tokens)
        with_latents = ScoringConfig(latents=latents, stride=max(1, latents // 4))
        scores[f"validation, {latents} latents"] = score(saved, validation, with_latents)
    if run.get("test", False):
        scores["test"] = score(saved, Pieces.open(data, "test").tokens[:max_pieces], config)
    return {
        **run,
        "parameters": parameter_count(saved),
        "steps": fitted.step,
        "model_step": fitted.model_step,
        "calibration": fits,
        "elapsed_s": round(fitted.elapsed_s, 1),
        "tape_tokens": tape_tokens,
        "flops_per_target": costs,
        "scores": {name: round(found.nats_per_token, 4) for name, found in scores.items()},
    }


def tape_length(output: Path) -> float | None:
    """Return how many tape tokens an example read at the end of training; None without a tape."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return next((line["tape_tokens"] for line in reversed(lines) if "tape_tokens" in line), None)


def cost(config: ModelConfig, latents: int, tape_tokens: float | None) -> float:
    """Return the operations of a training step per target with a whole prefix, so many latents and tape tokens."""
    tape = config.tape
    if tape is not None and tape_tokens is not None:
        tape = dataclasses.replace(tape, tokens=max(1, round(tape_tokens)))
    return dataclasses.replace(config, latents=latents, tape=tape).flops_per_target(config.context - latents)


def sizes_of(run: dict[str, Any]) -> ModelConfig:
    """Return the sizes of the model of a run."""
    sizes = dict(run.get("model", {}))
    if sizes.get("tape") is not None:
        sizes["tape"] = TapeConfig(**sizes["tape"])
    return dataclasses.replace(PRESETS[run.get("preset", "small")], **sizes)


def train(run: dict[str, Any], data: Path, output: Path, validation: Any) -> Fitted:
    """Train the model of a run, or resume its training."""
    compute = backend.select().compute
    model_config = sizes_of(run)
    config = TrainingConfig(**run["training"])
    loader = LoaderConfig(
        context=model_config.window,
        latents=model_config.latents,
        batch_size=config.batch_size,
        seed=config.seed,
        augmentation=Augmentation(**run.get("augmentation", {})),
        workers=run.get("workers", 0),
    )
    iterator: Any = batches(Pieces.open(data, "train"), config=loader)
    model = PerceiverAR(model_config, rngs=nnx.Rngs(config.seed), compute=compute)
    teachers = [load_pretrained(teacher, compute=compute) for teacher in run.get("teachers", [])]
    quick = ScoringConfig(stride=model_config.latents)

    def show(progress: Progress) -> None:
        if progress.step % 500 == 0:
            print(
                f"{run['name']}: step {progress.step}, loss {progress.loss:.4f}, rate {progress.rate:.2f}, "
                f"{progress.tokens_per_s / 1e6:.3f} M targets/s, {progress.elapsed_s:.0f} s",
                flush=True,
            )

    return Trainer(
        model,
        config,
        iterator,
        output=output,
        objective=NextTokens(model_config, compute, config, Ensemble(teachers) if teachers else None),
        resume=(output / "training" / "settings.json").exists() and any((output / "training").glob("[0-9]*")),
        validate=lambda averaged: score(averaged, validation, quick).nats_per_token,
        on_progress=show,
    ).fit()


if __name__ == "__main__":
    main()
