"""Int8 matrices stand for float ones to half a step."""

import numpy as np

from music_ar.model.quantization import dequantize, quantize


def test_a_matrix_is_held_to_half_a_step():
    matrix = np.random.default_rng(0).normal(size=(50, 20)) * 10.0 ** np.arange(-10, 10)
    stored, scale = quantize(matrix)
    assert (stored.dtype, scale.dtype) == (np.int8, np.float32)
    np.testing.assert_array_equal(np.abs(stored.astype(int)).max(axis=0), 127)  # each column has its own scale
    assert (np.abs(dequantize(stored, scale) - matrix) <= 0.5001 * scale).all()


def test_zeros_stay_zeros():
    np.testing.assert_array_equal(dequantize(*quantize(np.zeros((3, 2)))), np.zeros((3, 2)))


def test_quantizing_twice_changes_nothing():
    stored, scale = quantize(np.random.default_rng(0).normal(size=(50, 20)))
    again, same_scale = quantize(dequantize(stored, scale))
    np.testing.assert_array_equal(again, stored)
    np.testing.assert_allclose(same_scale, scale, rtol=1e-6)
