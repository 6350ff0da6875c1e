__all__ = [
    "Batches",
    "CrossFitted",
    "EncoderTrainingConfig",
    "Ensemble",
    "Fitted",
    "NextTokens",
    "Objective",
    "PieceEncoding",
    "Progress",
    "RunConfig",
    "Trainer",
    "TrainingCheckpoints",
    "TrainingConfig",
    "TrainingError",
    "build_optimizer",
]

from .checkpointing import TrainingCheckpoints
from .config import EncoderTrainingConfig, RunConfig, TrainingConfig, TrainingError
from .distillation import CrossFitted, Ensemble
from .log import Progress
from .next_tokens import NextTokens
from .objective import Objective
from .optimizer import build_optimizer
from .piece_encoding import PieceEncoding
from .trainer import Batches, Fitted, Trainer
