"""The kernel for GPUs finds what ordinary operations find. Here it runs as the interpreter understands it, on a CPU."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model
from flax import nnx

from music_ar.decoding import decoder as decoding
from music_ar.decoding import pallas_attention
from music_ar.decoding.decoder import Decoder
from music_ar.decoding.pallas_attention import Tiling
from music_ar.decoding.sampling import SamplingOptions
from music_ar.model.config import PRESETS
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.tokens import vocabulary

# Three query heads a key head, of which one counts time; a ring of the context that is no power of two.
CONFIG = dataclasses.replace(
    PRESETS["tiny"], context=48, latents=32, layers=1, heads=6, head_size=16, onsets=3, time_heads=1, cross_depths=(0,)
)
BUDGET = 16
PIECE = np.concatenate(
    [[vocabulary.START], np.random.default_rng(0).integers(0, vocabulary.EVENT_CLASSES, 130)]
).astype(np.int32)
SPLIT = Tiling(splits=2, block=8)


def logits(model, *, fused, mode, steps=56, latents=BUDGET):
    """Of three rows: one from nothing, one past its context, and one whose piece replaced another."""
    decoder = Decoder(model, int8=False, fused=fused)
    start = functools.partial(decoder.start, latents=latents, limit_steps=2**30, mode=mode)
    state = start([PIECE[:1], PIECE[:70], PIECE[:5]], seeds=[0, 0, 0])
    state, _ = decoder.force(state, np.stack([PIECE[1:5], PIECE[70:74], PIECE[5:9]]))
    state = state.replaced(2, start([PIECE[:9]], seeds=[0]))
    # Budgets of their own, within one ring.
    state = state._replace(budget_B=jnp.array([latents, latents - 3, latents - 4], jnp.int32))
    after = np.stack([PIECE[5:][:steps], PIECE[74:][:steps], PIECE[9:][:steps]])
    return np.asarray(decoder.force(state, after)[1])


@pytest.fixture
def split(monkeypatch):
    """Rings are split among programs even where they are small."""
    monkeypatch.setattr(Tiling, "of", staticmethod(lambda *_, **__: SPLIT))
    yield
    jax.clear_caches()  # what was compiled holds the tiling


@pytest.mark.parametrize("mode", decoding.WINDOW_MODES)
def test_equals_ordinary_operations(mode):
    """Before, at and after the rings wrap (of 16 latents and of 48 inputs)."""
    model = noisy_model(CONFIG)
    np.testing.assert_allclose(logits(model, fused=True, mode=mode), logits(model, fused=False, mode=mode), atol=2e-5)


def test_a_split_ring_is_put_together(split):
    model = noisy_model(CONFIG)
    np.testing.assert_allclose(
        logits(model, fused=True, mode="exact"), logits(model, fused=False, mode="exact"), atol=2e-5
    )


@pytest.mark.parametrize("heads", [{"heads": 2, "kv_heads": 2}, {"heads": 8, "kv_heads": 1}])
def test_other_numbers_of_heads(heads):
    model = noisy_model(dataclasses.replace(CONFIG, cross_depths=(), **heads))
    fused, plain = (logits(model, fused=fused, mode="sliding", steps=20) for fused in (True, False))
    np.testing.assert_allclose(fused, plain, atol=2e-5)


def test_sizes_that_do_not_suit_are_refused():
    with pytest.raises(ValueError, match="of 16; got 12 and 48"):
        Decoder(noisy_model(dataclasses.replace(CONFIG, head_size=12)), fused=True)


@pytest.mark.parametrize(
    ("capability", "head_size", "fused"),
    [("9.0", 16, True), ("9.0", 12, False), ("9.0", 128, False), ("8.0", 16, False)],
)
def test_it_is_the_default_where_it_was_measured_and_suits(monkeypatch, capability, head_size, fused):
    config = dataclasses.replace(CONFIG, head_size=head_size)
    model = PerceiverAR(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(jnp.bfloat16))
    assert not Decoder(model, int8=False).fused
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(pallas_attention.jax, "local_devices", lambda: [device])
    assert Decoder(model, int8=False).fused is fused
    assert not Decoder(noisy_model(config), int8=False).fused  # in float32


def test_bfloat16():
    params = nnx.state(noisy_model(CONFIG))
    model = PerceiverAR(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.dtype(jnp.bfloat16))
    nnx.update(model, params)
    exact = logits(noisy_model(CONFIG), fused=False, mode="sliding")
    errors = [np.abs(logits(model, fused=fused, mode="sliding") - exact).mean() for fused in (True, False)]
    assert 0 < errors[0] < 1.1 * errors[1]  # as near the float32 model as ordinary operations are


def test_a_ring_that_is_smaller_than_a_block():
    model = noisy_model(CONFIG)
    fused, plain = (logits(model, fused=fused, mode="sliding", steps=20, latents=6) for fused in (True, False))
    np.testing.assert_allclose(fused, plain, atol=2e-5)


def test_it_samples_the_same_piece():
    model, filters = noisy_model(CONFIG), SamplingOptions().filters()

    def tokens(fused):
        decoder = Decoder(model, int8=False, fused=fused)
        state = decoder.start([PIECE[:9]] * 2, latents=BUDGET, seeds=[0, 1], limit_steps=2**30)
        return np.asarray(decoder.decode(state, filters, length=24)[1])

    np.testing.assert_array_equal(tokens(True), tokens(False))


@pytest.mark.parametrize("mode", decoding.WINDOW_MODES)
def test_rows_in_two_parts_are_what_they_are_together(monkeypatch, mode):
    """Each part finds its own rings among all, in the context's cache and in the windows'."""
    decoder, filters = Decoder(noisy_model(CONFIG), int8=False, fused=True), SamplingOptions().filters()
    prompts = [PIECE[:9], PIECE[:70], PIECE[:5], PIECE[:1]]
    made = []
    for count in (1, 2):
        monkeypatch.setattr(decoding, "_part_count", lambda rows, count=count: count)
        state = decoder.start(prompts, latents=BUDGET, seeds=[0, 1, 2, 3], limit_steps=2**30, mode=mode)
        made.append([np.asarray(found) for found in decoder.decode_scored(state, filters, length=24)[1:]])
    np.testing.assert_array_equal(made[0][0], made[1][0])
    np.testing.assert_allclose(made[0][1], made[1][1], atol=2e-5)


def test_an_odd_number_of_rows_stays_together():
    assert [decoding._part_count(rows) for rows in (1, 255, 256, 257, 258)] == [1, 1, 2, 1, 2]


@pytest.mark.parametrize(
    ("cache_rows", "ring"), [(2, 1024), (6, 1024), (2, 4096), (2, 65_536), (512, 1024), (4, 16), (6, 48), (4, 24 * 16)]
)
@pytest.mark.parametrize("beside", [False, True])
def test_tilings_divide_the_ring(cache_rows, ring, beside):
    tiling = Tiling.of(cache_rows, ring, beside=beside)
    assert ring % (tiling.splits * tiling.block) == 0
    assert tiling.block >= pallas_attention.LEAST_RING
    assert {tiling.block & (tiling.block - 1), tiling.splits & (tiling.splits - 1)} == {0}  # powers of two


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="JAX 0.11 translates for a GPU only where there is one")
@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("window", decoding.WINDOW_MODES)
def test_triton_takes_it(monkeypatch, batch, window):
    """Steps with the shipped model's heads are translated for a GPU, which refuses unknown operations and shapes."""
    monkeypatch.setattr(pallas_attention, "_interpreted", lambda: False)
    config = dataclasses.replace(PRESETS["small"], layers=2, width=32, hidden=32, cross_depths=(1,))
    decoder = Decoder(PerceiverAR(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(jnp.bfloat16)), int8=False, fused=True)
    prompts = [np.array([vocabulary.START], np.int32)] * batch
    state = jax.eval_shape(
        lambda: decoder.start(prompts, latents=1024, seeds=range(batch), limit_steps=100, mode=window)
    )
    traced = decoding._decode.trace(decoder.graph, decoder.params, state, SamplingOptions().filters(), 2, None)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("triton") >= 4
