"""Distances between feature distributions: 0 for equal ones, the shift for shifted ones, and a fair baseline."""

import numpy as np
import pytest
from conftest import make_performance

from music_ar.metrics.distributions import FEATURES, compare, distance, features
from music_ar.midi import Performance


def louder(performance, by):
    return Performance(
        onset_s=performance.onset_s,
        offset_s=performance.offset_s,
        pitch=performance.pitch,
        velocity=performance.velocity + by,
    )


@pytest.mark.parametrize("name", FEATURES)
def test_equal_samples_have_distance_zero(name):
    sample = np.random.default_rng(0).integers(0, 12, 50).astype(float)
    assert distance(name, sample, sample[::-1]) == 0


def test_the_distance_of_shifted_samples_is_the_shift():
    sample = np.random.default_rng(0).normal(size=50)
    assert distance("duration", sample, sample + 0.3) == pytest.approx(0.3)


def test_pitch_classes_have_no_order():
    first = np.array([0.0, 0.0, 4.0, 7.0])
    assert distance("pitch class", first, np.array([0.0, 0.0, 4.0, 11.0])) == pytest.approx(0.25)
    assert distance("pitch class", first, np.array([1.0, 1.0, 1.0, 1.0])) == pytest.approx(1.0)


def test_features_by_hand():
    piece = Performance(
        onset_s=np.array([3.0, 3.02, 4.0, 12.5]),  # time is measured from the first note
        offset_s=np.array([5.0, 5.0, 4.5, 13.0]),
        pitch=np.array([64, 60, 72, 61]),
        velocity=np.array([50, 60, 70, 80]),
    )
    found = features(piece)
    assert set(found) == set(FEATURES)
    assert found["pitch class"].tolist() == [4, 0, 0, 1]
    assert found["melodic interval"].tolist() == [4, 8, -11]  # the chord in rising order
    np.testing.assert_allclose(found["inter-onset"], [0.02, 0.98, 8.5])
    np.testing.assert_allclose(found["duration"], [2.0, 1.98, 0.5, 0.5])
    assert found["velocity"].tolist() == [50, 60, 70, 80]
    assert found["density"].tolist() == [0.6, 0.2]
    assert found["longest silence"].tolist() == [7.5]
    assert len(found["polyphony"]) == 100
    assert found["polyphony"].sum() == pytest.approx((2.0 + 1.98 + 0.5 + 0.5) * 10, abs=3)
    assert found["polyphony"].max() == 3
    assert found["self-similarity, 5 s"].tolist() == [0.0]  # 64, 60, 72 in the first 5 s, and 61 in the next
    assert not len(found["self-similarity, 15 s"])


def test_self_similarity_is_high_where_music_repeats():
    onset_s = np.arange(0, 60, 0.5)
    piece = Performance(
        onset_s=onset_s,
        offset_s=onset_s + 0.4,
        pitch=np.repeat(60 + np.arange(6) % 3, 20),  # ten seconds each of C, C#, D, C, C#, D
        velocity=np.full(120, 64),
    )
    found = features(piece)
    np.testing.assert_allclose(found["self-similarity, 30 s"], 1.0)
    assert 0 < found["self-similarity, 5 s"].mean() < 0.9
    assert found["self-similarity, 15 s"].mean() < found["self-similarity, 5 s"].mean()
    assert not len(found["self-similarity, 60 s"])


def test_similar_pieces_are_near_the_baseline_and_louder_ones_are_not():
    real = [make_performance(seed) for seed in range(12)]
    similar = [make_performance(seed) for seed in range(100, 104)]
    same, loud = compare(similar, real), compare([louder(piece, 15) for piece in similar], real)
    assert set(same) == set(FEATURES) - {"self-similarity, 30 s", "self-similarity, 60 s"}  # the pieces are too short
    assert max(each.ratio for each in same.values()) < 3
    assert loud["velocity"].distance == pytest.approx(15, abs=2)
    assert loud["velocity"].ratio > 5 * same["velocity"].ratio
    assert all(loud[name] == same[name] for name in same if name != "velocity")
    assert all(each.baseline <= each.baseline_max for each in same.values())


def test_ratio_of_a_baseline_of_zero():
    piece = make_performance(0)
    assert compare([piece], [piece, piece])["velocity"].ratio == 1
    assert compare([louder(piece, 1)], [piece, piece])["velocity"].ratio == np.inf


def test_too_few_pieces_are_refused():
    piece = make_performance(0)
    with pytest.raises(ValueError, match="0 and 2"):
        compare([], [piece, piece])
    with pytest.raises(ValueError, match="1 and 1"):
        compare([piece], [piece])


def test_silence_has_no_samples():
    assert not any(len(samples) for samples in features(Performance.empty()).values())
