__all__ = [
    "Backend",
    "CheckpointError",
    "Chunk",
    "EventError",
    "GenerationError",
    "Generator",
    "MidiError",
    "Performance",
    "Piece",
    "Request",
    "SamplingError",
    "SamplingOptions",
    "Session",
    "WishError",
    "Wishes",
    "decode",
    "encode",
    "read_midi",
    "write_midi",
]

from .decoding import Backend, Chunk, GenerationError, Request, SamplingError, SamplingOptions, Session
from .features.wish_options import WishError, Wishes
from .generator import Generator, Piece
from .midi import MidiError, Performance, read_midi, write_midi
from .model import CheckpointError
from .tokens import EventError, decode, encode
