__all__ = [
    "TOKEN_TYPES",
    "Score",
    "ScoringConfig",
    "best_temperature",
    "calibrate",
    "score",
    "score_by_type",
    "score_decoding",
    "score_tokens",
]

from .calibration import best_temperature, calibrate
from .likelihood import (
    TOKEN_TYPES,
    Score,
    ScoringConfig,
    score,
    score_by_type,
    score_decoding,
    score_tokens,
)
