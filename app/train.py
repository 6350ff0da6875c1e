"""`music-ar train`: joins prepared data, a model and `training.fit`, which knows nothing of files.

Imports what needs JAX when it runs, so that `music-ar train --help` does not wait for it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro

from app.console import CommandError, ProgressLine, clock
from data_pipeline.augment import Augmentation
from data_pipeline.prepare import Manifest
from music_ar.recipe import TrainingConfig

if TYPE_CHECKING:
    import numpy as np

    from data_pipeline.loader import Pieces
    from music_ar.model import PerceiverAR
    from music_ar.training import Batches, Progress


@dataclass(frozen=True, kw_only=True)
class Train:
    """Trains a model on prepared data, for a number of steps or of minutes.

    The run's folder gets training/ (states to resume from), log.jsonl, tensorboard/ and, at the end, model/ in
    released form: the weights that validated best, their logits calibrated on validation. SIGTERM or Ctrl-C saves the
    state and ends with exit code 0; `--resume` and the same options go on.

    Example: music-ar train --data data/maestro --output runs/small --minutes 30

    Attributes:
        data: folder that `music-ar prepare` wrote.
        output: folder of the run.
        preset: size of the model: small, small-decoder or tiny.
        teacher: models whose mean prediction the model learns beside the tokens: names of shipped checkpoints, or
            folders such as the model/ of other runs.
        workers: processes that prepare batches; for contexts so long that one core cannot keep up with the device.
        resume: go on from the newest state in `output`.
        augment: whether to transpose and stretch the pieces, but for the run's `final_fraction`.
        training: how to train.
        augmentation: how far to transpose and stretch.
    """

    data: Path
    output: Path
    preset: str = "small"
    teacher: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: none)")] = ()
    workers: int = 0
    resume: bool = False
    augment: Annotated[
        bool,
        tyro.conf.arg(
            help="use the pieces as they are: neither transposed nor stretched.",
            help_behavior_hint="(default: they are both, but for the run's --final-fraction)",
        ),
    ] = True
    training: tyro.conf.OmitArgPrefixes[TrainingConfig]
    augmentation: tyro.conf.OmitArgPrefixes[Augmentation] = field(default_factory=Augmentation)

    def run(self) -> None:
        """Trains, and writes the model in released form if the run reached its end."""
        import jax
        from flax import nnx

        from data_pipeline.loader import Pieces
        from music_ar.checkpoint import load_released, save_released
        from music_ar.evaluation import calibrated
        from music_ar.model import PRESETS, PerceiverAR, parameter_count
        from music_ar.training import fit

        if self.preset not in PRESETS:
            raise CommandError(f"--preset must be one of {', '.join(PRESETS)}; got {self.preset}")
        pieces, manifest = Pieces.open(self.data, "train"), Manifest.load(self.data)
        # Of one's own data there may be none.
        held_out = Pieces.open(self.data, "validation").tokens if manifest.splits["validation"].pieces else []
        model = PerceiverAR(PRESETS[self.preset], rngs=nnx.Rngs(self.training.seed))
        device = jax.devices()[0].device_kind
        title = f"{parameter_count(model):,} parameters, {pieces.targets:,} tokens, {jax.device_count()} x {device}"
        with ProgressLine(title) as line:
            fitted = fit(
                model,
                self.training,
                self._batches(pieces, self.augmentation if self.augment else None, self.training.seed),
                final_batches=self._batches(pieces, None, self.training.seed + 1) if self.augment else None,
                data=self._description(manifest),
                output=self.output,
                teachers=[load_released(teacher) for teacher in self.teacher],
                validate=(lambda model: _nats(model, held_out)) if held_out else None,
                resume=self.resume,
                on_progress=lambda progress: line.report(_share(progress), _describe(progress)),
            )
        if not fitted.finished:
            print(f"stopped at step {fitted.step}; the same command with --resume goes on from there")
            return
        model, released = fitted.model, self.output / "model"
        if held_out:
            model, kinds = calibrated(model, held_out)
            told = (f"{kind} × {fit['scale']:.3f} {fit['offset']:+.3f}" for kind, fit in kinds.items())
            print(f"calibrated on validation: logits of {', '.join(told)}")
        save_released(model, released)
        print(f"{fitted.step} steps in {clock(fitted.elapsed_s)}; the model is in {released}")

    def _description(self, manifest: Manifest) -> dict[str, Any]:
        """What the model learns from, so that a run is not resumed with other data or teachers."""
        from music_ar.checkpoint import identity

        shards = [shard.sha256 for shard in manifest.shards if shard.split == "train"]
        teachers = [identity(teacher)["weights_sha256"] for teacher in self.teacher]
        augmentation = asdict(self.augmentation) if self.augment else None
        return {"shards": shards, "augmentation": augmentation, "teachers": teachers}

    def _batches(self, pieces: "Pieces", augmentation: Augmentation | None, seed: int) -> "Batches":
        import jax

        from data_pipeline.loader import batches
        from music_ar.model import PRESETS

        config = PRESETS[self.preset]
        iterator = batches(
            pieces,
            context=config.window,
            latents=config.latents,
            batch_size=self.training.batch_size // jax.process_count(),
            seed=seed,
            augmentation=augmentation,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=self.workers,
        )
        return cast("Batches", iterator)  # its batches are a TypedDict, which is a dict of arrays


def _nats(model: "PerceiverAR", pieces: "Sequence[np.ndarray]") -> float:
    """A quick figure in nats a token to watch the run by.

    Every token counts once, but windows do not overlap, so some have few latents before them: `music-ar evaluate`
    finds less.
    """
    from music_ar.evaluation import score

    return score(model, pieces, stride=model.config.latents).nats_per_token


def _share(progress: "Progress") -> float:
    return progress.elapsed_s / max(progress.elapsed_s + progress.eta_s, 1e-9)


def _describe(progress: "Progress") -> str:
    mfu = "" if progress.mfu is None else f", MFU {progress.mfu:.0%}"
    return (
        f"step {progress.step}: loss {progress.loss:.3f}, {progress.tokens_per_s:,.0f} tokens/s{mfu}, "
        f"{clock(progress.eta_s)} left"
    )
