"""Linear layers in other forms are the layers that they replace."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model
from flax import nnx

from music_ar.decoding.layers import NormedLinear, TransposedLinear, join_norms, replace_linears
from music_ar.model.config import PRESETS


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_transposed_layer_equals_the_layer(use_bias, dtype):
    bias = nnx.initializers.normal(1.0)
    linear = nnx.Linear(24, 10, use_bias=use_bias, bias_init=bias, dtype=dtype, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 24)), jnp.float32)
    found, expected = TransposedLinear(linear)(x), linear(x)
    assert found.dtype == expected.dtype
    epsilon = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(found, expected, rtol=2 * epsilon, atol=4 * epsilon)


def test_a_model_with_transposed_layers_predicts_the_same():
    model = noisy_model(dataclasses.replace(PRESETS["tiny"], context=48))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 388, (1, 48)))
    transposed = replace_linears(model, TransposedLinear)
    assert isinstance(model.head, nnx.Linear)
    assert isinstance(transposed.head, TransposedLinear)
    assert isinstance(transposed.blocks[0].expand, TransposedLinear)
    np.testing.assert_allclose(transposed(tokens), model(tokens), atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_norm_and_a_layer_in_one_equal_both(dtype):
    norm = nnx.RMSNorm(24, dtype=dtype, scale_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(1))
    linear = nnx.Linear(24, 10, use_bias=False, dtype=dtype, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 24)) * 30, dtype)
    found, expected = NormedLinear(norm, linear)(x), linear(norm(x))
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected.astype(jnp.float32), atol=8 * float(jnp.finfo(dtype).eps)
    )


def test_a_model_with_norms_joined_to_layers_predicts_the_same():
    model = noisy_model(dataclasses.replace(PRESETS["tiny"], context=48, cross_depths=(1,)))
    for block in model.blocks:
        block.join()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 388, (1, 48)))
    joined = nnx.clone(model)
    join_norms(joined)
    for block in (joined.cross, *joined.further_crosses, *joined.blocks):
        assert isinstance(block.expand, NormedLinear)
    np.testing.assert_allclose(joined(tokens), model(tokens), atol=5e-5)
