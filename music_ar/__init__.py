"""Long-context generation of piano music with Perceiver AR.

The names below are loaded when they are first used, so that importing the package starts no device and
`music-ar --help` never waits for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from music_ar.generator import Generator
    from music_ar.midi.io import read_midi, write_midi
    from music_ar.midi.performance import MidiError, Performance
    from music_ar.tokens.codec import decode, encode
    from music_ar.tokens.vocabulary import EventError

__all__ = [
    "EventError",
    "Generator",
    "MidiError",
    "Performance",
    "decode",
    "encode",
    "read_midi",
    "write_midi",
]

_HOME = {
    "EventError": "tokens.codec",
    "Generator": "generator",
    "MidiError": "midi.io",
    "Performance": "midi.io",
    "decode": "tokens.codec",
    "encode": "tokens.codec",
    "read_midi": "midi.io",
    "write_midi": "midi.io",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
