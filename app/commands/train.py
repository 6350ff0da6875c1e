"""`music-ar train`: joins prepared data, a model and `training.fit`, which knows nothing of files.

Imports what needs JAX when it runs, so that `music-ar train --help` does not wait for it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import tyro

from app.console import CommandError, ProgressLine, clock
from data_pipeline.augmentation.transforms import Augmentation
from data_pipeline.prepare import Manifest
from music_ar.training.config import TrainingConfig

if TYPE_CHECKING:
    from data_pipeline.loader import Pieces
    from music_ar.model.config import ModelConfig
    from music_ar.model.perceiver_ar import PerceiverAR
    from music_ar.training.log import Progress
    from music_ar.training.trainer import Batches


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
        preset: size of the model: small, medium, small-decoder or tiny.
        start: train on from this model, in place of random weights of `preset`: the name of a shipped checkpoint, or a
            folder such as the model/ of another run. Lower rates, such as --matrix-learning-rate 0.012 --learning-rate
            0.0008, keep more of what it knows.
        grow: first make the model of `start` as large as this preset, computing the same: small or medium.
        teacher: models whose mean prediction the model learns beside the tokens: names of shipped checkpoints, or
            folders such as the model/ of other runs.
        out_of_fold: the teachers have each been trained without a fold of this data, the first without the first, and
            so on; each teaches the pieces of that fold alone.
        folds: number of folds of about equal size to cut the data into, each composition whole in one of them.
        without_fold: the fold, from 1, that is left out: to train a teacher for `out_of_fold`.
        variations: read so many variations of each piece, in another mode, with other dynamics and another rubato, and
            the piece itself as often as all of them.
        workers: processes that prepare batches; for contexts so long that one core cannot keep up with the device.
        resume: go on from the newest state in `output`.
        augment: whether to transpose and stretch the pieces, but for the run's `final_fraction`, in which there are no
            variations either.
        training: how to train.
        augmentation: how far to transpose and stretch.
    """

    data: Path
    output: Path
    preset: str = "small"
    start: str | None = None
    grow: str | None = None
    teacher: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: none)")] = ()
    out_of_fold: bool = False
    folds: int | None = None
    without_fold: int | None = None
    variations: int = 0
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

    def __post_init__(self) -> None:
        if (self.folds is None) != (self.without_fold is None):
            raise CommandError(
                "--folds and --without-fold go together, the number of folds and the one to leave out; with "
                "--out-of-fold there are as many folds as teachers"
            )
        if self.folds is not None and self.without_fold is not None:
            if self.out_of_fold:
                raise CommandError("give either --without-fold, to train a teacher, or --out-of-fold, to be taught")
            if self.folds < 2:
                raise CommandError(f"--folds must be at least 2; got {self.folds}")
            if not 1 <= self.without_fold <= self.folds:
                raise CommandError(f"--without-fold must lie in 1..{self.folds}; got {self.without_fold}")
        if self.grow is not None and self.start is None:
            raise CommandError("--grow needs --start, the model that grows")
        if self.variations < 0:
            raise CommandError(f"--variations must be at least 0; got {self.variations}")
        if self.out_of_fold:
            if len(self.teacher) < 2:
                raise CommandError(
                    "--out-of-fold needs two or more --teacher models, each trained with --without-fold; got "
                    f"{len(self.teacher)}"
                )
            shares = self.training.accumulation * len(self.teacher)
            if self.training.batch_size % shares:
                raise CommandError(
                    "--out-of-fold: teachers have equal parts of a batch, so --batch-size must be a multiple of "
                    f"--accumulation times their number, {shares}; got {self.training.batch_size}"
                )

    def run(self) -> None:
        """Trains, and writes the model in released form if the run reached its end."""
        import jax
        from flax import nnx

        from data_pipeline.augmentation.mode_and_rubato import VIEW_SIZE
        from data_pipeline.loader import Pieces
        from music_ar.evaluation.calibration import calibrated
        from music_ar.model.config import PRESETS
        from music_ar.model.expansion import grown
        from music_ar.model.perceiver_ar import PerceiverAR, parameter_count
        from music_ar.model.pretrained import load_released, save_released
        from music_ar.training.trainer import fit

        for option, preset in (("preset", self.preset), ("grow", self.grow)):
            if preset is not None and preset not in PRESETS:
                raise CommandError(f"--{option} must be one of {', '.join(PRESETS)}; got {preset}")
        manifest, played = Manifest.load(self.data), self._parts(Pieces.open(self.data, "train"))
        # Of one's own data there may be none.
        held_out = Pieces.open(self.data, "validation").tokens if manifest.splits["validation"].pieces else []
        if self.start is None:
            fresh = replace(PRESETS[self.preset], view_size=VIEW_SIZE)
            model = PerceiverAR(fresh, rngs=nnx.Rngs(self.training.seed))
        else:
            model = load_released(self.start)
            sizes = model.config if self.grow is None else PRESETS[self.grow]
            try:
                model = grown(model, replace(sizes, view_size=VIEW_SIZE), rngs=nnx.Rngs(self.training.seed))
            except ValueError as error:
                raise CommandError(f"--start {self.start}: {error}") from error
        device = jax.devices()[0].device_kind
        targets = sum(part.targets for part in played)
        title = f"{parameter_count(model):,} parameters, {targets:,} tokens, {jax.device_count()} x {device}"
        config, seed = model.config, self.training.seed
        batches = self._batches(config, self._varied(played), self.augmentation if self.augment else None, seed)
        final = self._batches(config, played, None, seed + 1) if self.augment or self.variations else None
        with ProgressLine(title) as line:
            fitted = fit(
                model,
                self.training,
                batches,
                final_batches=final,
                data=self._description(manifest, played),
                output=self.output,
                teachers=[load_released(teacher) for teacher in self.teacher],
                out_of_fold=self.out_of_fold,
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

    def _parts(self, pieces: "Pieces") -> "list[Pieces]":
        """What a batch holds equal parts of: all pieces, those outside of a fold, or each teacher's fold."""
        if self.out_of_fold:
            return pieces.folds(len(self.teacher))
        if self.folds is None:
            return [pieces]
        folds = pieces.folds(self.folds)
        return [pieces.join(fold for number, fold in enumerate(folds, start=1) if number != self.without_fold)]

    def _varied(self, parts: "list[Pieces]") -> "list[Pieces]":
        """Each part with its variations, and with its pieces as often as these."""
        rng = np.random.default_rng(self.training.seed)
        seeds = rng.integers(2**32, size=(len(parts), self.variations)).tolist()
        return [
            part.join([*[part] * max(1, self.variations), *map(part.varied, of_part)])
            for part, of_part in zip(parts, seeds, strict=True)
        ]

    def _description(self, manifest: Manifest, parts: "list[Pieces]") -> dict[str, Any]:
        """What the model learns from, so that a run is not resumed with other data, folds or teachers."""
        from music_ar.model.pretrained import identity

        shards = [shard.sha256 for shard in manifest.shards if shard.split == "train"]
        teachers = [identity(teacher)["weights_sha256"] for teacher in self.teacher]
        augmentation = asdict(self.augmentation) if self.augment else None
        folds = None
        if self.out_of_fold or self.folds is not None:
            # How large they are tells of other folds of the same shards, too: compositions are no part of these.
            targets = [part.targets for part in parts]
            folds = {"without": self.without_fold, "of": self.folds or len(self.teacher), "targets": targets}
        return {
            "shards": shards,
            "augmentation": augmentation,
            "teachers": teachers,
            "folds": folds,
            "variations": self.variations,
            "start": None if self.start is None else identity(self.start)["weights_sha256"],
        }

    def _batches(
        self, config: "ModelConfig", parts: "list[Pieces]", augmentation: Augmentation | None, seed: int
    ) -> "Batches":
        import jax

        from data_pipeline.loader import batches

        iterator = batches(
            *parts,
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
    from music_ar.evaluation.likelihood import score

    return score(model, pieces, stride=model.config.latents).nats_per_token


def _share(progress: "Progress") -> float:
    return progress.elapsed_s / max(progress.elapsed_s + progress.eta_s, 1e-9)


def _describe(progress: "Progress") -> str:
    mfu = "" if progress.mfu is None else f", MFU {progress.mfu:.0%}"
    return (
        f"step {progress.step}: loss {progress.loss:.3f}, {progress.tokens_per_s:,.0f} tokens/s{mfu}, "
        f"{clock(progress.eta_s)} left"
    )
