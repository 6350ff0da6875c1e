"""The model equals a plain reference, gradients show what influences what, and sizes are checked."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from reference_model import SMALL, reference

from music_ar.features import keyboard, notes
from music_ar.model.attention import causal_attention, rotate
from music_ar.model.config import PRESETS, Compute
from music_ar.model.perceiver_ar import PerceiverAR, parameter_count
from music_ar.tokens import vocabulary

CONFIG = SMALL
M, N = CONFIG.context, CONFIG.latents
PLAIN = dataclasses.replace(CONFIG, layers=1, conv_width=1, kv_heads=4, onsets=0, time_heads=0)
# Every input is another token, so the gradient of an embedding's row is that of one input.
DISTINCT = np.arange(2 * M, dtype=np.int32).reshape(2, M)

model_of = functools.cache(noisy_model)


def padded(tokens, length):
    return np.concatenate([np.full(length - len(tokens), vocabulary.PAD), tokens]).astype(np.int32)[None]


@functools.partial(jax.jit, static_argnames=("graph", "latents", "kept_prefix", "dropout"))
def compiled(graph, params, tokens, key=None, **options):
    return nnx.merge(graph, params)(tokens, key=key, **options)


def logits_of(model, tokens, latents=N, **options):
    return np.asarray(compiled(*nnx.split(model, nnx.Param), jnp.asarray(tokens), latents=latents, **options))


@functools.partial(jax.jit, static_argnames=("graph", "latents", "kept_prefix"))
def gradients(graph, params, tokens, key=None, **options):
    flat = dict(nnx.to_flat_state(params))
    probe = np.random.default_rng(0).normal(size=vocabulary.VOCABULARY_SIZE).astype(np.float32)

    def probed(table):
        changed = flat | {("embedding",): flat["embedding",].replace(table)}
        return nnx.merge(graph, nnx.from_flat_state(changed))(tokens, key=key, **options) @ probe

    return jax.jacrev(probed)(flat["embedding",][...])


def influence(model, tokens, **options):
    """Whether each logit row depends on each input, by gradient: bool [B, N, B, M]."""
    gradient = gradients(*nnx.split(model, nnx.Param), jnp.asarray(tokens), **options)
    return (np.asarray(gradient)[:, :, tokens] != 0).any(-1)


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        CONFIG,
        dataclasses.replace(PLAIN, kv_heads=1, rotary_fraction=1.0, rotary_wavelength=100.0),
    ],
    ids=["plain", "all features", "one key head, all channels rotated"],
)
def test_equals_the_reference(config):
    model, tokens = model_of(config), DISTINCT * 7
    expected = [reference(model, row, N) for row in tokens]
    np.testing.assert_allclose(logits_of(model, tokens), expected, rtol=1e-4, atol=1e-3)


def test_retrieval_reaches_back_beyond_the_context():
    """Attention reads the last 16 inputs; what they retrieve is from inputs before them."""
    model = model_of(dataclasses.replace(CONFIG, retrieval_notes=20))
    theme, other = np.random.default_rng(0).integers(30, 90, (2, 12))
    tokens = np.stack([np.concatenate([theme, other, theme]), np.concatenate([other, other[::-1], theme])])
    expected = [reference(model, row, N) for row in tokens]
    found = logits_of(model, tokens.astype(np.int32))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    further = model_of(dataclasses.replace(CONFIG, retrieval_notes=26))
    changed = logits_of(further, tokens.astype(np.int32))
    assert np.abs(changed[1] - found[1]).max() < 1e-3 < np.abs(changed[0] - found[0]).max()


@pytest.mark.parametrize("latents", [1, M])
def test_equals_the_reference_with_any_number_of_latents(latents):
    expected = [reference(model_of(CONFIG), row, latents) for row in DISTINCT]
    found = logits_of(model_of(CONFIG), DISTINCT, latents=latents)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_padding_and_other_rows_change_nothing():
    model, lengths = model_of(CONFIG), (1, 3, N - 1, N, N + 1, M - 1, M)
    together = logits_of(model, np.concatenate([padded(DISTINCT[0, :length], M) for length in lengths]))
    for logits, length in zip(together, lengths, strict=True):
        rows = min(length, N)
        expected = reference(model, DISTINCT[0, :length], rows)
        np.testing.assert_allclose(logits[-rows:], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("latents", [N, M])
def test_each_row_depends_on_all_inputs_up_to_its_own_and_on_no_other(latents):
    found = influence(model_of(CONFIG), DISTINCT, latents=latents)
    past = np.arange(M)[None] <= np.arange(M - latents, M)[:, None]
    np.testing.assert_array_equal(found, past[None, :, None] & np.eye(2, dtype=bool)[:, None, :, None])


def test_padding_has_no_influence():
    tokens = np.concatenate([padded(DISTINCT[0, :5], M), DISTINCT[1:]])
    found = influence(model_of(CONFIG), tokens)[0, -5:, 0]
    np.testing.assert_array_equal(found, np.tri(5, M, M - 5, dtype=bool) & (np.arange(M) >= M - 5))


def test_dropped_positions_have_no_influence_and_latents_are_never_dropped():
    model, options = model_of(PLAIN), {"latents": N, "kept_prefix": 3, "key": jax.random.key(3)}
    found = influence(model, DISTINCT, **options)
    logits = logits_of(model, DISTINCT, **options)
    chosen = [np.flatnonzero(found[row, 0, row, : M - N]) for row in range(2)]
    for row in range(2):
        seen = np.isin(np.arange(M), chosen[row]) | (np.arange(M) >= M - N)
        past = np.arange(M)[None] <= np.arange(M - N, M)[:, None]
        np.testing.assert_array_equal(found[row, :, row], seen & past)
        assert not found[row, :, 1 - row].any()
        expected = reference(model, DISTINCT[row], N, np.flatnonzero(seen))
        np.testing.assert_allclose(logits[row], expected, rtol=1e-4, atol=1e-3)
    assert [len(positions) for positions in chosen] == [3, 3]
    assert (chosen[0] != chosen[1]).any()  # each row draws its own


def test_dropping_padding_drops_no_input():
    """If all real inputs are latents, only padding can be kept or dropped."""
    model, tokens = model_of(PLAIN), np.concatenate([padded(DISTINCT[row, :5], M) for row in range(2)])
    logits = logits_of(model, tokens, kept_prefix=3, key=jax.random.key(0))
    for row in range(2):
        np.testing.assert_allclose(logits[row, -5:], reference(model, DISTINCT[row, :5], 5), rtol=1e-4, atol=1e-3)


def test_prefix_positions_are_kept_equally_often():
    rows = np.arange(20 * M).reshape(20, M)
    draws = [
        influence(model_of(PLAIN), rows, latents=1, kept_prefix=5, key=jax.random.key(seed))[range(20), 0, range(20)]
        for seed in range(12)
    ]
    counts = np.sum(draws, axis=(0, 1))
    assert counts[-1] == 240  # the latent
    assert counts[:-1].sum() == 240 * 5
    assert np.abs(counts[:-1] - 80).max() < 4 * np.sqrt(240 * 1 / 3 * 2 / 3)  # each a third of the time


def test_latents_are_independent_before_self_attention():
    """With self blocks that add nothing, N latents give the last N rows of M."""
    model = nnx.merge(*nnx.split(model_of(CONFIG), nnx.Param), copy=True)
    few, many = (logits_of(model, DISTINCT, latents=latents)[:, -N:] for latents in (N, M))
    assert np.abs(few - many).max() > 0.01
    for block in model.blocks:
        block.output.kernel[...] = jnp.zeros_like(block.output.kernel[...])
    few, many = (logits_of(model, DISTINCT, latents=latents)[:, -N:] for latents in (N, M))
    np.testing.assert_allclose(few, many, rtol=1e-4, atol=1e-4)


def test_jit_equals_no_jit():
    model = model_of(PLAIN)
    without_jit = model(jnp.asarray(DISTINCT))
    np.testing.assert_allclose(logits_of(model, DISTINCT), without_jit, rtol=1e-4, atol=1e-4)


def test_labels_reach_every_latent_and_zeros_are_none():
    model, rng = noisy_model(dataclasses.replace(CONFIG, label_size=3)), np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary.EVENT_CLASSES, (2, M), np.int32)
    unlabeled = logits_of(model, tokens)
    np.testing.assert_array_equal(logits_of(model, tokens, labels_BxC=jnp.zeros((2, 3))), unlabeled)
    labeled = logits_of(model, tokens, labels_BxC=jnp.array([[0.0, 0, 0], [0, 1, 0]]))
    np.testing.assert_allclose(labeled[0], unlabeled[0], atol=1e-5)
    assert (np.abs(labeled[1] - unlabeled[1]).max(axis=-1) > 1e-3).all()


def test_dropout_depends_on_the_key():
    def dropped(seed):
        return logits_of(model_of(PLAIN), DISTINCT, dropout=0.3, key=jax.random.key(seed))

    np.testing.assert_array_equal(dropped(5), dropped(5))
    assert np.abs(dropped(5) - dropped(6)).max() > 0.01
    assert np.abs(dropped(5) - logits_of(model_of(PLAIN), DISTINCT)).max() > 0.01


@pytest.mark.parametrize("config", [PLAIN, CONFIG], ids=["no convolution", "convolution"])
def test_embed_last_is_the_last_of_embed(config):
    model, conv_width = model_of(config), config.conv_width
    tokens = jnp.array([[vocabulary.PAD, vocabulary.PAD, 5, 7, 11], [1, 2, 3, vocabulary.START, 9]], jnp.int32)
    embedded = model.embed(tokens)
    for end in range(conv_width, 6):
        last = model.embed_last(tokens[:, end - conv_width : end])
        np.testing.assert_allclose(last, embedded[:, end - 1], rtol=1e-5, atol=1e-6)


def test_causal_attention_by_hand():
    # Equal scores, and values that are one-hot rows: the result is what attention reads.
    q, k, v = jnp.zeros((1, 4, 2, 4)), jnp.ones((1, 4, 1, 4)), jnp.eye(4).reshape(1, 4, 1, 4)
    seen = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    attended = causal_attention(q, k, v)
    for head in range(2):
        np.testing.assert_allclose(attended[0, :, head], seen / seen.sum(1, keepdims=True), rtol=1e-6)


@given(first=st.integers(0, 4000), second=st.integers(0, 4000), moved=st.integers(0, 4000), seed=st.integers(0, 2**16))
def test_rotated_products_depend_on_differences_of_positions_alone(first, second, moved, seed):
    a, b = np.random.default_rng(seed).normal(size=(2, 8)).astype(np.float32)

    def rotated(x, position):
        positions = jnp.array([[[position]]])
        found = rotate(jnp.asarray(x).reshape(1, 1, 1, 8), positions, heads=(1,), size=6, wavelength=1000.0)
        return np.asarray(found, np.float64).ravel()

    before = rotated(a, first) @ rotated(b, second)
    after = rotated(a, first + moved) @ rotated(b, second + moved)
    assert abs(before - after) < 0.02  # an angle of thousands is good to 1e-4 or so in float32
    np.testing.assert_array_equal(rotated(a, first)[6:], a[6:])
    np.testing.assert_array_equal(rotated(a, 0), a)
    assert np.abs(rotated(a, 1) - a)[:6].max() > 1e-4


def test_a_new_model_predicts_a_uniform_distribution():
    logits = logits_of(PerceiverAR(CONFIG, rngs=nnx.Rngs(0)), DISTINCT)
    np.testing.assert_array_equal(logits, np.zeros((2, N, vocabulary.VOCABULARY_SIZE)))


def test_bfloat16_computes_nearly_the_same():
    low = PerceiverAR(CONFIG, rngs=nnx.Rngs(0), compute=Compute(dtype="bfloat16"))
    nnx.update(low, nnx.state(model_of(CONFIG), nnx.Param))
    exact, rough = (logits_of(model, DISTINCT) for model in (model_of(CONFIG), low))
    assert rough.dtype == np.float32
    difference = np.abs(exact - rough)
    assert 0 < difference.max() < 0.15 * np.abs(exact).max()


def shapes_of(config):
    return nnx.eval_shape(lambda: PerceiverAR(config, rngs=nnx.Rngs(0)))


def test_the_control_differs_in_its_window_alone():
    small, control = PRESETS["small"], PRESETS["small-decoder"]
    assert control.context == control.latents
    assert dataclasses.replace(control, context=small.context, latents=small.latents) == small
    assert parameter_count(shapes_of(small)) == parameter_count(shapes_of(control))
    assert 21e6 < parameter_count(shapes_of(small)) < 23e6


def test_operations_are_counted_as_by_hand():
    config = dataclasses.replace(CONFIG, latents=M)
    kernels = sum(
        leaf.size for path, leaf in nnx.to_flat_state(nnx.state(shapes_of(config), nnx.Param)) if path[-1] == "kernel"
    )
    # Scores and their use: two products of 4 * 4 channels with half of the M rows, in the cross and two self blocks.
    assert config.flops_per_target(kept_prefix=0) == 6 * (kernels + 3 * 2 * 16 * M / 2)
    # One more kept prefix position: its features, key and value for each row of N, and both products for each latent.
    more = CONFIG.flops_per_target(kept_prefix=5) - CONFIG.flops_per_target(kept_prefix=4)
    features = keyboard.CHANNELS + notes.feature_count(2)
    assert CONFIG.feature_count == features
    assert more == pytest.approx(6 * (12 * (16 + features) / N + 2 * 16))


@pytest.mark.usefixtures("any_types")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": M + 1}, "latents must be at most context = 16, got 17"),
        ({"latents": 0}, "latents must be a whole number from 1 to 1048576, got 0"),
        ({"layers": -1}, "layers must be"),
        ({"layers": True}, "layers must be"),
        ({"width": 10**9}, "width must be a whole number from 1 to 65536, got 1000000000"),
        ({"context": 10**400}, "context must be .*, got a number of 401 digits"),
        ({"rotary_wavelength": float("inf")}, "rotary_wavelength must be"),
        ({"head_size": 0}, "head_size must be"),
        ({"conv_width": 0}, "conv_width must be"),
        ({"heads": 3}, "heads must be a multiple of kv_heads, got 3 and 2"),
        ({"head_size": 6}, r"must be even.* 0\.5 \* 6"),
        ({"rotary_fraction": 1.5}, r"rotary_fraction must be a number from 0 to 1, got 1\.5"),
        ({"rotary_wavelength": 0.0}, "rotary_wavelength must be a number above 0"),
        ({"time_heads": 3}, "time_heads must be at most kv_heads = 2, got 3"),
        ({"retrieval_notes": 11}, "retrieval_notes must be 0 or at least 12, got 11"),
        ({"retrieval_notes": 12, "onsets": 13}, "retrieval_notes must be 0 or at least 13, got 12"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": 0}, r"latents must be in 1\.\.16.*got 0"),
        ({"latents": M + 1}, r"latents must be in 1\.\.16.*got 17"),
        ({"kept_prefix": 3}, "kept_prefix = 3 .* needs a key"),
        ({"dropout": 0.1}, r"dropout = 0\.1 needs a key"),
    ],
)
def test_impossible_calls_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        logits_of(model_of(CONFIG), DISTINCT, **options)
