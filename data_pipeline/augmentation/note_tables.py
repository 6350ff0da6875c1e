"""Transpose, stretch and change the velocity of tables of notes (`music_ar.embedding.notes`), as `transforms` does."""

import numpy as np
from jaxtyping import Int32

from data_pipeline.augmentation.transforms import PIANO_HIGH, PIANO_LOW
from music_ar.embedding.notes import DURATION, ONSET, PITCH, VELOCITY, sorted_notes
from music_ar.tokens.vocabulary import VELOCITY_BINS


def transform_notes(
    notes: Int32[np.ndarray, "n 4"], semitones: int, factor: float, velocity_bins: int
) -> Int32[np.ndarray, "n 4"]:
    """Return notes transposed, stretched and made louder.

    All notes move by the same number of semitones and of bins, clipped so that none leaves the piano or the range of
    velocities. Times are rounded to steps, and a note lasts at least one.

    Args:
        notes: at least one, sorted by (onset, pitch).
        semitones: positive is up.
        factor: on all times, above 0; 1.1 makes the music 10 % slower.
        velocity_bins: positive is louder.
    """
    pitch, velocity = notes[:, PITCH], notes[:, VELOCITY]
    semitones = _clip(semitones, PIANO_LOW - int(pitch.min()), PIANO_HIGH - int(pitch.max()))
    velocity_bins = _clip(velocity_bins, 1 - int(velocity.min()), VELOCITY_BINS - int(velocity.max()))
    moved = notes.copy()
    moved[:, PITCH] += semitones
    moved[:, VELOCITY] += velocity_bins
    moved[:, ONSET] = np.floor(notes[:, ONSET] * factor + 0.5)
    end = np.floor((notes[:, ONSET] + notes[:, DURATION]) * factor + 0.5).astype(np.int32)
    moved[:, DURATION] = np.maximum(end - moved[:, ONSET], 1)
    return sorted_notes(moved)


def _clip(move: int, lowest: int, highest: int) -> int:
    """The move, within a range; one that is already outside is never forced back."""
    return min(max(move, min(0, lowest)), max(0, highest))
