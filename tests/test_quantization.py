"""Int8 weights: small on disk, and when decoding as good as the floats they stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model
from flax import nnx
from reference_model import keyboard_features

from music_ar.decoding.decoder import Decoder
from music_ar.decoding.int8_layers import YNNPACK, GatheredInt8Linear, Int8Linear, NormedInt8Linear, with_int8_weights
from music_ar.decoding.sampling import SamplingOptions
from music_ar.features import keyboard
from music_ar.model import quantization
from music_ar.model.config import PRESETS
from music_ar.model.quantization import dequantize, quantize
from music_ar.tokens import vocabulary


def norm_with(scale):
    norm = nnx.RMSNorm(len(scale), rngs=nnx.Rngs(0))
    norm.scale = nnx.Param(jnp.asarray(scale, jnp.float32))
    return norm


def exact_linear(inputs, outputs, *, use_bias, seed=0):
    """A linear layer whose matrix int8 holds without rounding."""
    rng = np.random.default_rng(seed)
    layer = nnx.Linear(inputs, outputs, use_bias=use_bias, rngs=nnx.Rngs(0))
    whole = rng.integers(-127, 128, (inputs, outputs))
    whole[0] = 127  # so that quantising finds the same scale
    layer.kernel[...] = jnp.asarray(whole * rng.uniform(1e-4, 1e-2, outputs), jnp.float32)
    if layer.bias is not None:
        layer.bias[...] = jnp.asarray(rng.normal(size=outputs), jnp.float32)
    return layer


@pytest.mark.parametrize("rows", [1, 2, 64, 65])  # integer products up to 64 rows, float ones beyond
@pytest.mark.parametrize("use_bias", [False, True])
def test_an_int8_layer_equals_the_layer(rows, use_bias):
    layer = exact_linear(384, 96, use_bias=use_bias)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, 384)) ** 3, jnp.float32)  # with far outliers
    expected, found = np.asarray(layer(x)), np.asarray(Int8Linear(layer)(x))
    np.testing.assert_allclose(found, expected, atol=3e-4 * np.abs(expected).max())


@pytest.mark.parametrize("out_first", [False, True])
def test_however_the_matrix_is_held_the_product_is_the_same(monkeypatch, out_first):
    """Either way suits one version of JAX; the other is not tried by the tests above."""
    layer = exact_linear(48, 33, use_bias=True)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 48)), jnp.float32)
    expected = Int8Linear(layer)(x)
    monkeypatch.setattr(quantization, "YNNPACK", out_first)
    np.testing.assert_array_equal(Int8Linear(layer)(x), expected)


@pytest.mark.parametrize("rows", [1, 64, 65])
def test_an_int8_layer_behind_a_norm_equals_both(rows):
    rng = np.random.default_rng(1)
    layer, norm = exact_linear(384, 96, use_bias=False), norm_with(rng.normal(size=384))
    x = jnp.asarray(rng.normal(size=(rows, 384)) ** 3 * 10.0 ** rng.uniform(-6, 6, (rows, 1)), jnp.float32)
    expected, found = np.asarray(layer(norm(x))), np.asarray(NormedInt8Linear(norm, layer)(x))
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
    np.testing.assert_array_equal(NormedInt8Linear(norm, layer)(jnp.zeros((3, 384))), np.zeros((3, 96)))


def test_no_normed_row_is_too_large_for_15_bits():
    """The largest there can be: all of a row in one channel, the one with the largest scale."""
    layer, norm = exact_linear(384, 96, use_bias=False), norm_with(np.where(np.arange(384) == 7, -3.0, 1.0))
    x = jnp.zeros((1, 384)).at[0, 7].set(1e4)
    np.testing.assert_allclose(NormedInt8Linear(norm, layer)(x), layer(norm(x)), rtol=1e-3)


@pytest.mark.parametrize("rows", [1, 4, 65])  # from 65 on classes are one-hot numbers
def test_gathered_rows_equal_one_hot_numbers(rows):
    tokens = np.random.default_rng(0).integers(0, vocabulary.EVENT_CLASSES, (rows, 400))
    told = jax.tree.map(lambda leaf: jnp.asarray(leaf[:, -1]), keyboard.after_each(tokens, 4))
    layer = exact_linear(keyboard.feature_count(4), 48, use_bias=False)
    found = GatheredInt8Linear(layer, keyboard.CHANNELS).gather(
        keyboard.channels(told, jnp), keyboard.classes(told, jnp)
    )
    expected = np.asarray(layer(keyboard_features(told, jnp)))
    np.testing.assert_allclose(found, expected, atol=3e-4 * np.abs(expected).max())
    alone = exact_linear(keyboard.feature_count(4) - keyboard.CHANNELS, 48, use_bias=False)
    expected = np.asarray(alone(keyboard.one_hot(keyboard.classes(told, jnp), jnp)))
    found = GatheredInt8Linear(alone, 0).gather(None, keyboard.classes(told, jnp))
    np.testing.assert_allclose(found, expected, atol=3e-4 * np.abs(expected).max())


def test_rows_have_their_own_scale():
    layer = exact_linear(64, 32, use_bias=False)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 64)), jnp.float32) * jnp.array([[1e6], [1e-6]])
    expected, found = np.asarray(layer(x)), np.asarray(Int8Linear(layer)(x))
    for row in range(2):
        np.testing.assert_allclose(found[row], expected[row], atol=3e-4 * np.abs(expected[row]).max())
    np.testing.assert_array_equal(Int8Linear(layer)(jnp.zeros((3, 64))), np.zeros((3, 32)))


def test_quantising_what_was_quantised_changes_nothing():
    stored, scale = quantize(np.random.default_rng(0).normal(size=(50, 20)))
    again, same_scale = quantize(dequantize(stored, scale))
    np.testing.assert_array_equal(again, stored)
    np.testing.assert_allclose(same_scale, scale, rtol=1e-6)


@pytest.mark.parametrize("told", [{}, {"onsets": 4, "recall": 16}])
def test_decoding_with_int8_weights_follows_the_released_weights(told):
    model = noisy_model(dataclasses.replace(PRESETS["tiny"], context=48, **told))
    query = with_int8_weights(model).blocks[0].query
    assert isinstance(query, Int8Linear)
    assert {part[...].dtype for part in query.parts} == {jnp.dtype(jnp.int8)}
    # The same rounded weights in floats: every matrix replaced by what its int8 form stands for.
    for _, module in list(nnx.iter_modules(model)):
        for child in list(vars(module).values()):
            if isinstance(child, nnx.Linear):
                child.kernel[...] = jnp.asarray(dequantize(*quantize(np.asarray(child.kernel[...]))))
    tokens = np.concatenate([[vocabulary.START], np.random.default_rng(0).integers(0, 388, 60)]).astype(np.int32)
    logits = []
    for int8 in (False, True):
        decoder = Decoder(model, int8=int8)
        state = decoder.start([tokens], latents=16, seeds=[0], limit_steps=100)
        logits.append(np.asarray(decoder.force(state, tokens[None, 1:2])[1][0]))
    # Keys in bfloat16 have 8 bits.
    np.testing.assert_allclose(logits[1], logits[0], atol=(4e-3 if YNNPACK else 1e-3) * np.abs(logits[0]).max())


def test_an_int8_model_obeys_the_grammar_and_its_seed():
    decoder = Decoder(noisy_model(PRESETS["tiny"]), int8=True)

    def tokens(seed):
        start = np.array([vocabulary.START], np.int32)
        state = decoder.start([start], latents=16, seeds=[seed], limit_steps=10_000)
        return np.asarray(decoder.decode(state, SamplingOptions().filters(), length=24)[1][0])

    np.testing.assert_array_equal(tokens(1), tokens(1))
    assert not np.array_equal(tokens(1), tokens(2))
