"""Statistics of a performance that can be counted by hand, and the ranking of real and spoilt music."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from music_ar.metrics.statistics import Statistics, plausibility
from music_ar.midi import Performance, read_midi

DATA = Path(__file__).parent / "data"
# NLL in nats per token under `maestro-small` with 1024 latents, while decoding the first 40 s of each piece: as it is,
# with all notes in random order (`shuffled`), and with its first 4 s ten times (`looped`).
NATS_PER_TOKEN = {
    "bach_857.midi": (1.86, 3.535, 1.109),
    "bach_885.midi": (1.95, 3.678, 1.194),
    "liszt_etude_1.midi": (1.451, 3.748, 0.784),
}


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
        longest_silence_s=1.5,  # from 2.5, where the longer of the first two notes ends
        mean_polyphony=(1.5 + 0.5 + 1.0 + 1.5) / 5,
    )


def test_a_performance_without_notes_has_no_statistics():
    with pytest.raises(ValueError, match="without notes"):
        Statistics.of(Performance.empty())


def changed(performance, **columns):
    """The performance with some columns replaced."""
    return Performance(
        **{field.name: getattr(performance, field.name) for field in dataclasses.fields(performance)} | columns
    )


def pause(performance, seconds):
    """The performance with a silence in its middle."""
    late = performance.onset_s > performance.duration_s / 2
    before, after = performance.select(~late), performance.select(late)
    after = after.shift(seconds + max(0.0, before.duration_s - float(after.onset_s[0])))
    return Performance(
        onset_s=np.concatenate([before.onset_s, after.onset_s]),
        offset_s=np.concatenate([before.offset_s, after.offset_s]),
        pitch=np.concatenate([before.pitch, after.pitch]),
        velocity=np.concatenate([before.velocity, after.velocity]),
    )


SPOILT = {
    "eight times too fast": lambda piece: changed(piece, onset_s=piece.onset_s / 8, offset_s=piece.offset_s / 8),
    "eight times too slow": lambda piece: changed(piece, onset_s=piece.onset_s * 8, offset_s=piece.offset_s * 8),
    "as loud as possible": lambda piece: changed(piece, velocity=np.full(len(piece), 127)),
    "hardly audible": lambda piece: changed(piece, velocity=np.full(len(piece), 5)),
    "staccatissimo": lambda piece: changed(piece, offset_s=piece.onset_s + 0.02),
    "pedal never released": lambda piece: changed(piece, offset_s=np.maximum(piece.offset_s, piece.duration_s)),
    "long silence": lambda piece: pause(piece, 15.0),
    "every twentieth note": lambda piece: piece.select(np.arange(len(piece)) % 20 == 0),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("name", NATS_PER_TOKEN)
def test_real_music_is_more_plausible_than_the_same_music_spoilt(name, spoil):
    real, (nats, *_) = read_midi(DATA / name).crop(0, 40), NATS_PER_TOKEN[name]
    assert plausibility(real, nats) > plausibility(spoil(real), nats)


@pytest.mark.parametrize("name", NATS_PER_TOKEN)
def test_real_music_is_more_plausible_than_shuffled_or_looped_music(name):
    """These have the statistics of real music: the model's likelihood tells them apart, in both directions."""
    real, (nats, shuffled, looped) = read_midi(DATA / name).crop(0, 40), NATS_PER_TOKEN[name]
    assert looped < nats < shuffled
    assert plausibility(real, nats) > plausibility(real, shuffled)
    assert plausibility(real, nats) > plausibility(real, looped)


def test_the_score_falls_on_both_sides_of_the_usual_likelihood():
    real = read_midi(DATA / "bach_857.midi").crop(0, 40)
    usual = np.median([nats for nats, *_ in NATS_PER_TOKEN.values()])
    scores = [plausibility(real, usual + distance) for distance in (-1.6, -0.8, 0, 0.8, 1.6)]
    assert scores[0] < scores[1] < scores[2] > scores[3] > scores[4]


def test_no_notes_are_the_least_plausible():
    assert plausibility(Performance.empty(), 1.8) == -math.inf
