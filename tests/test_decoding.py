"""Cached decoding equals the uncached model, whatever is prefilled, batched, or already out of reach."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model
from flax import nnx

from music_ar import decoding, events
from music_ar.model import PRESETS
from music_ar.sampling import SamplingOptions

CONTEXT, BUDGET = 48, 16
CONFIG = dataclasses.replace(PRESETS["tiny"], context=CONTEXT, latents=32, cross_depths=(1,))
FOREVER = 2**30
PIECE = np.concatenate([[events.START], np.random.default_rng(0).integers(0, events.EVENT_CLASSES, 130)]).astype(
    np.int32
)


@pytest.fixture(scope="module")
def model():
    return noisy_model(CONFIG)


@pytest.fixture(scope="module")
def step(model):
    graph, params = nnx.split(model)
    compiled = jax.jit(lambda params, state: decoding.step(nnx.merge(graph, params), state))
    return lambda state: compiled(params, state)


@pytest.fixture(scope="module")
def stepped(model, step):
    """Logits after each token of PIECE, token by token from nothing."""
    state = decoding.start(model, [PIECE[:1]], latents=BUDGET, seeds=[0], limit_steps=FOREVER)
    rows = []
    for token in PIECE[1:]:
        logits, state = step(state)
        rows.append(np.asarray(logits[0]))
        state = decoding.take(state, jnp.array([token]))
    return np.stack(rows)


def window_start(time):
    """Where the window that predicts at `time` began, from its definition: staggered windows of BUDGET latents."""
    half = BUDGET // 2
    return max(time // half - 1, 0) * half


@pytest.fixture(scope="module")
def uncached(model):
    """Logits after the last of some tokens, by dense masked attention over the whole piece: no cache, no ring.

    Each latent sees the CONTEXT inputs up to its own; the latents before the predicting window's start do not exist.
    """
    graph, params = nnx.split(model)
    ages = jnp.arange(len(PIECE))[None]
    behind = ages[0][:, None] - ages
    off = nnx.Dropout(0.0, deterministic=True)

    @jax.jit
    def logits(params, tokens, first):
        model = nnx.merge(graph, params)
        embedded = model.embed(tokens[None])
        context = model.cross.keys_values(model.context_norm(embedded), ages)

        def attend(block, x, keys_values, seen):
            return block.add(x, jax.nn.dot_product_attention(block.queries(x, ages), *keys_values, mask=seen), off)

        in_context = ((behind >= 0) & (behind < CONTEXT))[None, None]
        # A latent before the window sees itself, so that its softmax has a key; no latent in the window sees it.
        in_window = ((behind >= 0) & (ages >= first) | (behind == 0))[None, None]
        x = attend(model.cross, model.latent(embedded), context, in_context)
        for depth, block in enumerate(model.blocks):
            if depth in CONFIG.cross_depths:
                x = attend(model.further_crosses[CONFIG.cross_depths.index(depth)], x, context, in_context)
            x = attend(block, x, block.keys_values(block.attention_norm(x), ages), in_window)
        return model.logits(x)[0]

    def after_last(tokens):
        padded = np.pad(tokens, (0, len(PIECE) - len(tokens)))  # later tokens are never seen
        return np.asarray(logits(params, padded, window_start(len(tokens) - 1))[len(tokens) - 1])

    return after_last


# First tokens; around the first window's half and end; around the end of the context; several contexts later.
@pytest.mark.parametrize("time", [0, 1, 7, 8, 9, 15, 16, 17, 23, 24, 31, 46, 47, 48, 49, 64, 97, 129])
def test_cached_equals_uncached(uncached, stepped, time):
    np.testing.assert_allclose(stepped[time], uncached(PIECE[: time + 1]), atol=2e-5)


@pytest.mark.parametrize("time", [15, 47])
def test_cached_equals_the_model_as_trained(model, stepped, time):
    expected = model(jnp.asarray(PIECE)[None, : time + 1], latents=time + 1 - window_start(time))[0, -1]
    np.testing.assert_allclose(stepped[time], expected, atol=2e-5)


def test_the_reference_is_not_blind(uncached):
    """Context and window both matter at the sizes tested; otherwise the tests above could not fail."""
    far_changed = PIECE[:50].copy()
    far_changed[3] = (far_changed[3] + 1) % 128
    assert np.abs(uncached(far_changed) - uncached(PIECE[:50])).max() > 1e-3
    out_of_reach = PIECE[:120].copy()
    out_of_reach[3] = (out_of_reach[3] + 1) % 128
    np.testing.assert_array_equal(uncached(out_of_reach), uncached(PIECE[:120]))


@pytest.mark.parametrize("length", [2, 8, 9, 16, 17, 48, 49, 130])
def test_prefill_equals_stepping(model, step, stepped, length):
    state = decoding.start(model, [PIECE[:length]], latents=BUDGET, seeds=[0], limit_steps=FOREVER)
    for time in range(length - 1, min(length + 10, len(PIECE) - 1)):  # and stays equal over the next hand-over
        logits, state = step(state)
        np.testing.assert_allclose(logits[0], stepped[time], atol=2e-5)
        state = decoding.take(state, jnp.array([PIECE[time + 1]]))


def test_a_batch_of_different_lengths_equals_one_by_one(model):
    prompts = [PIECE[:1], PIECE[:5], PIECE[:100], PIECE[:5]]
    filters = SamplingOptions().filters()

    def tokens(prompts, seeds):
        state = decoding.start(model, prompts, latents=BUDGET, seeds=seeds, limit_steps=FOREVER)
        return np.asarray(decoding.decode(model, state, filters, length=24)[1])

    seeds = [3, 1, 1, 4]
    together = tokens(prompts, seeds)
    for row, prompt, seed in zip(together[:3], prompts, seeds, strict=False):
        np.testing.assert_array_equal(tokens([prompt], [seed])[0], row)
    assert not np.array_equal(together[1], together[2])  # one seed, two prompts
    assert not np.array_equal(together[1], together[3])  # one prompt, two seeds


def test_chunks_do_not_matter(model):
    filters = SamplingOptions().filters()

    def tokens(*lengths):
        state = decoding.start(model, [PIECE[:9]], latents=BUDGET, seeds=[5], limit_steps=FOREVER)
        parts = []
        for length in lengths:
            state, part = decoding.decode(model, state, filters, length=length)
            parts.append(np.asarray(part[0]))
        return np.concatenate(parts)

    np.testing.assert_array_equal(tokens(24, 24), tokens(48))


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0, "top_p": 1.0}, {"temperature": 0.0}])
def test_every_sampled_token_obeys_the_grammar(model, options):
    prompts = [np.array([events.START], np.int32)] * 3
    state = decoding.start(model, prompts, latents=BUDGET, seeds=[0, 1, 2], limit_steps=2000)
    _, tokens = decoding.decode(model, state, SamplingOptions(**options).filters(), length=160)
    for row in np.asarray(tokens):
        grammar = events.grammar_after(prompts[0])
        for token in row[row != events.PAD]:
            assert events.allowed_events(grammar)[token]
            grammar = events.advance(grammar, token)


def test_a_row_stops_at_its_limit_and_leaves_the_others(model):
    prompts = [np.array([events.START], np.int32)] * 2
    state = decoding.start(model, prompts, latents=BUDGET, seeds=[0, 1], limit_steps=FOREVER)
    state = state._replace(limit_B=jnp.array([100, FOREVER], jnp.int32))
    state, tokens = decoding.decode(model, state, SamplingOptions().filters(), length=96)
    short, long = np.asarray(tokens)
    stop = int(np.argmax(short == events.PAD))
    steps = events.event_steps(short[: stop + 1])  # the time at which the padding begins
    assert 0 < stop < 96
    assert steps[-1] >= 100
    assert (steps[:-1] < 100).all()
    assert (short[stop:] == events.PAD).all()
    assert (long != events.PAD).all() or events.END in long
    assert np.asarray(state.done_B).tolist()[0]


def test_another_budget_within_a_ring_compiles_nothing_anew(model):
    filters = SamplingOptions().filters()
    compiled: Any = decoding._decode
    counts = set()
    for latents in (16, 14, 10):
        state = decoding.start(model, [PIECE[:9]], latents=latents, seeds=[0], limit_steps=FOREVER)
        _, tokens = decoding.decode(model, state, filters, length=24)
        counts.add(compiled._cache_size())
        np.testing.assert_array_equal(np.asarray(tokens).shape, (1, 24))
    assert len(counts) == 1


def test_windows_by_hand():
    ages = jnp.arange(10)
    starts, active = decoding.window_starts(ages, jnp.full(10, 2))
    never = int(decoding._NEVER)
    np.testing.assert_array_equal(starts[:, 0], [0, 0, 0, 0, 4, 4, 4, 4, 8, 8])
    np.testing.assert_array_equal(starts[:, 1], [never, never, 2, 2, 2, 2, 6, 6, 6, 6])
    np.testing.assert_array_equal(active, [0, 0, 0, 0, 1, 1, 0, 0, 1, 1])
