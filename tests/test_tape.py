"""The adaptive tape: halting by hand, what may be seen, no future, cached equals uncached."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training
from conftest import noisy_model
from event_tokens import tokens_of
from flax import nnx

from music_ar.decoding.backend import Backend
from music_ar.decoding.decoder import Decoder
from music_ar.decoding.native.decoder import NativeDecoder
from music_ar.model.config import PRESETS, Compute, ModelConfig, TapeConfig
from music_ar.model.context_attention import attend_after
from music_ar.model.expansion import expand
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.pretrained import load_pretrained, save_pretrained
from music_ar.model.tape import Tape, halt, tape_keys, tape_positions
from music_ar.model.weights import CheckpointError, read_weights
from music_ar.tokens import vocabulary
from music_ar.tokens.vocabulary import PAD, START
from music_ar.training.step import student_loss
from music_ar.training.trainer import Trainer

CONTEXT, LATENTS, TOKENS = 48, 16, 5
FORCED = 20  # tokens given to the decoder after a prompt
CONFIG = dataclasses.replace(
    PRESETS["tiny"], context=CONTEXT, latents=LATENTS, onsets=3, time_heads=1, tape=TapeConfig(tokens=TOKENS, learned=3)
)
PIECE = np.random.default_rng(1).integers(0, vocabulary.EVENT_CLASSES, 90).astype(np.int32)
PIECE[0] = START
NO_DROPOUT = nnx.Dropout(0.0, deterministic=True)


@pytest.fixture(scope="module")
def model():
    """A model whose pieces read some of their tokens."""
    return halting(noisy_model(CONFIG), -0.5)


def halting(model, bias):
    """A copy of a model with another bias of its halting chances."""
    changed = nnx.clone(model)
    layer: Any = changed.tape.halt
    layer.bias[...] = jnp.array([bias])
    return changed


# Reading.


@pytest.mark.parametrize(
    ("chances", "size", "shares"),
    [
        ((0.25, 0.25, 0.25, 0.25), 9, (1, 0.75, 0.5, 0)),  # the fourth finds that 0.75 has been reached
        ((0.25, 0.125, 0.25, 0.25), 9, (1, 0.75, 0.625, 0.375)),  # all are read before it is
        ((0.25, 0.125, 0.25, 0.25), 2, (1, 0.75, 0, 0)),  # the bank has no more
        ((0.875, 0.0, 0.0, 0.0), 9, (1, 0, 0, 0)),  # the first is always read
        ((0.5, 0.0, 0.0, 0.5), 9, (1, 0.5, 0.5, 0.5)),
        ((0.25, 0.25, 0.25, 0.25), 0, (0, 0, 0, 0)),  # unless there is none
    ],
)
def test_halting_by_hand(chances, size, shares):
    found = halt(jnp.array([chances]), jnp.array([size]), epsilon=0.25)
    np.testing.assert_array_equal(found.shares_BxT, [shares])
    assert int(found.reads_B[0]) == np.count_nonzero(shares)


def test_the_gradient_of_the_ponder_loss_by_hand():
    """A chance shortens what comes after it, as far as that is read."""
    chances = jnp.array([[0.25, 0.125, 0.25, 0.25, 0.25]])  # four are read
    gradient = jax.grad(lambda chances: halt(chances, jnp.array([9]), epsilon=0.25).shares_BxT.sum())(chances)
    np.testing.assert_array_equal(gradient, [[-3, -2, -1, 0, 0]])


def unit(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def reading_of(params, inputs, sizes):
    """The tape of one row of inputs, and the bank's tokens in the order in which they are taken, in NumPy."""
    items = unit(unit(inputs) @ params["item.kernel"])
    state = unit(params["start"] + (items.mean(axis=0) if len(items) else 0))
    learned = [unit(params["learned"])] if sizes.learned else []
    bank = np.concatenate(learned + [items] * sizes.of_inputs)
    keys, left, states, taken = bank @ params["key.kernel"], np.ones(len(bank), bool), [], []
    while left.any() and len(states) < sizes.tokens:
        scores = np.where(left, keys @ (state @ params["query.kernel"]) / np.sqrt(len(state)), -np.inf)
        weights = np.exp(scores - scores.max())
        hidden = np.concatenate([state, weights / weights.sum() @ bank]) @ params["expand.kernel"]
        state = unit(state + np.maximum(hidden, 0) ** 2 @ params["contract.kernel"])
        states.append(state)
        taken.append(int(scores.argmax()))
        left[taken[-1]] = False
    return np.reshape(states, (-1, len(state))), taken


