"""`TrainingConfig`: how to train. It stands apart from `training` so that it is read without JAX."""

import dataclasses


class TrainingError(ValueError):
    """Training cannot start or go on; the message says why and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train. Saved beside the training state, and checked against it when resuming.

    Attributes:
        steps: optimiser steps; give these or minutes.
        minutes: wall-clock budget from the start of training, compilation included.
        batch_size: windows a step, over all devices and processes.
        accumulation: parts that a batch is worked through in, to save memory; the gradient is the same.
        optimizer: "muon" (Muon on all matrices but embedding and head, AdamW on the rest) or "adamw".
        matrix_learning_rate: peak rate of Muon.
        learning_rate: peak rate of AdamW.
        weight_decay: of all matrices but embedding and head, times their learning rate.
        warmup_steps: linear warm-up.
        decay_fraction: share of the run, at its end, over which the rate falls linearly to zero.
        final_fraction: share of the run, at its end, that reads `final_batches` (data without augmentation).
        clip_norm: global norm that gradients are clipped to.
        ema_decay: of the exponential moving average of the weights, which is what is evaluated and released.
        z_loss: weight of the squared log-partition, which keeps logits from drifting.
        dropout: rate on what the blocks add to the residual stream.
        input_dropout: share of the input tokens that are hidden from the model, much as in AWD-LSTM (Merity et al.,
            arXiv 1708.02182).
        distillation: with teachers, the share of the loss that asks for their mean prediction in place of the token
            that came (Hinton et al., arXiv 1503.02531).
        prefix_keep: share of the prefix (the M - N inputs that are not latents) that a row keeps.
        seed: of initialisation and of all dropout.
        log_every: steps that a log line tells the mean of.
        checkpoint_minutes: minutes between training checkpoints.
        validate_every: steps between calls of `validate`; 0 for never.
    """

    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 16
    accumulation: int = 1
    optimizer: str = "muon"
    matrix_learning_rate: float = 0.03
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    decay_fraction: float = 0.9
    final_fraction: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.9995
    z_loss: float = 1e-4
    dropout: float = 0.1
    input_dropout: float = 0.0
    distillation: float = 0.5
    prefix_keep: float = 0.5
    seed: int = 0
    log_every: int = 20
    checkpoint_minutes: float = 5.0
    validate_every: int = 2000

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise TrainingError(f"give either steps or minutes; got steps={self.steps}, minutes={self.minutes}")
        for name in ("steps", "batch_size", "accumulation", "log_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise TrainingError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("minutes", "clip_norm"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise TrainingError(f"{name} must be above 0, got {getattr(self, name)}")
        shares = ("dropout", "input_dropout", "distillation", "prefix_keep")
        for name in (*shares, "decay_fraction", "final_fraction", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainingError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        for name in ("matrix_learning_rate", "learning_rate", "weight_decay", "warmup_steps", "z_loss"):
            if not getattr(self, name) >= 0:
                raise TrainingError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**31:
            raise TrainingError(f"seed must lie in 0..{2**31 - 1}, got {self.seed}")
        if self.optimizer not in ("muon", "adamw"):
            raise TrainingError(f'optimizer must be "muon" or "adamw", got {self.optimizer!r}')
        if self.batch_size % self.accumulation:
            raise TrainingError(
                f"batch_size must be a multiple of accumulation, got {self.batch_size} and {self.accumulation}"
            )

    def rate(self, step: int, progress: float) -> float:
        """Learning rate as a share of its peak: warm-up, constant, linear decay to zero.

        Args:
            step: steps done.
            progress: share of the run that is done, 0..1.
        """
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return warm * min(1.0, max(0.0, 1 - progress) / max(self.decay_fraction, 1e-9))
