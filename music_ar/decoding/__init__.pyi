__all__ = [
    "AnyDecoder",
    "AnyState",
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
    "load_decoder",
]

from .backend import Backend
from .decoder import Decoder
from .interface import AnyDecoder, AnyState
from .loading import load_decoder
from .processors import LogitProcessor
from .request import GenerationError, Request
from .sampling import SamplingError, SamplingOptions
from .session import Chunk, Session
from .state import DecodeState