@pytest.mark.parametrize("sizes", [{}, {"learned": 0}, {"of_inputs": False}])
def test_a_tape_is_read_as_in_numpy(sizes):
    """Of three rows, one has no inputs, one all, and one those in the middle."""
    sizes = TapeConfig(**{"tokens": 6, "learned": 4} | sizes)
    tape = Tape(sizes, 8, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    params = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(tape))}
    inputs = np.random.default_rng(0).normal(size=(3, 7, 8)).astype(np.float32)
    inside = np.array([[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]], bool)
    reading = tape(jnp.asarray(inputs), jnp.asarray(inside))
    for row in range(3):
        states, taken = reading_of(params, inputs[row][inside[row]], sizes)
        assert len(set(taken)) == len(taken)  # none twice
        np.testing.assert_allclose(reading.tokens_BxTxD[row, : len(states)], states, atol=1e-5)
        assert int(reading.halting.reads_B[row]) == len(states)  # a new tape reads all that there are


def test_latents_see_what_was_read_and_each_other_as_in_this_table():
    """Values are one-hot, so what a latent finds says what it sees: three tape tokens, then four latents."""
    size = 7
    q, before_k, k = (
        jnp.asarray(np.random.default_rng(0).normal(size=(2, n, 1, size)), jnp.float32) for n in (4, 3, 4)
    )
    values = jnp.broadcast_to(jnp.eye(size)[None, :, None], (2, size, 1, size))
    found = attend_after(q, before_k, values[:, :3], jnp.array([2, 0]), k, values[:, 3:], Compute())
    np.testing.assert_array_equal(
        found[:, :, 0] > 0,
        np.array(
            [
                [[1, 1, 0, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1, 1]],
                [[0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]],
            ],
            bool,
        ),
    )


# The model.


@functools.partial(jax.jit, static_argnums=0)
def _predict(graph, params, tokens):
    return nnx.merge(graph, params).predict(tokens, depths=(2,), latents=LATENTS)


def predicted(model, tokens):
    """Logits, and how much of the tape was read."""
    prediction = _predict(*nnx.split(model, nnx.Param), jnp.asarray(tokens))
    return np.asarray(prediction.depths_BxNxV[0]), prediction.tape


def test_rows_read_different_numbers_of_tokens_which_change_the_prediction(model):
    rows = np.stack([PIECE[first : first + CONTEXT] for first in range(0, 40, 4)])
    logits, tape = predicted(model, rows)
    assert len(set(np.asarray(tape.reads_B).tolist())) > 1
    first_alone = halting(model, 1e3)
    assert np.abs(predicted(first_alone, rows)[0] - logits).max() > 1e-2


@pytest.mark.parametrize("changed", [CONTEXT - LATENTS, CONTEXT - 9, CONTEXT - 1])
def test_later_tokens_change_neither_the_tape_nor_earlier_predictions(model, changed):
    other = PIECE[:CONTEXT].copy()
    other[changed:] = (other[changed:] + 7) % vocabulary.EVENT_CLASSES
    (before, tape), (after, tape_after) = predicted(model, PIECE[None, :CONTEXT]), predicted(model, other[None])
    jax.tree.map(np.testing.assert_array_equal, tape, tape_after)
    first = changed - (CONTEXT - LATENTS)
    np.testing.assert_array_equal(before[:, :first], after[:, :first])
    assert (before[:, first:] != after[:, first:]).any(axis=-1).all()


def gradient(model, tokens, of):
    """Gradients of a number that follows from a prediction, by the parameters' dotted names."""
    graph, params = nnx.split(model, nnx.Param)

    @jax.jit
    @jax.grad
    def gradients(params):
        return of(nnx.merge(graph, params).predict(jnp.asarray(tokens), depths=(2,), latents=LATENTS))

    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(gradients(params))}


def test_no_gradient_comes_from_the_future(model):
    """The tape ends where the latents begin."""
    tokens = np.arange(CONTEXT, dtype=np.int32)[None]  # each occurs once, so rows of the table are inputs

    def inputs_that_count(of):
        return np.flatnonzero(np.abs(gradient(model, tokens, of)["embedding"][:CONTEXT]).sum(axis=1)).tolist()

    assert inputs_that_count(lambda found: found.tape.shares_BxT.sum()) == list(range(CONTEXT - LATENTS))
    third = inputs_that_count(lambda found: jnp.square(found.depths_BxNxV[0][0, 2]).sum())
    assert third == list(range(CONTEXT - LATENTS + 3))


