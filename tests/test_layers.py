"""Linear layers in other forms equal the layers that they replace."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model
from flax import nnx

from music_ar.decoding.int8_layers import Int8Forms
from music_ar.decoding.layers import DecodingModel, PlainForms, TransposedForms, fused_projection
from music_ar.features.categorical import Categorical
from music_ar.model.config import PRESETS
from music_ar.model.perceiver_ar import FeatureProjection

FLOATS = [jnp.float32, jnp.bfloat16]


def random_layer(*, use_bias, dtype=jnp.float32):
    bias = nnx.initializers.normal(1.0)
    return nnx.Linear(24, 10, use_bias=use_bias, bias_init=bias, dtype=dtype, rngs=nnx.Rngs(0))


def random_input(scale=1.0):
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 24)) * scale, jnp.float32)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_transposed_layer_equals_the_layer(use_bias, dtype):
    layer = random_layer(use_bias=use_bias, dtype=dtype)
    found, expected = TransposedForms().linear(layer)(random_input()), layer(random_input())
    assert found.dtype == expected.dtype
    epsilon = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(found, expected, rtol=2 * epsilon, atol=4 * epsilon)


@pytest.mark.parametrize("forms", [PlainForms(), TransposedForms()], ids=["plain", "transposed"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_layer_that_holds_its_norm_equals_both(forms, dtype):
    norm = nnx.RMSNorm(24, dtype=dtype, scale_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(1))
    layer, x = random_layer(use_bias=False, dtype=dtype), random_input(30.0).astype(dtype)
    found, expected = forms.normed(norm, layer)(x), layer(norm(x))
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected.astype(jnp.float32), atol=8 * float(jnp.finfo(dtype).eps)
    )


def test_a_transposed_projection_equals_the_projection():
    projection = FeatureProjection(4, 6, 5, dtype=jnp.dtype(jnp.float32), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    projection.kernel[...] = jnp.asarray(rng.normal(size=(10, 5)), jnp.float32)
    numbers = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    categories = [Categorical(jnp.asarray(rng.integers(-1, 3, (2, 3, 2))), 3)]
    expected = projection(numbers, categories)
    np.testing.assert_allclose(TransposedForms().features(projection)(numbers, categories), expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1


def test_a_fused_projection_gives_queries_keys_and_values():
    [block, *_] = noisy_model(PRESETS["tiny"]).blocks
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 32)), jnp.float32)
    expected = jnp.concatenate([layer(x) for layer in (block.query, block.key, block.value)], axis=-1)
    np.testing.assert_allclose(fused_projection(block)(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    "forms", [PlainForms(), TransposedForms(), Int8Forms("in_out")], ids=["plain", "transposed", "int8"]
)
def test_the_model_itself_is_not_changed(forms):
    model = noisy_model(dataclasses.replace(PRESETS["tiny"], onsets=2, retrieval_notes=12, label_size=2))
    graph, before = nnx.split(model)
    before = nnx.to_pure_dict(before)
    ready = DecodingModel(model, forms)
    assert not hasattr(ready.outer, "label")
    after_graph, after = nnx.split(model)
    assert after_graph == graph
    for (path, leaf), (same_path, same) in zip(
        nnx.to_flat_state(after), nnx.to_flat_state(nnx.State(before)), strict=True
    ):
        assert path == same_path
        np.testing.assert_array_equal(leaf[...], same)
