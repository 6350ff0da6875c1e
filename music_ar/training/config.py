"""`TrainingConfig` and `TrainingError`; importing them does not import JAX."""

import dataclasses
from collections.abc import Callable, Iterable


class TrainingError(ValueError):
    """Training cannot start or continue; the message says why and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training options. Saved beside the training checkpoints and compared when a run is resumed.

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
        final_fraction: fraction of the run, at its end, that trains on data without augmentation.
        clip_norm: largest global norm of the gradient; larger gradients are scaled down to it.
        ema_decay: decay per step of the moving average of the weights. The average is what is validated and saved.
        z_loss: weight of the squared log-partition function in the loss, which keeps logits from drifting (PaLM, arXiv
            2204.02311).
        dropout: dropout rate of each block's output. Raise it against overfitting.
        distillation_weight: with teachers, weight of their predictions in the loss; the data gets the rest (Hinton et
            al., arXiv 1503.02531).
        prefix_keep: fraction of the prefix (the context before the latents) that each example keeps, drawn at random
            (the cross-attend dropout of Perceiver AR). Less is faster and regularizes more.
        seed: random seed of initialization, dropout and the order of the data.
        log_every: steps between log lines; each reports means over these steps.
        checkpoint_minutes: minutes between training checkpoints.
        validate_every: steps between validations; 0 turns validation off.
    """

    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 16
    micro_batches: int = 1
    muon_learning_rate: float = 0.03
    adamw_learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    decay_fraction: float = 0.9
    final_fraction: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.9995
    z_loss: float = 1e-4
    dropout: float = 0.1
    distillation_weight: float = 0.5
    prefix_keep: float = 0.5
    seed: int = 0
    log_every: int = 20
    checkpoint_minutes: float = 5.0
    validate_every: int = 2000

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise TrainingError(f"give either steps or minutes; got steps={self.steps}, minutes={self.minutes}")
        fractions = ("decay_fraction", "final_fraction", "ema_decay", "dropout", "distillation_weight", "prefix_keep")
        not_negative = ("muon_learning_rate", "adamw_learning_rate", "weight_decay", "warmup_steps", "z_loss")
        self._check(("steps", "batch_size", "micro_batches", "log_every"), lambda value: value >= 1, "at least 1")
        self._check(("minutes", "clip_norm"), lambda value: value > 0, "above 0")
        self._check(fractions, lambda value: 0 <= value <= 1, "in 0..1")
        self._check(not_negative, lambda value: value >= 0, "at least 0")
        self._check(("seed",), lambda value: 0 <= value < 2**31, f"in 0..{2**31 - 1}")
        if self.batch_size % self.micro_batches:
            raise TrainingError(
                f"batch_size must be a multiple of micro_batches, got {self.batch_size} and {self.micro_batches}"
            )

    def _check(self, names: Iterable[str], allowed: Callable[[float], bool], range_: str) -> None:
        """Raise TrainingError if one of these options is set and not allowed."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not allowed(value):
                raise TrainingError(f"{name} must be {range_}, got {value}")

    def learning_rate_factor(self, step: int, progress: float) -> float:
        """Return the learning rate as a fraction of its peak: warm-up, constant, linear decay to zero.

        Args:
            step: steps done.
            progress: fraction of the run that is done, in 0..1.
        """
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return warmup * min(1.0, max(0.0, 1 - progress) / max(self.decay_fraction, 1e-9))
