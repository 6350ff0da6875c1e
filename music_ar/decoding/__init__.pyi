__all__ = [
    "Backend",
    "Chunk",
    "DecodeState",
    "Decoder",
    "GenerationError",
    "LogitProcessor",
    "Request",
    "SamplingError",
    "SamplingOptions",
    "Session",
]

from .backend import Backend
from .decoder import Decoder
from .processors import LogitProcessor
from .request import GenerationError, Request
from .sampling import SamplingError, SamplingOptions
from .session import Chunk, Session
from .state import DecodeState