def test_padding_changes_nothing(model):
    piece = PIECE[: LATENTS + 6]  # six inputs before the latents
    padded = np.concatenate([np.full(CONTEXT - len(piece), PAD, np.int32), piece])
    alone, tape = predicted(model, piece[None])
    within, tape_within = predicted(model, padded[None])
    np.testing.assert_allclose(alone, within, atol=2e-5)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-6), tape, tape_within)


@pytest.mark.parametrize(
    "of", [lambda found: found.depths_BxNxV[0][0, :, 0].sum(), lambda found: found.tape.shares_BxT.sum()]
)
def test_both_the_prediction_and_the_ponder_loss_reach_bank_reader_and_halting(model, of):
    of_tape = {
        name: found for name, found in gradient(model, PIECE[None, :CONTEXT], of).items() if name.startswith("tape.")
    }
    assert len(of_tape) == 9
    assert [name for name, found in of_tape.items() if not np.abs(found).max() > 0] == []


def test_a_longer_tape_costs_more():
    short, long = (dataclasses.replace(CONFIG, tape=TapeConfig(tokens=tokens)) for tokens in (4, 8))
    none = dataclasses.replace(CONFIG, tape=None)
    costs = [config.flops_per_target(10) for config in (none, short, long)]
    assert costs == sorted(set(costs))


# Training.


def test_the_ponder_loss_is_the_weighted_mean_of_the_shares():
    config = dataclasses.replace(tiny_training.CONFIG, tape=TapeConfig(tokens=3, learned=2))
    training = dataclasses.replace(tiny_training.EXACT, ponder_weight=2.0, z_loss=0.0)
    graph, params = nnx.split(noisy_model(config), nnx.Param)
    batch = jax.tree.map(jnp.asarray, next(tiny_training.CountingBatches()))

    @jax.jit
    def losses(params):
        tape = nnx.merge(graph, params).predict(batch["tokens"][:, :-1], depths=(1,)).tape
        return student_loss(graph, training, None, params, [], batch, jax.random.key(0)), tape

    (loss, metrics), tape = losses(params)
    assert float(loss - metrics["loss"]) == pytest.approx(2 * float(tape.shares_BxT.sum(axis=1).mean()), rel=1e-4)
    assert float(metrics["tape_tokens"]) == pytest.approx(float(tape.reads_B.mean()))


def test_training_logs_how_many_tokens_are_read_and_a_dear_tape_gets_short(tmp_path):
    config = dataclasses.replace(tiny_training.CONFIG, tape=TapeConfig(tokens=3, learned=2))
    training = dataclasses.replace(
        tiny_training.EXACT, steps=40, micro_batches=2, ponder_weight=10.0, adamw_learning_rate=0.2, log_every=1
    )
    Trainer(PerceiverAR(config, rngs=nnx.Rngs(0)), training, tiny_training.CountingBatches(), output=tmp_path).fit()
    read = [line for (line,) in tiny_training.log_of(tmp_path, "tape_tokens")]
    assert read[0] == 3
    assert read[-1] < 1.5


# Decoding.


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model, Backend())


@functools.partial(jax.jit, static_argnums=0)
def uncached(graph, params, first):
    """Logits after each token of PIECE, by dense masked attention, and how many tape tokens are read before `first`.

    Latents before it do not exist. Each reads the CONTEXT inputs and the LATENTS latents up to its own, and the tape.
    """
    model, T = nnx.merge(graph, params), len(PIECE)
    ages = jnp.arange(T)[None]
    behind = ages[0][:, None] - ages
    tokens = jnp.asarray(PIECE)[None]
    conditioning = model.conditioning(tokens, T)
    positions = jnp.stack([ages, conditioning.keyboard.time], axis=-1)
    embedded = model.condition(model.embed(tokens), conditioning)
    begins = first + LATENTS - CONTEXT
    reading = model.tape(embedded, (ages >= begins) & (ages < first))
    tape = tape_keys(
        reading,
        list(model.blocks),
        tape_positions(positions[:, first], TOKENS),
        model.compute,
        lambda block, *x: block.add(*x, NO_DROPOUT),
    )
    read = jnp.broadcast_to(jnp.arange(TOKENS)[None] < reading.halting.reads_B[:, None], (T, TOKENS))

    def attend(block, x, k, v, mask):
        return block.add(x, jax.nn.dot_product_attention(block.queries(x, positions), k, v, mask=mask), NO_DROPOUT)

    in_context = ((behind >= 0) & (behind < CONTEXT))[None, None]
    in_window = (behind >= 0) & (behind < LATENTS) & (ages >= first) | (behind == 0)
    k, v = model.cross.keys_values(model.context_norm(embedded), positions)
    x = attend(model.cross, model.latent(embedded), k, v, in_context)
    for block, (tape_k, tape_v, _) in zip(model.blocks, tape, strict=True):
        k, v = block.keys_values(block.attention_norm(x), positions)
        mask = jnp.concatenate([read, in_window], axis=1)[None, None]
        x = attend(block, x, jnp.concatenate([tape_k, k], 1), jnp.concatenate([tape_v, v], 1), mask)
    return model.logits(x)[0], reading.halting.reads_B[0]


