"""The adaptive tape: halting by hand, what may be seen, no future, scored but not decoded."""

import dataclasses
import functools
import itertools
import json
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training
from conftest import noisy_model
from flax import nnx

from app.cli import main
from app.rendering.on_ray import RayGenerator
from data_pipeline.dataset import Pieces
from music_ar import GenerationError, Generator
from music_ar.decoding.any_sequence import draw_sequences
from music_ar.decoding.decoder import Decoder
from music_ar.decoding.loading import decoder_of
from music_ar.decoding.native.decoder import NativeDecoder
from music_ar.model.config import PRESETS, Compute, ModelConfig, TapeConfig
from music_ar.model.context_attention import attend_after
from music_ar.model.expansion import expand
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.pretrained import load_pretrained, save_pretrained
from music_ar.model.tape import Tape, halt
from music_ar.model.weights import CheckpointError, read_weights
from music_ar.tokens import vocabulary
from music_ar.tokens.vocabulary import PAD, START
from music_ar.training.step import student_loss
from music_ar.training.trainer import Trainer

CONTEXT, LATENTS, TOKENS = 48, 16, 5
CONFIG = dataclasses.replace(
    PRESETS["tiny"], context=CONTEXT, latents=LATENTS, onsets=3, time_heads=1, tape=TapeConfig(tokens=TOKENS, learned=3)
)
PIECE = np.random.default_rng(1).integers(0, vocabulary.EVENT_CLASSES, 90).astype(np.int32)
PIECE[0] = START


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


# Generation is refused.

REFUSAL = "a model with a tape can be trained and scored, but does not generate; take a model without one"
GENERATING = {
    "generate": "generate --output {new}.mid --checkpoint {model}",
    "render": "render --count 1 --output {new} --checkpoint {model}",
    "report": "evaluate --data {data} --checkpoint {model} --split train --report {new} --stride 8",
    "bench": "bench decode --latents 16 --checkpoint {model}",
}


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tape"
    save_pretrained(model, folder)
    return folder


@pytest.mark.parametrize("command", GENERATING)
def test_commands_that_generate_refuse_it_before_the_work(command, checkpoint, prepared, tmp_path, capsys):
    new = tmp_path / "new"
    assert main(GENERATING[command].format(new=new, model=checkpoint, data=prepared).split()) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"music-ar: {REFUSAL}"
    assert list(tmp_path.iterdir()) == []


def test_whatever_generates_refuses_it_in_python_too(model, checkpoint):
    weights, no_cluster = read_weights(checkpoint), cast(Any, None)
    for generates in (
        lambda: Decoder(model),
        lambda: NativeDecoder(weights.config, weights.tensors),
        lambda: decoder_of(weights),
        lambda: Generator.from_pretrained(checkpoint),
        lambda: RayGenerator(no_cluster, weights),
        lambda: draw_sequences(model, PIECE[None], 1, seed=0),
    ):
        with pytest.raises(GenerationError, match=f"^{REFUSAL}$"):
            generates()


def test_it_is_scored_as_the_model_predicts(checkpoint, prepared, tmp_path):
    output = tmp_path / "scores.json"
    arguments = f"evaluate --data {prepared} --checkpoint {checkpoint} --split train --max-pieces 1 --output {output}"
    assert main([*arguments.split(), "--stride", str(LATENTS)]) == 0
    piece = Pieces.open(prepared, "train").tokens[0].astype(np.int32)
    ends = [*range(0, len(piece) - 1, LATENTS), len(piece) - 1]
    padded = np.pad(piece, (CONTEXT, 0), constant_values=PAD)
    windows = np.stack([padded[end : end + CONTEXT] for end in ends[1:]])
    log_p = np.asarray(jax.nn.log_softmax(predicted(load_pretrained(checkpoint), windows)[0]))
    nats = [
        -log_p[row, first - end :][np.arange(end - first), piece[first + 1 : end + 1]]
        for row, (first, end) in enumerate(itertools.pairwise(ends))
    ]
    scores = json.loads(output.read_text())["train"]
    assert scores["nats_per_token"] == pytest.approx(float(np.concatenate(nats).mean()), rel=1e-4)


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
