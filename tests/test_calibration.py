"""Calibration: known scales and offsets are found, and are in the model's logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_performance, noisy_model
from flax import nnx

from music_ar.evaluation.calibration import best_temperature, calibrate
from music_ar.evaluation.likelihood import TOKEN_TYPES, ScoringConfig, score, score_tokens
from music_ar.model.config import PRESETS
from music_ar.tokens import codec, vocabulary

CONFIG = dataclasses.replace(PRESETS["tiny"], context=12, latents=8, layers=1)
STRIDE = ScoringConfig(stride=8)


@pytest.fixture(scope="module")
def model():
    return noisy_model(CONFIG)


@pytest.fixture(scope="module")
def pieces():
    encoded = codec.encode(make_performance(3))
    return [np.array([vocabulary.START, *encoded[:length], vocabulary.END], np.uint16) for length in (3, 10, 37)]


def test_the_best_temperature_is_the_vertex_or_an_end():
    temperatures = np.array([0.8, 0.9, 1.0, 1.1, 1.2])
    nats = 3 + 5 * (temperatures - 0.97) ** 2
    assert best_temperature(list(temperatures), nats) == pytest.approx((0.97, 3.0))
    assert best_temperature(list(temperatures), temperatures) == pytest.approx((0.8, 0.8))
    assert best_temperature(list(temperatures), -temperatures) == pytest.approx((1.2, -1.2))


TYPE_SIZES = (vocabulary.PITCHES, vocabulary.PITCHES, vocabulary.MAX_SHIFT_STEPS, vocabulary.VELOCITY_BINS, 3)


def by_type(numbers):
    """A number per token type as one per token of the vocabulary."""
    return np.repeat(np.asarray(numbers), TYPE_SIZES)


def constant_model(logits_V):
    """A model that gives the same logits whatever it reads."""
    model = noisy_model(dataclasses.replace(CONFIG, context=256, latents=256))
    kernel_DxV = jnp.zeros_like(model.head.kernel[...])
    nnx.update(model.head, {"kernel": kernel_DxV, "bias": jnp.asarray(logits_V, jnp.float32)})
    return model


@pytest.fixture(scope="module")
def frequencies():
    """Pieces, and the logits by which each token is exactly as likely as it is frequent in them."""
    random = np.random.default_rng(0)
    counts = np.ceil(30 * np.exp(random.normal(size=vocabulary.VOCABULARY_SIZE))).astype(int)
    counts[[vocabulary.PAD, vocabulary.START]] = 0
    parts = np.array_split(random.permutation(np.repeat(np.arange(vocabulary.VOCABULARY_SIZE), counts)), 3)
    pieces = [np.array([vocabulary.START, *part], np.uint16) for part in parts]
    return pieces, np.where(counts > 0, np.log(np.maximum(counts, 1) / counts.sum()), -30.0)


@pytest.mark.parametrize(
    ("scales", "offsets"),
    [
        ((1, 1, 1, 1, 1), (0, 0, 0, 0, 0)),
        ((1.25, 1.25, 1.25, 1.25, 1.25), (0, 0, 0, 0, 0)),  # one temperature
        ((0.7, 1.5, 1.1, 0.9, 1), (-0.4, 0.8, -0.5, 0.2, 0.1)),  # so far off that whole steps lead up
    ],
)
def test_calibration_finds_the_scale_and_the_offset_of_each_token_type(frequencies, scales, offsets):
    pieces, logits_V = frequencies
    better, found = calibrate(constant_model((logits_V - by_type(offsets)) / by_type(scales)), pieces)
    assert tuple(found) == TOKEN_TYPES
    assert better.head.bias is not None
    chances_V = jax.nn.softmax(better.head.bias[...])
    np.testing.assert_allclose(chances_V, np.exp(logits_V), rtol=0.005, atol=1e-7)
    # Offsets count beside each other only, and the one end token's scale and offset do the same.
    np.testing.assert_allclose([found[name]["scale"] for name in TOKEN_TYPES[:4]], scales[:4], rtol=0.005)
    found_offsets = np.array([found[name]["offset"] for name in TOKEN_TYPES[:4]])
    np.testing.assert_allclose(found_offsets - found_offsets[0], np.subtract(offsets[:4], offsets[0]), atol=0.02)


def test_a_calibrated_model_is_left_alone(frequencies):
    pieces, logits_V = frequencies
    better, found = calibrate(constant_model(logits_V), pieces)
    assert [fit["scale"] for fit in found.values()] == pytest.approx([1] * 5, abs=1e-3)
    assert [fit["offset"] for fit in found.values()] == pytest.approx([0] * 5, abs=1e-3)
    assert better.head.bias is not None
    np.testing.assert_allclose(jax.nn.softmax(better.head.bias[...]), np.exp(logits_V), rtol=0.001, atol=1e-7)


def test_calibration_is_worth_more_than_any_temperature(model, pieces):
    """Its scales and offsets are in the logits, whatever was read, and nothing else has changed."""
    before = nnx.state(nnx.clone(model))
    better, found = calibrate(model, pieces)
    nats = np.concatenate(score_tokens(model, pieces, STRIDE, temperatures=np.geomspace(0.5, 50, 30).tolist()), axis=1)
    assert score(better, pieces, STRIDE).nll < nats.sum(axis=1).min() - 5
    tokens_BxT = jnp.asarray(pieces[-1][None, 3:20], jnp.int32)
    scale_V, offset_V = (by_type([fit[name] for fit in found.values()]) for name in ("scale", "offset"))
    logits = jax.jit(lambda model: model(tokens_BxT))
    np.testing.assert_allclose(
        logits(better), logits(model) * scale_V[None, None] + offset_V[None, None], rtol=1e-4, atol=1e-4
    )
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))


def test_nothing_to_calibrate_on_is_refused(model):
    with pytest.raises(ValueError, match="at least one piece"):
        calibrate(model, [])