def forced(decoder, prompts):
    """Logits after the last token of each prompt and after some of those that follow."""
    state = decoder.start(
        [PIECE[:prompt] for prompt in prompts], latents=LATENTS, seeds=range(len(prompts)), limit_steps=2**30
    )
    return np.asarray(decoder.teacher_force(state, following(prompts))[1])


def following(prompts):
    return np.stack([PIECE[prompt : prompt + FORCED] for prompt in prompts])


@pytest.mark.parametrize("prompt", [1, LATENTS + 1, 70])
def test_cached_equals_uncached(model, decoder, prompt):
    """The first latent is LATENTS before the pending token, or the first of the piece."""
    expected, reads = uncached(*nnx.split(model, nnx.Param), max(0, prompt - 1 - LATENTS))
    np.testing.assert_allclose(
        forced(decoder, [prompt])[0], np.asarray(expected)[prompt - 1 : prompt - 1 + FORCED], atol=5e-5
    )
    assert reads > 1


def test_cached_equals_the_model_as_trained(model, decoder):
    """Before a window slides: here the piece is no longer than the latents."""
    expected, _ = predicted(model, PIECE[None, :LATENTS])
    np.testing.assert_allclose(forced(decoder, [1])[0, :LATENTS], expected[0], atol=2e-5)


def test_rows_have_their_own_tapes_and_can_be_chosen_and_replaced(decoder):
    alone = np.concatenate([forced(decoder, [1]), forced(decoder, [70])])
    np.testing.assert_allclose(forced(decoder, [1, 70]), alone, atol=2e-5)

    def start(prompts):
        prompts = [PIECE[:prompt] for prompt in prompts]
        return decoder.start(prompts, latents=LATENTS, seeds=range(len(prompts)), limit_steps=2**30)

    chosen = start([1, 70]).rows([0, 0]).replaced(0, start([70]))
    found = np.asarray(decoder.teacher_force(chosen, following([70, 1]))[1])
    np.testing.assert_allclose(found, alone[::-1], atol=2e-5)


def test_other_engines_and_windows_leave_such_a_model_to_jax(decoder):
    assert NativeDecoder.suits(dataclasses.replace(CONFIG, tape=None))
    assert not NativeDecoder.suits(CONFIG)
    kernel = Backend(attention="interpreted")
    big = dataclasses.replace(CONFIG, head_size=16)
    assert kernel.suited_to(dataclasses.replace(big, tape=None)).attention == "interpreted"
    assert kernel.suited_to(big).attention == "plain"
    with pytest.raises(ValueError, match="sliding windows only"):
        decoder.start([tokens_of(START)], latents=8, seeds=[0], limit_steps=1, mode="exact")


# Checkpoints and bad input.


def test_a_checkpoint_brings_its_tape_back_and_one_without_still_loads(model, tmp_path):
    save_pretrained(model, tmp_path / "tape", int8=False)
    loaded = load_pretrained(tmp_path / "tape")
    assert loaded.config == CONFIG
    np.testing.assert_array_equal(
        predicted(loaded, PIECE[None, :CONTEXT])[0], predicted(model, PIECE[None, :CONTEXT])[0]
    )

    old = dataclasses.replace(CONFIG, tape=None)
    save_pretrained(noisy_model(old), tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    record = json.loads(path.read_text())
    del record["model"]["tape"]
    path.write_text(json.dumps(record))
    assert read_weights(tmp_path / "old").config == old
    record["model"]["tape"] = {"tokens": -1}
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="tokens"):
        read_weights(tmp_path / "old")


def test_what_a_tape_cannot_be_is_refused(model):
    with pytest.raises(ValueError, match="a tape needs a bank"):
        TapeConfig(learned=0, of_inputs=False)
    with pytest.raises(ValueError, match="segments cannot have a tape"):
        ModelConfig(context=8, latents=8, segment=4, tape=TapeConfig())
    with pytest.raises(ValueError, match="cannot be expanded"):
        expand(model, dataclasses.replace(CONFIG, width=64), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="cannot be split over devices"):
        model.predict(jnp.asarray(PIECE[None, :CONTEXT]), depths=(2,), split_over="sequence")
