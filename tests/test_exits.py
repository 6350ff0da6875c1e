"""Early exits: predictions after fewer blocks, fixed depth and tokens that leave early, on both engines."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training
from conftest import noisy_model
from flax import nnx

from music_ar.decoding.backend import Backend
from music_ar.decoding.decoder import Decoder
from music_ar.decoding.interface import AnyDecoder, shared_options
from music_ar.decoding.native import library
from music_ar.decoding.native.decoder import NativeDecoder
from music_ar.decoding.sampling import SamplingOptions
from music_ar.model.config import PRESETS
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.pretrained import model_of, weights_of
from music_ar.tokens import vocabulary
from music_ar.tokens.vocabulary import START
from music_ar.training.losses import token_nll
from music_ar.training.trainer import Trainer

CONTEXT, LATENTS = 48, 16
CONFIG = dataclasses.replace(
    PRESETS["tiny"], context=CONTEXT, onsets=3, retrieval_notes=24, time_heads=1, layers=4, exits=(1, 3)
)
FOREVER = 2**30
OPTIONS = shared_options(SamplingOptions())
PIECES = np.random.default_rng(1).integers(0, vocabulary.EVENT_CLASSES, (3, 90)).astype(np.int32)
PIECES[:, 0] = START


@pytest.fixture(scope="module")
def weights():
    return weights_of(noisy_model(CONFIG))


@pytest.fixture(scope="module")
def jax_decoder(weights):
    return Decoder(model_of(weights), Backend())


@pytest.fixture(scope="module")
def native(weights):
    if library.load() is None:
        pytest.skip("the engine was not built: there is no C++ compiler")
    return NativeDecoder(CONFIG, weights.tensors)


@pytest.fixture(scope="module", params=["jax", "native"])
def decoder(request, jax_decoder) -> AnyDecoder:
    return jax_decoder if request.param == "jax" else request.getfixturevalue("native")


def of_blocks(weights, blocks):
    """The model with some of its blocks only, and without exits."""
    tensors = {name: array for name, array in weights.tensors.items() if not name.startswith("blocks.")}
    for place, block in enumerate(blocks):
        start = f"blocks.{block}."
        tensors |= {
            f"blocks.{place}.{name.removeprefix(start)}": array
            for name, array in weights.tensors.items()
            if name.startswith(start)
        }
    return weights._replace(config=dataclasses.replace(weights.config, layers=len(blocks), exits=()), tensors=tensors)


def cut(weights, layers):
    """The model's first blocks alone."""
    return of_blocks(weights, range(layers))


def forced(decoder, pieces=PIECES, *, prompt=1, latents=LATENTS, **depth):
    """Logits of the tokens after a prompt, and the state after them."""
    starts = [piece[:prompt] for piece in pieces]
    state = decoder.start(starts, latents=latents, seeds=range(len(pieces)), limit_steps=FOREVER, **depth)
    state, logits = decoder.teacher_force(state, pieces[:, prompt:])
    return np.asarray(logits), state


def sure(logits):
    """The probability of the likeliest token."""
    return np.exp(logits.max(-1) - np.asarray(jax.nn.logsumexp(logits, axis=-1)))


