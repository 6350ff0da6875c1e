"""`TrainingConfig` and `TrainingError`; importing them does not import JAX."""

import dataclasses

from music_ar.ranges import check_ranges, number, whole

_MAX_STEPS = 10**9
_MAX_MINUTES = 60 * 24 * 365


class TrainingError(ValueError):
    """Training cannot start or continue; the message says why and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Options of a training run, whatever is trained. Saved beside its checkpoints and compared when it is resumed.

    Attributes:
        steps: length of the run in optimizer steps; give either this or minutes.
        minutes: length of the run in minutes of wall-clock time, compilation included.
        batch_size: training examples per step, over all devices and processes.
        micro_batches: number of parts in which each batch is processed, one after another. The gradient stays the same;
            raise it if a batch does not fit in memory.
        muon_learning_rate: peak learning rate of Muon, which trains the hidden matrices.
        adamw_learning_rate: peak learning rate of AdamW, which trains embedding, output head, norms and biases.
        weight_decay: weight decay of the hidden matrices, multiplied by their learning rate. Raise it against
            overfitting.
        warmup_steps: steps over which the learning rate rises linearly from zero.
        decay_fraction: fraction of the run, at its end, over which the learning rate falls linearly to zero.
        clip_norm: largest global norm of the gradient; larger gradients are scaled down to it.
        ema_decay: decay per step of the moving average of the weights. The average is what is validated and saved.
        dropout: dropout rate of each block's output. Raise it against overfitting.
        seed: random seed of initialization, dropout and the order of the data.
        log_every: steps between log lines; each reports means over these steps.
        checkpoint_minutes: minutes between training checkpoints.
        validate_every: steps between validations; 0 turns validation off.
    """

    steps: int | None = whole(None, 1, _MAX_STEPS)
    minutes: float | None = number(None, above=0, most=_MAX_MINUTES)
    batch_size: int = whole(16, 1, 2**16)
    micro_batches: int = whole(1, 1, 2**16)
    muon_learning_rate: float = number(0.03, least=0, most=10)
    adamw_learning_rate: float = number(2e-3, least=0, most=10)
    weight_decay: float = number(0.1, least=0, most=100)
    warmup_steps: int = whole(100, 0, _MAX_STEPS)
    decay_fraction: float = number(0.9, least=0, most=1)
    clip_norm: float = number(1.0, above=0, most=1e9)
    ema_decay: float = number(0.9995, least=0, most=1)
    dropout: float = number(0.1, least=0, most=1)
    seed: int = whole(0, 0, 2**31 - 1)
    log_every: int = whole(20, 1, _MAX_STEPS)
    checkpoint_minutes: float = number(5.0, least=0, most=_MAX_MINUTES)
    validate_every: int = whole(2000, 0, _MAX_STEPS)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise TrainingError(f"give either steps or minutes; got steps={self.steps}, minutes={self.minutes}")
        check_ranges(self, TrainingError)
        if self.batch_size % self.micro_batches:
            raise TrainingError(
                f"batch_size must be a multiple of micro_batches, got {self.batch_size} and {self.micro_batches}"
            )

    @property
    def final_start(self) -> float:
        """Fraction of the run after which it trains on other data."""
        return 1.0

    def learning_rate_factor(self, step: int, progress: float) -> float:
        """Return the learning rate as a fraction of its peak: warm-up, constant, linear decay to zero.

        Args:
            step: steps done.
            progress: fraction of the run that is done, in 0..1.
        """
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return warmup * min(1.0, max(0.0, 1 - progress) / max(self.decay_fraction, 1e-9))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(RunConfig):
    """Options of a training run of a model that makes music.

    Attributes:
        final_fraction: fraction of the run, at its end, that trains on data without augmentation.
        z_loss: weight of the squared log-partition function in the loss, which keeps logits from drifting (PaLM, arXiv
            2204.02311).
        layer_dropout: rate at which an example skips the last block; it rises linearly from 0 at the first. It makes
            shallow exits better (LayerSkip, arXiv 2404.16710), and costs as much time.
        exit_weight: weight of an exit's loss, beside 1 for all blocks, if it were as deep; for a model with exits.
        exit_weight_power: the weight of an exit after d of L blocks is exit_weight * (d / L) ** exit_weight_power; 0
            weighs all exits alike.
        exit_distillation: fraction of an exit's loss that is the cross-entropy with the prediction of all blocks, in
            place of the data or of teachers.
        ponder_weight: weight of the ponder loss, the sum of the shares of an example's tape tokens (see
            `music_ar.model.tape`). Raise it to have fewer read.
        distillation_weight: with teachers, weight of their predictions in the loss; the data gets the rest (Hinton et
            al., arXiv 1503.02531).
        prefix_keep: fraction of the prefix (the context before the latents) that each example keeps, drawn at random
            (the cross-attend dropout of Perceiver AR). Less is faster and regularizes more.
    """

    final_fraction: float = number(0.0, least=0, most=1)
    z_loss: float = number(1e-4, least=0, most=100)
    layer_dropout: float = number(0.0, least=0, most=1)
    exit_weight: float = number(0.5, above=0, most=100)
    exit_weight_power: float = number(1.0, least=0, most=10)
    exit_distillation: float = number(0.0, least=0, most=1)
    ponder_weight: float = number(0.001, least=0, most=100)
    distillation_weight: float = number(0.5, least=0, most=1)
    prefix_keep: float = number(0.5, least=0, most=1)

    @property
    def final_start(self) -> float:
        """Fraction of the run after which it trains on data without augmentation."""
        return 1 - self.final_fraction

    def exit_weights(self, depths: tuple[int, ...]) -> list[float]:
        """Return the share of the loss of each depth, the last of which is all blocks; they add up to 1."""
        rising = [self.exit_weight * (depth / depths[-1]) ** self.exit_weight_power for depth in depths[:-1]]
        return [weight / (sum(rising) + 1) for weight in (*rising, 1.0)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderTrainingConfig(RunConfig):
    """Options of a training run of a piece encoder. An example is a piece; each has several passages, each twice.

    Attributes:
        batch_size: pieces per step, over all devices and processes. The more, the more passages each must be told from.
        micro_batches: number of parts in which each batch is processed, one after another; passages are told from those
            of their part only.
        hidden_weight: weight of the loss of hidden notes, beside 1 for that of passages.
        temperature: by which similarities are divided before the softmax over passages. The lower, the more the most
            similar ones count.
    """

    batch_size: int = whole(64, 1, 2**16)
    micro_batches: int = whole(1, 1, 2**16)
    muon_learning_rate: float = number(0.02, least=0, most=10)
    validate_every: int = whole(500, 0, _MAX_STEPS)
    hidden_weight: float = number(0.2, least=0, most=100)
    temperature: float = number(0.05, above=0, most=10)
