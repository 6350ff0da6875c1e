"""Notes as an encoder reads them: one row of four whole numbers for each note, from a `Performance` or from tokens."""

from typing import Any

import numpy as np
from jaxtyping import Int32, Shaped

from music_ar.midi.performance import Performance
from music_ar.tokens.codec import decode, quantize
from music_ar.tokens.vocabulary import STEPS_PER_SECOND, VELOCITY_BIN_SIZE

ONSET, PITCH, VELOCITY, DURATION = range(4)
"""Columns of a table of notes: onset in steps of 10 ms, MIDI pitch, velocity bin (1..32), duration in steps (1 on)."""
MAX_NOTES = 2**16
"""Most notes of a piece: several hours of music."""
DURATION_CLASSES = 32
"""Classes of durations; see `duration_classes`."""
_CLASSES_PER_OCTAVE = 3
_MAX_STEPS = 2**28


class EmbeddingError(ValueError):
    """A piece that has no embedding; the message says why."""


def notes_of(performance: Performance) -> Int32[np.ndarray, "n 4"]:
    """The notes of a performance, sorted by (onset, pitch), with the time and the velocity steps of event tokens.

    Tokens and the performance that they were encoded from have the same notes, unless a pitch sounds twice at once.

    Raises:
        EmbeddingError: the performance has no notes, more than `MAX_NOTES`, or lasts longer than 2**28 steps.
    """
    if len(performance) == 0:
        raise EmbeddingError("the piece has no notes, so nothing can be said about it; give one with notes")
    if len(performance) > MAX_NOTES:
        raise EmbeddingError(
            f"the piece has {len(performance):,} notes, and at most {MAX_NOTES:,} can be read at once; cut it in parts"
        )
    if performance.duration_s * STEPS_PER_SECOND > _MAX_STEPS:
        raise EmbeddingError(
            f"the piece lasts {performance.duration_s / 3600:,.0f} hours, and at most "
            f"{_MAX_STEPS / STEPS_PER_SECOND / 3600:,.0f} can be read; check its times"
        )
    onset = quantize(performance.onset_s)
    duration = np.maximum(quantize(performance.offset_s) - onset, 1)
    velocity = (performance.velocity - 1) // VELOCITY_BIN_SIZE + 1
    table = np.stack([onset, performance.pitch, velocity, duration], axis=1).astype(np.int32)
    return sorted_notes(table)


def sorted_notes(table: Int32[np.ndarray, "n 4"]) -> Int32[np.ndarray, "n 4"]:
    """The notes sorted by (onset, pitch)."""
    return table[np.lexsort((table[:, PITCH], table[:, ONSET]))]


def notes_of_tokens(tokens: Shaped[np.ndarray, " T"]) -> Int32[np.ndarray, "n 4"]:
    """The notes of event tokens, such as a piece of a shard; see `notes_of`."""
    return notes_of(decode(tokens))


def duration_classes(steps: Any) -> Any:
    """Class of each duration in steps, from 0: three classes for each doubling, the last from 13 s on.

    Args:
        steps: an array of NumPy or of JAX; so is the result.
    """
    xp = steps.__array_namespace__()
    octaves = xp.log2(xp.maximum(steps, 1).astype(xp.float32))
    return xp.minimum(_CLASSES_PER_OCTAVE * octaves, DURATION_CLASSES - 1).astype(xp.int32)