def between(probabilities):
    """A threshold with as many above as below, as far as possible from each."""
    middle = np.sort(np.ravel(probabilities))[len(np.ravel(probabilities)) // 4 : -len(np.ravel(probabilities)) // 4]
    gap = np.argmax(np.diff(middle))
    return float(middle[gap : gap + 2].mean())


def assert_close(found, expected):
    """As between the engines in `test_native`."""
    error = np.abs(found - expected)
    assert error.mean() < 5e-4
    assert error.max() < 2e-2


# The model.


def test_an_exit_predicts_what_the_first_blocks_alone_predict(weights):
    tokens = jnp.asarray(PIECES[:, :CONTEXT])
    at_exits = model_of(weights).at_depths(tokens, depths=CONFIG.depths, latents=LATENTS)
    for depth, logits in zip(CONFIG.depths, at_exits, strict=True):
        alone = model_of(cut(weights, depth))(tokens, latents=LATENTS)
        np.testing.assert_allclose(logits, alone, atol=1e-4)
        np.testing.assert_allclose(model_of(weights)(tokens, layers=depth, latents=LATENTS), alone, atol=1e-4)


def test_a_dropped_layer_changes_nothing_and_the_first_is_never_dropped(weights):
    tokens = jnp.asarray(PIECES[:, :CONTEXT])
    model = model_of(weights)
    whole = model.at_depths(tokens, depths=(1, 4), latents=LATENTS)
    dropped = model.at_depths(tokens, depths=(1, 4), layer_dropout=1.0, key=jax.random.key(0), latents=LATENTS)
    np.testing.assert_allclose(dropped[0], whole[0], atol=1e-5)
    # At rate 1 the last block is always skipped, the second and third by a third and two thirds of the rows.
    subsets = [[0], [0, 1], [0, 2], [0, 1, 2]]
    kept = [model_of(of_blocks(weights, subset))(tokens, latents=LATENTS) for subset in subsets]
    for row in range(len(tokens)):
        assert min(np.abs(dropped[1][row] - each[row]).max() for each in kept) < 1e-4


@pytest.mark.parametrize("exits", [(0,), (2, 2), (3, 1), (4,), (5,)])
def test_exits_rise_and_are_below_the_last_block(exits):
    with pytest.raises(ValueError, match="exits"):
        dataclasses.replace(CONFIG, exits=exits)


# Decoding at a fixed depth.


@pytest.mark.parametrize("prompt", [1, 40])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_fixed_depth_decodes_as_the_first_blocks_alone(weights, decoder, layers, prompt):
    alone = cut(weights, layers)
    shallow = Decoder(model_of(alone), Backend())
    assert_close(forced(decoder, prompt=prompt, layers=layers)[0], forced(shallow, prompt=prompt)[0])


def test_the_native_engine_decodes_a_fixed_depth_to_the_byte_as_a_model_of_that_depth(weights, native):
    alone = NativeDecoder(cut(weights, 3).config, cut(weights, 3).tensors)
    np.testing.assert_array_equal(forced(native, prompt=40, layers=3)[0], forced(alone, prompt=40)[0])


def test_a_depth_without_an_exit_is_refused(decoder):
    with pytest.raises(ValueError, match=r"\[1, 3, 4\]"):
        forced(decoder, layers=2)


# Tokens that leave early.


def test_at_threshold_1_every_token_is_that_of_all_blocks(decoder):
    np.testing.assert_array_equal(forced(decoder, confidence=1.0)[0], forced(decoder)[0])


def test_at_threshold_0_every_token_leaves_at_the_first_exit(decoder):
    logits, state = forced(decoder, confidence=0.0)
    first, _ = forced(decoder, layers=1)
    # A first exit's latents see only caches that do not depend on later blocks.
    assert_close(logits, first)
    assert np.asarray(state.layers_run_B).tolist() == [PIECES.shape[1] - 1] * 3


def test_a_token_leaves_when_it_is_sure(decoder):
    threshold = between(sure(forced(decoder, layers=1)[0]))
    logits, state = forced(decoder, confidence=threshold)
    first = forced(decoder, layers=1)[0]
    left = sure(first) > threshold
    assert 0.2 < left.mean() < 0.8
    assert_close(logits[left], first[left])
    assert np.abs(logits[~left] - first[~left]).max(axis=-1).min() > 0.1
    run, (leaving, staying) = np.asarray(state.layers_run_B), (left.sum(axis=1), (~left).sum(axis=1))
    assert (run >= leaving + 3 * staying).all()
    assert (run <= leaving + 4 * staying).all()


@pytest.mark.parametrize("layers", [None, 3])
def test_the_engines_agree_when_tokens_leave_early(jax_decoder, native, layers):
    # Two exits: a threshold that is far from the probabilities at both, so that rounding moves no one.
    confidences = np.concatenate([sure(forced(jax_decoder, layers=depth)[0]).ravel() for depth in (1, 3)])
    threshold = between(confidences)
    expected, of_jax = forced(jax_decoder, layers=layers, confidence=threshold, prompt=20)
    found, of_native = forced(native, layers=layers, confidence=threshold, prompt=20)
    assert_close(found, expected)
    np.testing.assert_array_equal(of_native.layers_run_B, np.asarray(of_jax.layers_run_B))


def test_skipped_layers_get_the_keys_and_values_of_the_exit(weights, jax_decoder):
    """By hand: a block is skipped by a model whose later blocks write nothing into the stream."""
    silent = dict(weights.tensors)
    for layer in range(1, 4):
        for part in ("output", "contract"):
            name = f"blocks.{layer}.{part}.kernel"
            silent[name] = np.zeros_like(weights.tensors[name])
    quiet = Decoder(model_of(weights._replace(tensors=silent)), Backend())
    expected = forced(quiet)[1].caches
    found = forced(jax_decoder, confidence=0.0)[1].caches
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_row_depends_on_nothing_but_itself(native):
    threshold = between(sure(forced(native, layers=1)[0]))
    together = forced(native, confidence=threshold)[0]
    for row in range(len(PIECES)):
        alone = forced(native, PIECES[row : row + 1], confidence=threshold)[0]
        np.testing.assert_array_equal(together[row], alone[0])


def test_rows_keep_their_own_thresholds(decoder):
    threshold = between(sure(forced(decoder, layers=1)[0]))

    def started(row, confidence):
        return decoder.start(
            [PIECES[row, :1]], latents=LATENTS, seeds=[row], limit_steps=FOREVER, confidence=confidence
        )

    state = started(0, threshold).rows([0, 0]).replaced(1, started(1, 0.0))
    logits = np.asarray(decoder.teacher_force(state, PIECES[:2, 1:])[1])
    np.testing.assert_allclose(logits[0], forced(decoder, PIECES[:1], confidence=threshold)[0][0], atol=1e-3)
    np.testing.assert_allclose(logits[1], forced(decoder, PIECES[1:2], confidence=0.0)[0][0], atol=1e-3)


def test_pieces_are_decoded_and_scored(decoder):
    state = decoder.start([PIECES[0, :9]], latents=8, seeds=[3], limit_steps=FOREVER, layers=3, confidence=0.3)
    state, tokens, nats = decoder.decode_scored(state, OPTIONS, length=12)
    assert (np.asarray(tokens) != vocabulary.PAD).all()
    assert (np.asarray(nats) > 0).all()
    assert 12 <= int(state.layers_run_B[0]) <= 36


# Training.


@pytest.mark.slow
def test_trained_exits_are_ordered_and_near_the_full_depth(tmp_path):
    config = dataclasses.replace(tiny_training.CONFIG, width=32, layers=3, hidden=64, exits=(1, 2))
    training = dataclasses.replace(
        tiny_training.EXACT, steps=300, layer_dropout=0.1, exit_distillation=0.5, log_every=100, final_fraction=0.0
    )
    model = PerceiverAR(config, rngs=nnx.Rngs(0))
    batches = tiny_training.CountingBatches()
    trained = Trainer(model, training, batches, output=tmp_path / "run").fit().model
    held_out = tiny_training.CountingBatches()
    held_out.set_state({"next": 10_000})
    nll = []
    for _ in range(8):
        tokens = jnp.asarray(next(held_out)["tokens"])
        at_depths = trained.at_depths(tokens[:, :-1], depths=config.depths, latents=config.latents)
        nll.append([float(token_nll(logits, tokens[:, -config.latents :]).mean()) for logits in at_depths])
    first, second, full = np.mean(nll, axis=0)
    assert full < 0.7 * np.log(vocabulary.VOCABULARY_SIZE)
    assert first > second - 0.05 > full - 0.1
    assert first - full < 0.5
