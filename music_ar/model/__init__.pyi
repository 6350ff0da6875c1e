__all__ = [
    "PRESETS",
    "CheckpointError",
    "Compute",
    "ModelConfig",
    "PerceiverAR",
    "expand",
    "load_pretrained",
    "parameter_count",
    "save_pretrained",
]

from .config import PRESETS, Compute, ModelConfig
from .expansion import expand
from .perceiver_ar import PerceiverAR, parameter_count
from .pretrained import load_pretrained, save_pretrained
from .weights import CheckpointError
