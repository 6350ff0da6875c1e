__all__ = [
    "PRESETS",
    "EmbeddingError",
    "PieceEmbedder",
    "PieceEncoder",
    "PieceEncoderConfig",
    "load_encoder",
    "notes_of",
    "notes_of_tokens",
    "save_encoder",
]

from .config import PRESETS, PieceEncoderConfig
from .embedder import PieceEmbedder
from .encoder import PieceEncoder
from .notes import EmbeddingError, notes_of, notes_of_tokens
from .pretrained import load_encoder, save_encoder
