__all__ = [
    "TOKEN_TYPES",
    "MiddleScore",
    "Score",
    "ScoringConfig",
    "best_temperature",
    "calibrate",
    "draw_gaps",
    "score",
    "score_by_type",
    "score_decoding",
    "score_middles",
    "score_tokens",
]

from .calibration import best_temperature, calibrate
from .infill import MiddleScore, draw_gaps, score_middles
from .likelihood import (
    TOKEN_TYPES,
    Score,
    ScoringConfig,
    score,
    score_by_type,
    score_decoding,
    score_tokens,
)
