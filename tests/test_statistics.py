"""Statistics of a performance small enough to count by hand."""

import numpy as np
import pytest

from music_ar.metrics.statistics import Statistics
from music_ar.midi.performance import Performance


def test_by_hand():
    performance = Performance(
        onset_s=np.array([1.0, 1.5, 4.0, 4.5]),
        offset_s=np.array([2.5, 2.0, 5.0, 6.0]),
        pitch=np.array([60, 64, 40, 72]),
        velocity=np.array([50, 70, 20, 90]),
    )
    assert Statistics.of(performance) == Statistics(
        notes=4,
        duration_s=5.0,
        notes_per_s=0.8,
        lowest_pitch=40,
        highest_pitch=72,
        softest=20,
        median_velocity=60.0,
        loudest=90,
        longest_silence_s=1.5,  # from 2.5, where the longer of the first two ends
        mean_polyphony=(1.5 + 0.5 + 1.0 + 1.5) / 5,
    )


def test_nothing_cannot_be_measured():
    with pytest.raises(ValueError, match="without notes"):
        Statistics.of(Performance.empty())
