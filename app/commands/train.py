"""The command `music-ar train`: train a model on prepared data.

It connects the data pipeline and a model to `training.Trainer`, which does not know where batches come from. Anything
that needs JAX is imported in `run`, so `music-ar train --help` does not wait for it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import tyro

from app.commands.hosts import code_and_packages, run_together
from app.console import CommandError, ProgressLine, Unset, check_options, check_packages, clock
from data_pipeline.augmentation.transforms import Augmentation
from data_pipeline.manifest import Manifest, text_digest
from data_pipeline.window_wishes import WindowWishes, WishDropout
from music_ar.ranges import number, whole
from music_ar.training.config import TrainingConfig

if TYPE_CHECKING:
    from data_pipeline.dataset import Pieces
    from data_pipeline.sources import Source
    from music_ar.features.wishes import WishTable
    from music_ar.model.config import Compute, ModelConfig
    from music_ar.model.perceiver_ar import PerceiverAR
    from music_ar.training.cluster import Hosts
    from music_ar.training.distillation import Teachers
    from music_ar.training.log import Progress
    from music_ar.training.trainer import Batches, Fitted


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model on prepared data, for a number of steps or minutes.

    The folder of the run holds training/ (checkpoints to resume from), log.jsonl and tensorboard/. A finished run adds
    model/: the weights that validated best, with logits calibrated on the validation split. Ctrl-C and SIGTERM save a
    checkpoint and exit with code 0; repeat the command with --resume to continue.

    Example: music-ar train --data data/maestro --output runs/small --minutes 30

    Attributes:
        data: dataset written by `music-ar prepare`: a folder, or its address (s3://bucket/data, gs://...). Give either
            this or --sources.
        sources: table of several datasets, in place of --data: a CSV file with the columns source, data and share. The
            shares say how much of the training each gets. The run is validated on the first; --final-fraction and
            folds use the first alone. With --wishes, the model learns the names.
        output: folder of the run; created if missing.
        preset: size of the model: small (the shipped one), medium, large (for several devices), tiny (for tests), or a
            baseline: small-decoder (a decoder-only Transformer) or small-xl (Transformer-XL).
        start: model to fine-tune: the name of a shipped model, or a folder such as the model/ of another run. Lower
            learning rates, such as --muon-learning-rate 0.012 --adamw-learning-rate 0.0008, keep more of what it knows.
            Default: random weights of the preset.
        expand_to: expand the --start model to this larger preset (small or medium) before training. It computes the
            same function until it is trained. Default: keep its size.
        exits: numbers of blocks, such as 2 4 6, after which the model also learns to predict, so that decoding may stop
            there (early exits); see --exit-weight and --layer-dropout. Default: those of the --start model, or none.
        teacher: models to distill: the trained model also learns their mean prediction. Names of shipped models, or
            folders such as the model/ of other runs. A teacher that cannot fill gaps teaches the windows without one.
        out_of_fold: cross-fitted distillation: each teacher teaches only the fold that it was not trained on. Train
            teacher k with --without-fold k, and list the teachers in that order.
        folds: number of folds of about equal size to split the data into; no composition is in two of them. Needed with
            --without-fold only.
        without_fold: train on all folds but this one, counted from 1. Use it to train a teacher for --out-of-fold.
            Default: train on all data.
        wishes: teach the model wishes (density, loudness, composer and so on), which generation may then give or leave
            out. A --start model that takes wishes keeps those that it has.
        augmented_copies: number of augmented copies of each piece (other mode, dynamics and rubato) to train on;
            originals are oversampled to match. Use it against overfitting.
        mesh: what the devices share, such as data=4,fsdp=2. Each axis has a number of devices, and their product is
            the number of all: data splits the batch; fsdp splits it too, and with it the parameters and the optimizer's
            state, for large models; sequence splits the context, for long ones. Default: all devices on data.
        infill: share of the training windows that are re-ordered so that the model learns to fill gaps: 0.5 trains it
            to fill them and to continue pieces. A model that starts without the tokens for it gets them.
        workers: number of processes that prepare batches; 0 prepares them in the training process. Raise it if the
            device waits for data, as it may with a long context.
        resume: continue from the newest checkpoint in the folder of the run.
        augment: whether to transpose and stretch the pieces, except in the --final-fraction of the run.
        coordinator: HOST:PORT of process 0, to train on many hosts; repeat the command on each. Default: as the
            launcher says (Slurm, Open MPI, a TPU pod, a Kubernetes Job, SkyPilot, or MASTER_ADDR and MASTER_PORT).
        processes: number of processes that train together. Default: as the launcher says. 1 trains alone, whatever it
            says.
        process: number of this one, from 0. Default: as the launcher says.
        join_timeout: seconds to wait for all processes.
        training: length of the run, optimizer, regularization and logging.
        augmentation: ranges of the augmentation of training windows.
        wish_dropout: how often training windows come without wishes.
    """

    data: Annotated[Unset[str], tyro.conf.arg(metavar="FOLDER")] = None
    sources: Unset[Path] = None
    output: Path
    preset: str = "small"
    start: Unset[str] = None
    expand_to: Unset[str] = None
    exits: Annotated[tuple[int, ...], tyro.conf.arg(help_behavior_hint="")] = whole((), 1, 1000)
    teacher: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: none)")] = ()
    out_of_fold: bool = False
    folds: Unset[int] = whole(None, 2, 1000)
    without_fold: Unset[int] = whole(None, 1, 1000)
    wishes: bool = False
    augmented_copies: int = whole(0, 0, 1000)
    mesh: Unset[str] = None
    infill: float = number(0.0, least=0, most=1)
    workers: int = whole(0, 0, 1000)
    resume: bool = False
    augment: Annotated[
        bool,
        tyro.conf.arg(
            help="train on the pieces as they are, neither transposed nor stretched. Use it if keys or tempi matter.",
            help_behavior_hint="(default: augmented, except in the --final-fraction of the run)",
        ),
    ] = True
    coordinator: Unset[str] = None
    processes: Unset[int] = whole(None, 1, 2**16)
    process: Unset[int] = whole(None, 0, 2**16)
    join_timeout: float = number(300.0, above=0, most=86_400)
    training: tyro.conf.OmitArgPrefixes[TrainingConfig]
    augmentation: tyro.conf.OmitArgPrefixes[Augmentation] = field(default_factory=Augmentation)
    wish_dropout: tyro.conf.OmitArgPrefixes[WishDropout] = field(default_factory=WishDropout)

    def __post_init__(self) -> None:
        check_options(self)
        if (self.data is None) == (self.sources is None):
            raise CommandError(f"expected either --data or --sources, got {'both' if self.data else 'neither'}")
        if self.expand_to is not None and self.start is None:
            raise CommandError("--expand-to needs --start, the model to expand")
        self._check_folds()
        if self.out_of_fold:
            self._check_cross_fitting()

    def _check_folds(self) -> None:
        if self.folds is None and self.without_fold is None:
            return
        if self.folds is None or self.without_fold is None:
            raise CommandError(
                "--folds and --without-fold must be given together; with --out-of-fold the number of folds is the "
                "number of teachers"
            )
        if self.out_of_fold:
            raise CommandError("give either --without-fold, to train a teacher, or --out-of-fold, to train its student")
        if self.without_fold > self.folds:
            raise CommandError(f"--without-fold must be in 1..{self.folds}, got {self.without_fold}")

    def _check_cross_fitting(self) -> None:
        if len(self.teacher) < 2:
            raise CommandError(
                "--out-of-fold needs two or more --teacher models, each trained with --without-fold, got "
                f"{len(self.teacher)}"
            )
        parts = self.training.micro_batches * len(self.teacher)
        if self.training.batch_size % parts:
            raise CommandError(
                f"--out-of-fold: --batch-size must be a multiple of {parts}, which is --micro-batches times the number "
                f"of teachers, got {self.training.batch_size}"
            )

    def run(self) -> None:
        """Train; save the pretrained model if the run has reached its end."""
        check_packages("training", "train", "grain", "tensorboardX")
        from music_ar.training.cluster import Alone, find

        place = find(self.coordinator, self.processes, self.process, self.join_timeout)
        if place is None:
            self._train(Alone())
        else:
            run_together(place, self._common(), self._train, timeout_s=self.join_timeout)

    def _common(self) -> dict[str, Any]:
        """Return what must be the same on all hosts of a run."""
        own = {"data", "sources", "output", "coordinator", "processes", "process", "join_timeout"}
        groups = {"training", "augmentation", "wish_dropout"}
        options = {name: value for name, value in vars(self).items() if name not in own | groups}
        options |= asdict(self.training) | asdict(self.augmentation) | asdict(self.wish_dropout)
        sources = [(each.name, each.share, asdict(Manifest.load(each.data))) for each in self._sources()]
        data = text_digest(json.dumps(sources))[:12]
        named = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
        return code_and_packages() | {"the data": data} | named

    def _train(self, hosts: "Hosts") -> None:
        """Train; process 0 saves the pretrained model if the run has reached its end."""
        from data_pipeline.dataset import Pieces
        from music_ar.decoding import backend

        compute = backend.select().compute
        sources = self._sources()
        manifests, main = [Manifest.load(source.data) for source in sources], sources[0].data
        opened = [Pieces.open(source.data, "train", source=source.name) for source in sources]
        parts, beside = self._parts(opened[0]), opened[1:]
        # A user's own data may have no validation split.
        held_out = Pieces.open(main, "validation").tokens if manifests[0].splits["validation"].pieces else ()
        model = self._initial_model(compute, opened)
        teachers = self._teachers(model, compute)
        fitted = self._fit(model, sources, manifests, parts, beside, held_out, teachers, hosts)
        if hosts.process > 0:
            return
        if fitted.finished:
            self._save(fitted, held_out)
        else:
            print(f"stopped at step {fitted.step}; the same command with --resume continues the run")

    def _sources(self) -> "list[Source]":
        """Return the datasets to train on, the one to validate on first."""
        from data_pipeline.sources import Source, read_sources

        if self.sources is not None:
            return read_sources(self.sources)
        assert self.data is not None
        return [Source(name=None, data=self.data)]

    def _parts(self, pieces: "Pieces") -> "list[Pieces]":
        """Return the groups that a batch draws from equally: all pieces, all folds but one, or one fold per teacher."""
        if self.out_of_fold:
            return pieces.folds(len(self.teacher))
        if self.folds is None:
            return [pieces]
        folds = pieces.folds(self.folds)
        return [pieces.join(fold for number, fold in enumerate(folds, start=1) if number != self.without_fold)]

    def _initial_model(self, compute: "Compute", parts: "list[Pieces]") -> "PerceiverAR":
        """Return a model of the preset, or the start model, expanded if asked for."""
        from flax import nnx

        from data_pipeline.augmentation.mode_and_rubato import LABEL_SIZE
        from music_ar.model.config import PRESETS
        from music_ar.model.expansion import expand
        from music_ar.model.perceiver_ar import PerceiverAR
        from music_ar.model.pretrained import load_pretrained

        for option, preset in (("preset", self.preset), ("expand-to", self.expand_to)):
            if preset is not None and preset not in PRESETS:
                raise CommandError(f"--{option} must be one of {', '.join(PRESETS)}, got {preset}")
        rngs = nnx.Rngs(self.training.seed)
        if self.start is None:
            config = PRESETS[self.preset]
            config = self._changed(config, LABEL_SIZE, self._wish_table(None, config.latents, parts))
            return PerceiverAR(config, rngs=rngs, compute=compute)
        model = load_pretrained(self.start, compute=compute)
        config = model.config if self.expand_to is None else PRESETS[self.expand_to]
        kept = {"exits": model.config.exits, "vocabulary_size": model.config.vocabulary_size}
        wishes = self._wish_table(model.config.wishes, config.latents, parts)
        config = self._changed(replace(config, **kept), LABEL_SIZE, wishes)
        try:
            return expand(model, config, rngs=rngs)
        except ValueError as error:
            raise CommandError(f"--start {self.start}: {error}") from error

    def _wish_table(self, known: "WishTable | None", latents: int, parts: "list[Pieces]") -> "WishTable | None":
        """Return the wishes that the model will take: those it knows, or with --wishes those that the data allows."""
        from data_pipeline.wish_table import wish_table

        if known is None:
            return wish_table(parts, latents) if self.wishes else None
        new = [part.source for part in parts if part.source is not None and part.source not in known.sources]
        if new:
            raise CommandError(
                f"--sources: the --start model knows the sources {', '.join(known.sources) or 'none'} and cannot learn "
                f"new ones; use these names in place of {', '.join(new)}"
            )
        return known

    def _changed(self, config: "ModelConfig", label_size: int, wishes: "WishTable | None") -> "ModelConfig":
        """Return the config with a label, wishes, the tokens of gaps if they are trained and, if given, other exits."""
        config = replace(config, label_size=label_size, wishes=wishes, vocabulary_size=self._vocabulary(config))
        try:
            return replace(config, exits=self.exits or config.exits)
        except ValueError as error:
            given = ", ".join(map(str, self.exits))
            raise CommandError(
                f"--exits must rise and be below the model's {config.layers} blocks, got {given}"
            ) from error

    def _vocabulary(self, config: "ModelConfig") -> int:
        """Return the size of the vocabulary: with the tokens of gaps if they are trained, or if the start has them."""
        from music_ar.tokens.vocabulary import INFILL_VOCABULARY_SIZE

        return max(config.vocabulary_size, INFILL_VOCABULARY_SIZE if self.infill else 0)

    def _teachers(self, student: "PerceiverAR", compute: "Compute") -> "Teachers | None":
        from music_ar.model.pretrained import load_pretrained
        from music_ar.training.distillation import CrossFitted, Ensemble

        if not self.teacher:
            return None
        models = [load_pretrained(teacher, compute=compute) for teacher in self.teacher]
        for name, model in zip(self.teacher, models, strict=True):
            if model.config.fills_gaps and not student.config.fills_gaps:
                raise CommandError(
                    f"--teacher {name} has the tokens to fill gaps and the model has not; take a teacher without them, "
                    "or add --infill"
                )
            if student.config.wishes and model.config.wishes not in (None, student.config.wishes):
                raise CommandError(
                    f"--teacher {name} takes other wishes than the model; take one without, or with the same"
                )
        return CrossFitted(models) if self.out_of_fold else Ensemble(models)

    def _fit(
        self,
        model: "PerceiverAR",
        sources: "list[Source]",
        manifests: "list[Manifest]",
        parts: "list[Pieces]",
        beside: "list[Pieces]",
        held_out: "Sequence[np.ndarray]",
        teachers: "Teachers | None",
        hosts: "Hosts",
    ) -> "Fitted":
        """Train with a progress line."""
        import jax

        from music_ar.evaluation.likelihood import quick_nll
        from music_ar.model.perceiver_ar import parameter_count
        from music_ar.training.mesh import make_mesh, parse_axes, process_rows
        from music_ar.training.next_tokens import NextTokens
        from music_ar.training.trainer import Trainer

        mesh = make_mesh(None if self.mesh is None else parse_axes(self.mesh))
        targets, device = sum(part.targets for part in [*parts, *beside]), jax.devices()[0].device_kind
        title = f"{parameter_count(model):,} parameters, {targets:,} tokens, {jax.device_count()} x {device}"
        config, seed = model.config, self.training.seed
        plain = self.augmented_copies == 0 and not self.augment and self.sources is None
        shares = None if self.sources is None else tuple(source.share for source in sources)
        copied = self._with_copies([*parts, *beside])
        rows = None if jax.process_count() == 1 else process_rows(mesh, self.training.batch_size)
        with ProgressLine(title) as line:
            return Trainer(
                model,
                self.training,
                self._batches(
                    config,
                    copied[: len(parts)],
                    copied[len(parts) :],
                    self.augmentation if self.augment else None,
                    seed,
                    rows,
                    shares,
                ),
                final_batches=None if plain else self._batches(config, parts, [], None, seed + 1, rows, None),
                data=self._description(model, sources, manifests, parts),
                output=self.output,
                objective=NextTokens(model.config, model.compute, self.training, teachers),
                validate=(lambda averaged: quick_nll(averaged, held_out)) if held_out else None,
                resume=self.resume,
                mesh=mesh,
                hosts=hosts,
                on_progress=lambda progress: line.report(progress.share, _describe(progress)),
            ).fit()

    def _save(self, fitted: "Fitted", held_out: "Sequence[np.ndarray]") -> None:
        """Calibrate the model and fit its exits, if there is a validation split, and save it."""
        from music_ar.evaluation.calibration import calibrate
        from music_ar.evaluation.exit_costs import fit_exit_costs, without_exit_costs
        from music_ar.model.pretrained import save_pretrained

        model, folder = fitted.model, self.output / "model"
        if held_out:
            model, fits = calibrate(model, held_out)
            by_type = (f"{name} × {fit['scale']:.3f} {fit['offset']:+.3f}" for name, fit in fits.items())
            print(f"logits calibrated on the validation split: {', '.join(by_type)}")
            if model.config.exits:
                model, costs = fit_exit_costs(model, held_out)
                by_exit = ", ".join(f"{nats:.3f} after {depth}" for depth, nats in costs.items())
                print(f"nats that leaving early costs on average, by layers: {by_exit}")
        elif model.config.exits:
            model = without_exit_costs(model)
            print(
                "no event of this model will leave early, whatever --tolerance: the cost of that is measured on a "
                "validation split, and the data has none; prepare it with --validation above 0"
            )
        save_pretrained(model, folder)
        print(f"{fitted.step} steps in {clock(fitted.elapsed_s)}; the model is in {folder}")

    def _with_copies(self, parts: "list[Pieces]") -> "list[Pieces]":
        """Return each part with its augmented copies, and its originals repeated once per copy."""
        rng = np.random.default_rng(self.training.seed)
        seeds = rng.integers(2**32, size=(len(parts), self.augmented_copies)).tolist()
        return [
            part.join([*[part] * max(1, self.augmented_copies), *map(part.augmented_copies, of_part)])
            for part, of_part in zip(parts, seeds, strict=True)
        ]

    def _description(
        self, model: "PerceiverAR", sources: "list[Source]", manifests: list[Manifest], parts: "list[Pieces]"
    ) -> dict[str, Any]:
        """Return what the model learns from; a run is not resumed with other data, folds or teachers."""
        from music_ar.model.weights import identity

        folds = None
        if self.out_of_fold or self.folds is not None:
            # Folds depend on the compositions, which the shards do not contain; their sizes give other folds away.
            targets = [part.targets for part in parts]
            folds = {"without": self.without_fold, "of": self.folds or len(self.teacher), "targets": targets}
        # Named only if they are used: a run that an earlier version began goes on.
        shares = {} if self.sources is None else {"shares": {str(source.name): source.share for source in sources}}
        wishes = {} if model.config.wishes is None else {"wish_dropout": asdict(self.wish_dropout)}
        return {
            "shards": [shard.sha256 for each in manifests for shard in each.shards if shard.split == "train"],
            "augmentation": asdict(self.augmentation) if self.augment else None,
            "teachers": [identity(teacher)["weights_sha256"] for teacher in self.teacher],
            "folds": folds,
            "augmented_copies": self.augmented_copies,
            "start": None if self.start is None else identity(self.start)["weights_sha256"],
            **({"infill": self.infill} if self.infill else {}),
            **shares,
            **wishes,
        }

    def _batches(
        self,
        config: "ModelConfig",
        parts: "list[Pieces]",
        beside: "list[Pieces]",
        augmentation: Augmentation | None,
        seed: int,
        rows: tuple[int, ...] | None,
        shares: tuple[float, ...] | None,
    ) -> "Batches":
        from data_pipeline.gaps import Gaps
        from data_pipeline.loader import LoaderConfig, batches

        loader = LoaderConfig(
            context=config.window,
            latents=config.latents,
            batch_size=self.training.batch_size,
            seed=seed,
            augmentation=augmentation,
            wishes=None if config.wishes is None else WindowWishes(table=config.wishes, dropout=self.wish_dropout),
            shares=shares,
            rows=rows,
            gaps=Gaps(share=self.infill, context=config.context) if self.infill else None,
            workers=self.workers,
        )
        # Its batches are TypedDicts, so dicts of arrays.
        return cast("Batches", batches(*parts, beside=beside, config=loader))


def _describe(progress: "Progress") -> str:
    mfu = "" if progress.mfu is None else f", MFU {progress.mfu:.0%}"
    return (
        f"step {progress.step}: loss {progress.loss:.3f}, {progress.tokens_per_s:,.0f} tokens/s{mfu}, "
        f"{clock(progress.eta_s)} left"
    )
