"""The command `music-ar train-encoder`: train a piece encoder on prepared data.

It connects `data_pipeline.passage_loader` and an encoder to `training.Trainer`. Anything that needs JAX is imported in
`run`.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from app.console import CommandError, ProgressLine, Unset, check_options, check_packages, clock
from data_pipeline.augmentation.transforms import Augmentation
from data_pipeline.manifest import Manifest
from data_pipeline.passages import AUGMENTATION, PassageConfig
from music_ar.ranges import whole
from music_ar.training.config import EncoderTrainingConfig

if TYPE_CHECKING:
    from data_pipeline.passages import Passages
    from music_ar.training.log import Progress
    from music_ar.training.piece_encoding import PieceValidation
    from music_ar.training.trainer import Fitted

_VALIDATION_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class TrainEncoder:
    """Train a piece encoder on prepared data, for a number of steps or minutes.

    An encoder turns a piece or a passage into a vector: the more alike the music, the nearer the vectors, whatever the
    key and the tempo. The folder of the run holds training/ (checkpoints to resume from), log.jsonl and tensorboard/. A
    finished run adds model/. Ctrl-C and SIGTERM save a checkpoint and exit with code 0; repeat the command with
    --resume to continue.

    Example: music-ar train-encoder --data data/maestro --output runs/encoder --minutes 12

    Attributes:
        data: dataset written by `music-ar prepare`: a folder, or its address (s3://bucket/data, gs://...).
        output: folder of the run; created if missing.
        preset: size of the encoder: small, or tiny (for tests).
        mesh: what the devices share, such as data=4; see `music-ar train --help`. Default: all devices on data.
        workers: number of processes that prepare batches; 0 prepares them in the training process. Raise it if the
            device waits for data.
        resume: continue from the newest checkpoint in the folder of the run.
        training: length of the run, optimizer, losses and logging.
        passages: how passages are drawn.
        augmentation: ranges by which each view of a passage is transposed, re-timed and made louder.
    """

    data: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    output: Path
    preset: str = "small"
    mesh: Unset[str] = None
    workers: int = whole(0, 0, 1000)
    resume: bool = False
    training: tyro.conf.OmitArgPrefixes[EncoderTrainingConfig]
    passages: tyro.conf.OmitArgPrefixes[PassageConfig] = field(default_factory=PassageConfig)
    augmentation: tyro.conf.OmitArgPrefixes[Augmentation] = AUGMENTATION

    def __post_init__(self) -> None:
        check_options(self)

    def run(self) -> None:
        """Train; save the encoder if the run has reached its end."""
        check_packages("training", "train", "grain", "tensorboardX")
        from music_ar.embedding.config import PRESETS
        from music_ar.embedding.pretrained import save_encoder

        if self.preset not in PRESETS:
            raise CommandError(f"--preset must be one of {', '.join(PRESETS)}, got {self.preset}")
        fitted = self._fit()
        if not fitted.finished:
            print(f"stopped at step {fitted.step}; the same command with --resume continues the run")
            return
        folder = self.output / "model"
        save_encoder(fitted.model, folder)
        print(f"{fitted.step} steps in {clock(fitted.elapsed_s)}; the encoder is in {folder}")

    def _fit(self) -> "Fitted":
        """Train with a progress line."""
        import jax
        from flax import nnx

        from data_pipeline.passage_loader import passage_batches
        from music_ar.decoding import backend
        from music_ar.embedding.config import PRESETS
        from music_ar.embedding.encoder import PieceEncoder
        from music_ar.model.perceiver_ar import parameter_count
        from music_ar.training.mesh import make_mesh, parse_axes
        from music_ar.training.piece_encoding import PieceEncoding
        from music_ar.training.trainer import Trainer

        compute, seed = backend.select().compute, self.training.seed
        encoder = PieceEncoder(PRESETS[self.preset], rngs=nnx.Rngs(seed), compute=compute)
        passages = self._passages("train", seed)
        title = f"{parameter_count(encoder):,} parameters, {jax.device_count()} x {jax.devices()[0].device_kind}"
        with ProgressLine(title) as line:
            return Trainer(
                encoder,
                self.training,
                passage_batches(passages, self.training.batch_size, workers=self.workers),
                objective=PieceEncoding(self.training),
                output=self.output,
                data=self._description(),
                resume=self.resume,
                validate=self._validation(seed),
                mesh=make_mesh(None if self.mesh is None else parse_axes(self.mesh)),
                on_progress=lambda progress: line.report(progress.share, _describe(progress)),
            ).fit()

    def _passages(self, split: str, seed: int) -> "Passages":
        from data_pipeline.dataset import Pieces
        from data_pipeline.passages import Passages

        pieces = Pieces.open(self.data, split)
        return Passages.of(pieces, config=self.passages, augmentation=self.augmentation, seed=seed)

    def _validation(self, seed: int) -> "PieceValidation | None":
        """Return what validates the encoder on passages of the validation split, always the same; None without one."""
        from data_pipeline.passage_loader import passage_batches
        from music_ar.training.piece_encoding import PieceValidation

        if not (self.training.validate_every and Manifest.load(self.data).splits["validation"].pieces):
            return None
        iterator = passage_batches(self._passages("validation", seed), self.training.batch_size)
        return PieceValidation(self.training, [next(iterator) for _ in range(_VALIDATION_BATCHES)])

    def _description(self) -> dict[str, Any]:
        """Return what the encoder learns from; a run is not resumed with other data."""
        shards = Manifest.load(self.data).shards
        return {
            "shards": [shard.sha256 for shard in shards if shard.split == "train"],
            "passages": asdict(self.passages),
            "augmentation": asdict(self.augmentation),
        }


def _describe(progress: "Progress") -> str:
    others = progress.others
    return (
        f"step {progress.step}: loss {progress.loss:.3f}, passages {others['passage_accuracy']:.0%}, "
        f"hidden pitches {others['pitch_accuracy']:.0%}, {progress.tokens_per_s:,.0f} notes/s, "
        f"{clock(progress.eta_s)} left"
    )
