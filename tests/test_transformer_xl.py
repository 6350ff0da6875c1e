"""Segment recurrence equals attention over each segment and the one before, without gradient to the latter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model
from flax import nnx
from reference_model import SMALL, reference

from music_ar.decoding.backend import Backend
from music_ar.decoding.decoder import Decoder
from music_ar.tokens import vocabulary

LENGTH, SEGMENT = SMALL.context, 4
CONFIG = dataclasses.replace(SMALL, latents=LENGTH, segment=SEGMENT)
TOKENS = np.arange(LENGTH, dtype=np.int32)

model_of = functools.cache(noisy_model)


@pytest.mark.parametrize("length", [LENGTH, LENGTH - 3, SEGMENT, 1])
def test_equals_the_reference(length):
    expected = reference(model_of(CONFIG), TOKENS[:length], length)
    found = model_of(CONFIG)(jnp.asarray(TOKENS[None, :length]))
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-3)


def test_padding_changes_nothing_and_the_last_rows_are_returned():
    padded = np.concatenate([np.full(5, vocabulary.PAD), TOKENS[: LENGTH - 5]]).astype(np.int32)
    expected = reference(model_of(CONFIG), TOKENS[: LENGTH - 5], LENGTH - 5)
    found = model_of(CONFIG)(jnp.asarray(padded[None]), latents=3)
    assert found.shape[1] == 3
    np.testing.assert_allclose(found[0], expected[-3:], rtol=1e-4, atol=1e-3)


def test_gradients_stop_at_the_memory_but_values_do_not():
    model = model_of(dataclasses.replace(CONFIG, conv_width=1, onsets=0, time_heads=0))
    graph, params = nnx.split(model, nnx.Param)
    flat, table = dict(nnx.to_flat_state(params)), model.embedding[...]

    @jax.jit
    def logits(table):
        changed = flat | {("embedding",): flat["embedding",].replace(table)}
        return nnx.merge(graph, nnx.from_flat_state(changed))(jnp.asarray(TOKENS[None]))[0].sum(axis=-1)

    gradient_NxM = np.abs(jax.jacrev(logits)(table)[:, TOKENS]).max(axis=-1)
    segment = np.arange(LENGTH) // SEGMENT
    own = (segment[:, None] == segment[None]) & np.tri(LENGTH, dtype=bool)
    np.testing.assert_array_equal(gradient_NxM > 0, own)
    changed = np.abs(logits(table.at[0].add(1.0)) - logits(table))
    # Three blocks, each of which reaches one segment further.
    np.testing.assert_array_equal(changed > 1e-4, segment <= 3)


def test_reaches_one_segment_further_in_each_block():
    model = model_of(dataclasses.replace(CONFIG, layers=1, conv_width=1, onsets=0, time_heads=0))
    tokens = np.stack([TOKENS, np.where(TOKENS == 0, 99, TOKENS)]).astype(np.int32)
    one, other = model(jnp.asarray(tokens))
    np.testing.assert_array_equal(np.abs(one - other).max(axis=-1) > 1e-4, np.arange(LENGTH) < 3 * SEGMENT)


def test_segments_need_a_latent_for_each_input():
    with pytest.raises(ValueError, match="segments need latents = context = 16, got 8 latents"):
        dataclasses.replace(CONFIG, latents=8)


def test_decodes_as_the_model_computes_within_two_segments():
    model = model_of(CONFIG)
    tokens = np.concatenate([[vocabulary.START], np.random.default_rng(0).integers(0, 388, 2 * SEGMENT - 1)])
    tokens = tokens.astype(np.int32)
    expected = model(jnp.asarray(tokens[None]))[0]
    for prefilled in (1, 6):
        decoder = Decoder(model, Backend())
        state = decoder.start([tokens[:prefilled]], latents=CONFIG.most_latents, seeds=[0], limit_steps=2**30)
        _, logits = decoder.teacher_force(state, np.append(tokens[prefilled:], 0)[None])
        np.testing.assert_allclose(logits[0], expected[prefilled - 1 :], rtol=1e-4, atol=1e-3)
