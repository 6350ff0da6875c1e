"""Descriptive statistics of a performance, and a plausibility score that ranks generated pieces by them."""

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
"""Minimum, median and maximum of some statistics over the first 60 s of the 177 pieces of MAESTRO's test split."""

USUAL_NATS_PER_TOKEN = 1.84
"""Negative log-likelihood of real music, in nats per token.

Median over the first 60 s of 24 pieces of MAESTRO's validation split (1.43 to 2.28), scored by `maestro-small` while
decoding with 1024 latents. Its own pieces are slightly more predictable: 16 pieces of 60 s without a prompt at top-p
0.98 (`music-ar render --count 16`) have a median of 1.70 (1.36 to 1.96).
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Statistics of one performance.

    Attributes:
        notes: number of notes.
        duration_s: from the first onset to the end of the last note.
        notes_per_s: notes over duration.
        lowest_pitch: MIDI pitch.
        highest_pitch: MIDI pitch.
        softest: MIDI velocity.
        median_velocity: MIDI velocity.
        loudest: MIDI velocity.
        longest_silence_s: longest time without a sounding note, within the duration.
        mean_polyphony: notes sounding at the same time, averaged over the duration; the pedal counts.
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
        """Measure a performance.

        Raises:
            ValueError: the performance has no notes.
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


def plausibility(performance: Performance, nats_per_token: float) -> float:
    """Score how close a generated piece is to real music, to rank several samples: 0 at best, lower is worse.

    The score is minus the sum of the squares of five deviations:

    - notes per second, mean polyphony and median velocity: the distance from MAESTRO's median on a logarithmic scale,
      on which MAESTRO's minimum and maximum are 1 away;
    - longest silence: by how much it exceeds MAESTRO's longest, relative to it;
    - `nats_per_token`, the model's negative log-likelihood of the piece: its distance from `USUAL_NATS_PER_TOKEN`, in
      units of 0.5 nats. Far below, music repeats itself; far above, it is incoherent.

    A performance without notes scores minus infinity.
    """
    if not len(performance):
        return -math.inf
    statistics = Statistics.of(performance)
    deviations = [
        (nats_per_token - USUAL_NATS_PER_TOKEN) / 0.5,
        max(0.0, statistics.longest_silence_s / MAESTRO["longest_silence_s"][2] - 1),
    ]
    for name in ("notes_per_s", "mean_polyphony", "median_velocity"):
        low, median, high = MAESTRO[name]
        value = max(float(getattr(statistics, name)), 1e-3)
        edge = high if value > median else low
        deviations.append(math.log(value / median) / abs(math.log(edge / median)))
    return -sum(deviation**2 for deviation in deviations)
