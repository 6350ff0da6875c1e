__all__ = [
    "Batches",
    "CrossFitted",
    "Ensemble",
    "Fitted",
    "Progress",
    "Trainer",
    "TrainingCheckpoints",
    "TrainingConfig",
    "TrainingError",
    "build_optimizer",
]

from .checkpointing import TrainingCheckpoints
from .config import TrainingConfig, TrainingError
from .distillation import CrossFitted, Ensemble
from .log import Progress
from .optimizer import build_optimizer
from .trainer import Batches, Fitted, Trainer
