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
from music_ar.decoding.request import Request
from music_ar.decoding.sampling import SamplingOptions
from music_ar.evaluation.exit_costs import fit_exit_costs
from music_ar.model.config import PRESETS
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.pretrained import load_pretrained, model_of, weights_of
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
SHORT = PIECES[:, : LATENTS + 1]  # each of its inputs is a latent, and no window moves


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


def costs(weights, depth):
    """What each token of `SHORT` costs if it leaves at an exit and none left before."""
    model = model_of(weights)
    found = model.predict(jnp.asarray(SHORT[:, :-1]), depths=(depth,), latents=SHORT.shape[1] - 1)
    return np.asarray(model.leaving_cost(found.streams_BxNxD[0], depth))


def between(costs):
    """A tolerance with as many costs above as below, as far as possible from each."""
    logs = np.sort(np.log(np.ravel(costs)))
    middle = logs[len(logs) // 4 : -len(logs) // 4]
    gap = np.argmax(np.diff(middle))
    return float(np.exp(middle[gap : gap + 2].mean()))


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


def test_the_cost_of_leaving_is_the_exponential_of_a_linear_map_of_the_normalized_stream(weights):
    model = model_of(weights)
    x_D = np.random.default_rng(0).normal(size=CONFIG.width).astype(np.float32)
    normed_D = x_D / np.sqrt((x_D**2).mean() + 1e-6) * weights.tensors["final_norm.scale"]
    for number, depth in enumerate(CONFIG.exits):
        kernel_D, bias = np.asarray(model.exit_costs.kernel[...])[:, number], float(model.exit_costs.bias[...][number])
        assert float(model.leaving_cost(jnp.asarray(x_D), depth)) == pytest.approx(
            np.exp(normed_D @ kernel_D + bias), rel=1e-4
        )


def test_no_token_of_a_new_model_leaves_early():
    model = PerceiverAR(CONFIG, rngs=nnx.Rngs(0))
    tolerance = Request(tolerance=100.0).tolerance
    assert float(model.leaving_cost(jnp.ones(CONFIG.width), 1)) > tolerance


def test_at_tolerance_0_every_token_is_that_of_all_blocks(decoder):
    np.testing.assert_array_equal(forced(decoder, tolerance=0.0)[0], forced(decoder)[0])


def test_at_a_great_tolerance_every_token_leaves_at_the_first_exit(decoder):
    logits, state = forced(decoder, tolerance=1e9)
    first, _ = forced(decoder, layers=1)
    # A first exit's latents see only caches that do not depend on later blocks.
    assert_close(logits, first)
    assert np.asarray(state.layers_run_B).tolist() == [PIECES.shape[1] - 1] * 3


def test_a_token_leaves_where_that_costs_little(weights, decoder):
    tolerance = between(costs(weights, 1))
    logits, state = forced(decoder, SHORT, tolerance=tolerance)
    first = forced(decoder, SHORT, layers=1)[0]
    left = costs(weights, 1) < tolerance
    assert 0.2 < left.mean() < 0.8
    assert_close(logits[left], first[left])
    assert np.abs(logits[~left] - first[~left]).max(axis=-1).min() > 0.1
    run, (leaving, staying) = np.asarray(state.layers_run_B), (left.sum(axis=1), (~left).sum(axis=1))
    assert (run >= leaving + 3 * staying).all()
    assert (run <= leaving + 4 * staying).all()


@pytest.mark.parametrize("layers", [None, 3])
def test_the_engines_agree_when_tokens_leave_early(weights, jax_decoder, native, layers):
    # Two exits: a tolerance that is far from the costs at both, so that rounding moves no one.
    tolerance = between(np.concatenate([costs(weights, depth).ravel() for depth in (1, 3)]))
    expected, of_jax = forced(jax_decoder, SHORT, layers=layers, tolerance=tolerance)
    found, of_native = forced(native, SHORT, layers=layers, tolerance=tolerance)
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
    found = forced(jax_decoder, tolerance=1e9)[1].caches
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_row_depends_on_nothing_but_itself(weights, native):
    tolerance = between(costs(weights, 1))
    together = forced(native, tolerance=tolerance)[0]
    for row in range(len(PIECES)):
        alone = forced(native, PIECES[row : row + 1], tolerance=tolerance)[0]
        np.testing.assert_array_equal(together[row], alone[0])


def test_rows_keep_their_own_tolerances(weights, decoder):
    tolerance = between(costs(weights, 1))

    def started(row, tolerance):
        return decoder.start([SHORT[row, :1]], latents=LATENTS, seeds=[row], limit_steps=FOREVER, tolerance=tolerance)

    state = started(0, tolerance).rows([0, 0]).replaced(1, started(1, 1e9))
    logits = np.asarray(decoder.teacher_force(state, SHORT[:2, 1:])[1])
    np.testing.assert_allclose(logits[0], forced(decoder, SHORT[:1], tolerance=tolerance)[0][0], atol=1e-3)
    np.testing.assert_allclose(logits[1], forced(decoder, SHORT[1:2], tolerance=1e9)[0][0], atol=1e-3)


def test_pieces_are_decoded_and_scored(decoder):
    state = decoder.start([PIECES[0, :9]], latents=8, seeds=[3], limit_steps=FOREVER, layers=3, tolerance=1.0)
    state, tokens, nats = decoder.decode_scored(state, OPTIONS, length=12)
    assert (np.asarray(tokens) != vocabulary.PAD).all()
    assert (np.asarray(nats) > 0).all()
    assert 12 <= int(state.layers_run_B[0]) <= 36


# The cost of leaving.


def measured_costs(model, piece):
    """What leaving at each exit costs each token of a piece that fits the window."""
    at_depths = model.at_depths(
        jnp.asarray(piece[None, :-1].astype(np.int32)), depths=CONFIG.depths, latents=len(piece) - 1
    )
    *early, full = (np.asarray(jax.nn.log_softmax(logits[0])) for logits in at_depths)
    return np.stack([(np.exp(full) * (full - logs)).sum(axis=-1) for logs in early])


def test_costs_are_fitted_to_what_leaving_costs(weights):
    """On windows of as many targets as latents: the mean is right, and tokens that cost more are told from others."""
    pieces = [
        np.append(START, np.random.default_rng(seed).integers(0, 128, LATENTS)).astype(np.uint16) for seed in range(60)
    ]
    model = model_of(weights)
    fitted, means = fit_exit_costs(model, pieces)
    real = np.concatenate([measured_costs(model, piece) for piece in pieces], axis=1)
    found = fitted.predict(
        jnp.asarray(np.stack(pieces)[:, :-1].astype(np.int32)), depths=CONFIG.exits, latents=LATENTS
    ).streams_BxNxD
    for number, depth in enumerate(CONFIG.exits):
        expected = np.asarray(fitted.leaving_cost(found[number], depth)).ravel()
        assert means[depth] == pytest.approx(real[number].mean(), rel=1e-3)
        assert expected.mean() == pytest.approx(means[depth], rel=0.02)
        assert np.corrcoef(expected, real[number])[0, 1] > 0.5
    np.testing.assert_array_equal(fitted.head.kernel[...], model.head.kernel[...])
    np.testing.assert_array_equal(model.exit_costs.kernel[...], model_of(weights).exit_costs.kernel[...])


def test_costs_of_a_model_without_exits_are_refused(tiny_checkpoint):
    with pytest.raises(ValueError, match="only after all its layers"):
        fit_exit_costs(load_pretrained(tiny_checkpoint), [SHORT[0]])


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
