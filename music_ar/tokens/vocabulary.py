"""The event vocabulary: token classes, their ranges, and the fingerprint that names them."""

import hashlib
import json
from typing import Any

import numpy as np
from jaxtyping import Int64

PITCHES = 128


STEPS_PER_SECOND = 100


MAX_SHIFT_STEPS = 100


VELOCITY_BINS = 32


VELOCITY_BIN_SIZE = 128 // VELOCITY_BINS


NOTE_ON = 0  # + pitch 0..127


NOTE_OFF = NOTE_ON + PITCHES  # + pitch 0..127


TIME_SHIFT = NOTE_OFF + PITCHES  # + steps - 1, for 1..100 steps


VELOCITY = TIME_SHIFT + MAX_SHIFT_STEPS  # + bin - 1, for bins 1..32


EVENT_CLASSES = VELOCITY + VELOCITY_BINS


PAD = EVENT_CLASSES


START = PAD + 1


END = START + 1


VOCABULARY_SIZE = END + 1


KIND_STARTS = (NOTE_OFF, TIME_SHIFT, VELOCITY, EVENT_CLASSES)
"""Where each kind of token after note-ons begins; the last is the control tokens."""


# The bin of a note-on that no velocity precedes, as in a window cut from the middle of a piece.
DEFAULT_VELOCITY_BIN = 16


class EventError(ValueError):
    """Something that cannot be encoded as, or is not an array of, event tokens."""


def _fingerprint() -> str:
    description = {
        "classes": {
            "note_on": [NOTE_ON, PITCHES],
            "note_off": [NOTE_OFF, PITCHES],
            "time_shift": [TIME_SHIFT, MAX_SHIFT_STEPS],
            "velocity": [VELOCITY, VELOCITY_BINS],
            "pad": PAD,
            "start": START,
            "end": END,
        },
        "steps_per_second": STEPS_PER_SECOND,
        "encoding": "note-seq 0.0.5 Performance after apply_sustain_control_changes",
    }
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


FINGERPRINT = _fingerprint()
"""Names the vocabulary and the encoding rules; shards and checkpoints carry it and are checked against it."""


def is_on(tokens: Any) -> Any:
    """Which tokens are note-ons."""
    return (tokens >= NOTE_ON) & (tokens < NOTE_OFF)


def is_shift(tokens: Any) -> Any:
    """Which tokens are time shifts."""
    return (tokens >= TIME_SHIFT) & (tokens < VELOCITY)


def is_velocity(tokens: Any) -> Any:
    """Which tokens are velocities."""
    return (tokens >= VELOCITY) & (tokens < EVENT_CLASSES)


def _flat_integers(tokens: np.ndarray) -> Int64[np.ndarray, " T"]:
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not (np.issubdtype(tokens.dtype, np.integer) or tokens.size == 0):
        raise EventError(f"tokens must be a flat array of integers, got {tokens.dtype} of shape {tokens.shape}")
    return tokens.astype(np.int64)
