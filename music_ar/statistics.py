"""What a performance is like, in a few figures: to look at one, and to set generated music beside real music."""

import dataclasses

import numpy as np

from music_ar.midi import Performance


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
