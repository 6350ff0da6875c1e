"""What a performance is like, in a few figures: to look at one, and to set generated music beside real music."""

import dataclasses
import math

import numpy as np

from music_ar.midi.performance import Performance

MAESTRO: dict[str, tuple[float, float, float]] = {
    "notes_per_s": (1.42, 10.2, 23.2),
    "lowest_pitch": (23, 32, 52),
    "highest_pitch": (74, 89, 104),
    "softest": (1, 7, 39),
    "median_velocity": (37.5, 63.5, 84),
    "loudest": (67, 99, 123),
    "longest_silence_s": (0, 0.31, 5.14),
    "mean_polyphony": (1.0, 3.9, 16.7),
}
"""Minimum, median and maximum of some figures over the first 60 s of the 177 pieces of MAESTRO's test split."""

# Nats a token of real music: the median over the first 60 s of 24 pieces of MAESTRO's validation split, by
# `maestro-small` through the decoder with 1024 latents, windows sliding; the least has 1.43, the most 2.28. What
# the model makes is somewhat plainer: 16 pieces of 60 s from nothing at top-p 0.98 (`music-ar render
# --count 16`) have a median of 1.70, the least 1.36, the most 1.96.
_USUAL_NATS = 1.84


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Figures of one performance.

    Attributes:
        notes: how many.
        duration_s: from the first onset to the end of the last note.
        notes_per_s: notes over duration.
        lowest_pitch: MIDI pitch.
        highest_pitch: MIDI pitch.
        softest: MIDI velocity.
        median_velocity: MIDI velocity.
        loudest: MIDI velocity.
        longest_silence_s: longest time within the duration in which nothing sounds.
        mean_polyphony: notes sounding at once, averaged over the duration; the pedal counts.
    """

    notes: int
    duration_s: float
    notes_per_s: float
    lowest_pitch: int
    highest_pitch: int
    softest: int
    median_velocity: float
    loudest: int
    longest_silence_s: float
    mean_polyphony: float

    @classmethod
    def of(cls, performance: Performance) -> "Statistics":
        """Measures a performance.

        Raises:
            ValueError: it has no notes.
        """
        if not len(performance):
            raise ValueError("a performance without notes has no statistics")
        onset_s, offset_s = performance.onset_s, performance.offset_s  # in the order of the onsets
        duration_s = float(offset_s.max() - onset_s[0])
        gaps_s = onset_s[1:] - np.maximum.accumulate(offset_s)[:-1]
        return cls(
            notes=len(performance),
            duration_s=duration_s,
            notes_per_s=len(performance) / duration_s,
            lowest_pitch=int(performance.pitch.min()),
            highest_pitch=int(performance.pitch.max()),
            softest=int(performance.velocity.min()),
            median_velocity=float(np.median(performance.velocity)),
            loudest=int(performance.velocity.max()),
            longest_silence_s=float(gaps_s.max(initial=0.0)),
            mean_polyphony=float((offset_s - onset_s).sum() / duration_s),
        )


def likeness(performance: Performance, nats_per_token: float) -> float:
    """How much made music is like real music, to rank several tries; 0 at best, and lower the less so.

    For notes a second, notes at once and median velocity: how far it is, in logarithm, from MAESTRO's median towards
    MAESTRO's minimum or maximum, which is 1; for the longest silence: the share by which it passes MAESTRO's longest;
    for the model's surprise: how many halves of a nat it lies from real music's 1.84, since far below that music goes
    round in circles and far above it has lost its thread. The score is minus the sum of the squares.

    Music without notes has minus infinity.
    """
    if not len(performance):
        return -math.inf
    figures = Statistics.of(performance)
    far = [
        (nats_per_token - _USUAL_NATS) / 0.5,
        max(0.0, figures.longest_silence_s / MAESTRO["longest_silence_s"][2] - 1),
    ]
    for name in ("notes_per_s", "mean_polyphony", "median_velocity"):
        low, usual, high = MAESTRO[name]
        value = max(float(getattr(figures, name)), 1e-3)
        edge = high if value > usual else low
        far.append(math.log(value / usual) / abs(math.log(edge / usual)))
    return -sum(each**2 for each in far)
