"""Layers with int8 matrices equal the layers that they replace, where the matrices are whole steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from music_ar.decoding.int8_layers import Int8Forms
from music_ar.features import keyboard, notes
from music_ar.features.categorical import Categorical
from music_ar.model.perceiver_ar import FeatureProjection
from music_ar.tokens import vocabulary

in_both_layouts = pytest.mark.parametrize("layout", ["in_out", "out_in"])
ROWS = [1, 2, 64, 65]  # integer products up to 64 rows, float ones beyond


def norm_with(scale):
    norm = nnx.RMSNorm(len(scale), rngs=nnx.Rngs(0))
    norm.scale = nnx.Param(jnp.asarray(scale, jnp.float32))
    return norm


def exact_matrix(inputs, outputs):
    """A matrix that int8 holds without rounding."""
    rng = np.random.default_rng(0)
    whole = rng.integers(-127, 128, (inputs, outputs))
    whole[0] = 127  # so that quantizing finds the same scale
    return jnp.asarray(whole * rng.uniform(1e-4, 1e-2, outputs), jnp.float32)


def exact_linear(inputs, outputs, *, use_bias):
    layer = nnx.Linear(inputs, outputs, use_bias=use_bias, rngs=nnx.Rngs(0))
    layer.kernel[...] = exact_matrix(inputs, outputs)
    if layer.bias is not None:
        layer.bias[...] = jnp.asarray(np.random.default_rng(1).normal(size=outputs), jnp.float32)
    return layer


def applied(layer, *inputs):
    """The layer's output, compiled."""
    return np.asarray(jax.jit(lambda *inputs: layer(*inputs))(*inputs))


def assert_near(found, expected, tolerance):
    """Within a share of the largest number."""
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(np.asarray(expected)).max())


@in_both_layouts
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("use_bias", [False, True])
def test_an_int8_layer_equals_the_layer(layout, rows, use_bias):
    layer = exact_linear(384, 96, use_bias=use_bias)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, 384)) ** 3, jnp.float32)  # with far outliers
    int8 = Int8Forms(layout).linear(layer)
    assert_near(applied(int8, x), applied(layer, x), 3e-4)
    assert {part[...].dtype for part in int8.parts} == {jnp.dtype(jnp.int8)}


def test_both_layouts_give_the_same_product():
    layer = exact_linear(48, 33, use_bias=True)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 48)), jnp.float32)
    found, other = (applied(Int8Forms(layout).linear(layer), x) for layout in ("in_out", "out_in"))
    np.testing.assert_array_equal(found, other)


def test_the_output_has_the_type_of_the_input():
    layer = Int8Forms("in_out").linear(exact_linear(48, 33, use_bias=True))
    for dtype in (jnp.bfloat16, jnp.float32):
        found = applied(layer, jnp.ones((2, 3, 48), dtype))
        assert (found.dtype, found.shape) == (dtype, (2, 3, 33))


@in_both_layouts
def test_rows_have_their_own_scales(layout):
    layer = exact_linear(64, 32, use_bias=False)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 64)), jnp.float32) * jnp.array([[1e6], [1e-6]])
    x = jnp.concatenate([x, jnp.zeros((1, 64))])
    expected, found = applied(layer, x), applied(Int8Forms(layout).linear(layer), x)
    for row in range(2):
        assert_near(found[row], expected[row], 3e-4)
    np.testing.assert_array_equal(found[2], np.zeros(32))


@in_both_layouts
@pytest.mark.parametrize("rows", [1, 64, 65])
def test_an_int8_layer_that_holds_its_norm_equals_both(layout, rows):
    rng = np.random.default_rng(1)
    layer, norm = exact_linear(384, 96, use_bias=False), norm_with(rng.normal(size=384))
    x = jnp.asarray(rng.normal(size=(rows, 384)) ** 3 * 10.0 ** rng.uniform(-6, 6, (rows, 1)), jnp.float32)
    int8 = Int8Forms(layout).normed(norm, layer)
    assert_near(applied(int8, x), applied(lambda x: layer(norm(x)), x), 2e-3)
    np.testing.assert_array_equal(applied(int8, jnp.zeros((rows, 384))), np.zeros((rows, 96)))


def test_no_normed_row_exceeds_15_bits():
    """The largest there can be: all of a row in one channel, the one with the largest scale."""
    layer, norm = exact_linear(384, 96, use_bias=False), norm_with(np.where(np.arange(384) == 7, -3.0, 1.0))
    x = jnp.zeros((1, 384)).at[0, 7].set(1e4)
    int8 = Int8Forms("in_out").normed(norm, layer)
    np.testing.assert_allclose(applied(int8, x), applied(lambda x: layer(norm(x)), x), rtol=1e-3)


def bag(layer, numbers, categories):
    """The layer's output, compiled; sizes of categories are no arrays."""
    return np.asarray(jax.jit(lambda: layer(numbers, categories))())


@in_both_layouts
@pytest.mark.parametrize("rows", [1, 4, 65])  # from 65 on classes are one-hot numbers
def test_an_embedding_bag_equals_the_projection(layout, rows):
    tokens = np.random.default_rng(0).integers(0, vocabulary.EVENT_CLASSES, (rows, 400))
    state, onsets = jax.tree.map(lambda leaf: leaf[:, -1], (keyboard.scan_each(tokens), notes.scan_each(tokens, 4)))
    categories = [Categorical(jnp.asarray(index), size) for index, size in notes.categories(onsets, state.time)]
    for numbers in (jnp.asarray(keyboard.channels(state)), None):
        width = 0 if numbers is None else keyboard.CHANNELS
        projection = FeatureProjection(
            width, notes.feature_count(4), 48, dtype=jnp.dtype(jnp.float32), rngs=nnx.Rngs(0)
        )
        projection.kernel[...] = exact_matrix(width + notes.feature_count(4), 48)
        found = bag(Int8Forms(layout).features(projection), numbers, categories)
        expected = bag(projection, numbers, categories)
        assert_near(found, expected, 3e-4)
