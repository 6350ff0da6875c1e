"""Fréchet music distance: its properties, and agreement with SciPy and scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from sklearn.covariance import oas

from music_ar.metrics.frechet import Gaussian, compare_embeddings, fit, frechet_distance

SEEDS = st.integers(0, 2**32 - 1)


def embeddings(seed, count=60, size=6, shift=0.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, size)) @ rng.normal(size=(size, size)) + shift).astype(np.float32)


@given(SEEDS, SEEDS)
def test_equals_scipys_square_root(one, other):
    first, second = fit(embeddings(one)), fit(embeddings(other, shift=0.5))
    root = np.real(np.asarray(sqrtm(first.covariance @ second.covariance)))
    apart = np.sum((first.mean - second.mean) ** 2)
    expected = apart + np.trace(first.covariance + second.covariance - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(SEEDS, SEEDS)
def test_is_symmetric_and_zero_only_for_equal_sets(one, other):
    first, second = fit(embeddings(one)), fit(embeddings(other, shift=0.1))
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-6)
    assert frechet_distance(first, second) > 1e-3


def test_a_shift_adds_its_square():
    first = fit(embeddings(0))
    shifted = Gaussian(first.mean + np.array([3.0, 4, 0, 0, 0, 0]), first.covariance)
    assert frechet_distance(first, shifted) == pytest.approx(25)


def test_gaussians_in_one_direction():
    """In one dimension it is the squared distance of the means and of the standard deviations."""
    first, second = (Gaussian(np.array([mean]), np.array([[spread**2]])) for mean, spread in ((1.0, 2.0), (4.0, 7.0)))
    assert frechet_distance(first, second) == pytest.approx(9 + 25)


@given(SEEDS, st.integers(2, 200))
def test_shrinks_as_scikit_learn_does(seed, count):
    sample = embeddings(seed, count).astype(np.float64)
    fitted = fit(sample)
    np.testing.assert_allclose(fitted.mean, sample.mean(axis=0))
    np.testing.assert_allclose(fitted.covariance, oas(sample)[0], rtol=1e-6, atol=1e-9)


def test_one_embedding_is_too_few():
    with pytest.raises(ValueError, match="at least 2 embeddings, got 1"):
        fit(embeddings(0, 1))


def pieces(seeds, shift=0.0):
    """Pieces of ten passages from one distribution."""
    mix = np.random.default_rng(0).normal(size=(6, 6))
    return [(np.random.default_rng(seed).normal(size=(10, 6)) @ mix + shift).astype(np.float32) for seed in seeds]


def test_music_of_the_same_kind_is_as_far_as_real_music_and_other_music_farther():
    real, alike, other = pieces(range(40)), pieces(range(100, 140)), pieces(range(200, 240), shift=2.0)
    same, apart = compare_embeddings(alike, real), compare_embeddings(other, real)
    assert same.pieces == apart.pieces == 20
    assert same.baseline == apart.baseline
    assert same.distance == pytest.approx(same.baseline, rel=0.5)
    assert apart.distance > 5 * apart.baseline_max


def test_few_generated_pieces_meet_as_few_real_ones():
    few, many = (compare_embeddings(pieces(range(100, 100 + count)), pieces(range(40))) for count in (3, 20))
    assert few.pieces == 3
    assert few.baseline > many.baseline


def test_too_few_pieces():
    with pytest.raises(ValueError, match="at least 2 generated and 4 real pieces, got 2 and 3"):
        compare_embeddings(pieces(range(2)), pieces(range(3)))
