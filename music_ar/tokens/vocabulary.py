"""The event vocabulary: token types, their ranges, and the fingerprint that identifies them.

The 388 event classes and their order are those of note-seq 0.0.5's `PerformanceOneHotEncoding(num_velocity_bins=32,
max_shift_steps=100)` at 100 steps per second, as in Music Transformer and Perceiver AR (Hawthorne et al. 2022, section
5.2). Three control tokens follow them, and three more that only models which can fill a gap know (see `gaps`). Time is
counted in steps of 10 ms.
"""

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
"""Size of the vocabulary that pieces are written in."""
SEPARATOR = VOCABULARY_SIZE
MIDDLE = SEPARATOR + 1
END_OF_GAP = MIDDLE + 1
INFILL_VOCABULARY_SIZE = END_OF_GAP + 1
"""Size of the vocabulary of a model that can fill a gap."""

TYPE_STARTS = (NOTE_OFF, TIME_SHIFT, VELOCITY, EVENT_CLASSES)
"""Where each token type after note-ons begins; the last type is the control tokens."""

DEFAULT_VELOCITY_BIN = 16
"""Bin of a note-on with no velocity token before it, as in a window cut from the middle of a piece."""


class EventError(ValueError):
    """Input that cannot be encoded as event tokens, or is not an array of them."""


def _fingerprint(**more: int | str) -> str:
    description = {
        "classes": {
            "note_on": [NOTE_ON, PITCHES],
            "note_off": [NOTE_OFF, PITCHES],
            "time_shift": [TIME_SHIFT, MAX_SHIFT_STEPS],
            "velocity": [VELOCITY, VELOCITY_BINS],
            "pad": PAD,
            "start": START,
            "end": END,
            **more,
        },
        "steps_per_second": STEPS_PER_SECOND,
        "encoding": "note-seq 0.0.5 Performance after apply_sustain_control_changes",
    }
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


FINGERPRINT = _fingerprint()
"""SHA-256 of the vocabulary and the encoding rules. Shards and checkpoints carry it and are checked against it."""
FINGERPRINTS = {
    VOCABULARY_SIZE: FINGERPRINT,
    INFILL_VOCABULARY_SIZE: _fingerprint(separator=SEPARATOR, middle=MIDDLE, end_of_gap=END_OF_GAP),
}
"""The fingerprint of a model, by the size of its vocabulary. Shards need only that of pieces."""


def own_fingerprint(size: int, padding: int) -> str:
    """The fingerprint of a model whose `size` tokens are no events, the token `padding` being padding."""
    return hashlib.sha256(json.dumps({"tokens": size, "pad": padding}, sort_keys=True).encode()).hexdigest()


def is_note_on(tokens: Any) -> Any:
    """Mask of note-ons."""
    return (tokens >= NOTE_ON) & (tokens < NOTE_OFF)


def is_note(tokens: Any) -> Any:
    """Mask of note-ons and note-offs."""
    return (tokens >= NOTE_ON) & (tokens < TIME_SHIFT)


def is_shift(tokens: Any) -> Any:
    """Mask of time shifts."""
    return (tokens >= TIME_SHIFT) & (tokens < VELOCITY)


def is_velocity(tokens: Any) -> Any:
    """Mask of velocity tokens."""
    return (tokens >= VELOCITY) & (tokens < EVENT_CLASSES)


def check_tokens(tokens: np.ndarray, size: int = VOCABULARY_SIZE) -> None:
    """Raise `EventError` if a token is outside of a vocabulary of this size: a model would take it for another one."""
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < size):
        raise EventError(f"tokens must be in 0..{size - 1}, got {tokens.min()}..{tokens.max()}")


def flat_integers(tokens: np.ndarray) -> Int64[np.ndarray, " T"]:
    """Tokens as a flat int64 array.

    Raises:
        EventError: `tokens` is not a flat array of integers.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not (np.issubdtype(tokens.dtype, np.integer) or tokens.size == 0):
        raise EventError(f"tokens must be a flat array of integers, got {tokens.dtype} of shape {tokens.shape}")
    return tokens.astype(np.int64)
