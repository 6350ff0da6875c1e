"""`Performance` <-> event tokens: the vocabulary, the codec and the grammar."""

from music_ar.tokens import gaps, grammar, vocabulary
from music_ar.tokens.codec import decode, decode_report, encode, event_steps, length_steps, quantize
from music_ar.tokens.vocabulary import EventError

__all__ = [
    "EventError",
    "decode",
    "decode_report",
    "encode",
    "event_steps",
    "gaps",
    "grammar",
    "length_steps",
    "quantize",
    "vocabulary",
]
