"""The objective of a piece encoder by hand, and runs that train one."""

import dataclasses
import json
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import with_noise
from flax import nnx
from four_devices import run_on_four_devices
from test_cli import run as run_command
from test_training import saved_state
from tiny_encoding import TRAINING, B, fresh_encoder, passages, run
from tiny_training import log_of

from data_pipeline.passage_loader import passage_batches
from music_ar.embedding import PieceEmbedder
from music_ar.training.config import EncoderTrainingConfig, TrainingError
from music_ar.training.mesh import make_mesh, shard_batch
from music_ar.training.piece_encoding import (
    PieceEncoding,
    PieceValidation,
    Whence,
    contrastive_loss,
    encoding_loss,
    hidden_loss,
    unclear,
)
from music_ar.training.step import initial_state, make_train_step
from music_ar.training.trainer import Trainer

WHENCE = Whence(
    piece=jnp.array([0, 0, 0, 1, 2]),
    composition=jnp.array([7, 7, 7, 7, 8]),
    start=jnp.array([0, 50, 100, 0, 0]),
    end=jnp.array([60, 100, 200, 60, 60]),
)


def test_which_passages_are_neither_near_nor_far():
    """Overlapping ones of a piece, and those of another performance of its composition."""
    assert unclear(WHENCE, WHENCE).astype(int).tolist() == [
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 0],
        [0, 0, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_the_contrastive_loss_by_hand():
    rng = np.random.default_rng(0)
    one, other = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in rng.normal(size=(2, 5, 4)))
    loss, accuracy = contrastive_loss(jnp.asarray(one, "float32"), jnp.asarray(other, "float32"), WHENCE, 0.5)
    skipped = np.asarray(unclear(WHENCE, WHENCE)) & ~np.eye(5, dtype=bool)
    losses, hits = [], []
    for query, key in ((one, other), (other, one)):
        for row in range(5):
            similarity = {column: query[row] @ key[column] / 0.5 for column in range(5) if not skipped[row, column]}
            losses.append(np.log(sum(np.exp(list(similarity.values())))) - similarity[row])
            hits.append(max(similarity, key=lambda column: similarity[column]) == row)
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-4)
    assert float(accuracy) == pytest.approx(np.mean(hits))
    assert 0 < np.mean(hits) < 1


def test_perfect_embeddings_have_no_loss():
    whence = Whence(*(jnp.arange(4) for _ in Whence._fields))
    loss, accuracy = contrastive_loss(jnp.eye(4), jnp.eye(4), whence, 0.02)
    assert (float(loss), float(accuracy)) == (pytest.approx(0, abs=1e-6), 1)


def batch_of(number=0):
    iterator = passage_batches(passages(), B, threads=0)
    iterator.set_state({"examples": B * number})
    return jax.tree.map(jnp.asarray, next(iterator))


def test_each_view_counts_alike_in_the_loss_of_hidden_notes():
    """A view with one hidden note counts as much as one with all of its notes, and padding counts nothing."""
    encoder = with_noise(fresh_encoder())
    views = {name: batch_of()[name].reshape(4 * B, *shape) for name, shape in SHAPES.items()}
    latents = jax.jit(encoder.read)(views["notes"], views["counts"])

    @jax.jit
    def compiled(counts, hidden):
        return hidden_loss(encoder, latents, views | {"hidden_counts": counts, "hidden": hidden})[0]

    def loss(counts, hidden=views["hidden"]):
        return float(compiled(jnp.asarray(counts), hidden))

    all_hidden, one_hidden = [int(count) for count in views["hidden_counts"]], [1] * (4 * B)
    each = [loss(np.eye(4 * B, dtype=np.int32)[row] * count) * 4 * B for row, count in enumerate(all_hidden)]
    assert loss(np.array(all_hidden)) == pytest.approx(np.mean(each), rel=1e-4)
    assert loss(np.array(one_hidden)) != pytest.approx(np.mean(each), rel=1e-3)
    padding = jnp.arange(views["hidden"].shape[1])[None, :, None] >= jnp.asarray(all_hidden)[:, None, None]
    changed = jnp.where(padding, 5, views["hidden"])
    assert loss(np.array(all_hidden), changed) == pytest.approx(np.mean(each), rel=1e-4)


SHAPES = {"notes": (-1, 4), "counts": (), "hidden": (-1, 4), "hidden_counts": ()}


def test_the_loss_is_the_weighted_sum_of_both():
    config = dataclasses.replace(TRAINING, hidden_weight=0.5)
    encoder = with_noise(fresh_encoder())
    loss, metrics = jax.jit(lambda batch: encoding_loss(encoder, config, batch))(batch_of())
    assert float(loss) == pytest.approx(float(metrics["contrastive_loss"] + 0.5 * metrics["hidden_loss"]), rel=1e-5)
    assert float(metrics["hidden_loss"]) > 1
    assert float(metrics["loss"]) == float(loss)


def test_dropout_needs_a_key():
    def loss(key):
        return float(encoding_loss(fresh_encoder(), TRAINING, batch_of(), key=key)[0])

    assert loss(None) == loss(None)
    assert len({loss(None), loss(jax.random.key(0)), loss(jax.random.key(1))}) == 3


@pytest.mark.slow
def test_training_lowers_both_losses(tmp_path):
    config = dataclasses.replace(TRAINING, steps=80, log_every=10, dropout=0.0, checkpoint_minutes=5.0)
    fitted = run(tmp_path, config)
    lines = log_of(tmp_path, "contrastive_loss", "hidden_loss", "passage_accuracy")
    assert lines[-1][0] < 0.7 * lines[0][0]
    assert lines[-1][1] < 0.8 * lines[0][1]
    assert lines[-1][2] > lines[0][2]
    assert not np.array_equal(fitted.model.embedding_query[...], fresh_encoder().embedding_query[...])


class StoppingBatches:
    """Batches that end the run, as SIGTERM does, with the last of `left`."""

    def __init__(self, left):
        self._batches, self._left = passage_batches(passages(), B, threads=0), left

    def __next__(self):
        self._left -= 1
        if self._left == 0:
            signal.raise_signal(signal.SIGTERM)
        return next(self._batches)

    def get_state(self):
        return self._batches.get_state()

    def set_state(self, state):
        self._batches.set_state(state)


def test_stopped_and_resumed_is_uninterrupted_to_the_bit(tmp_path):
    run(tmp_path / "whole")
    assert run(tmp_path / "parts", batches=StoppingBatches(3)).step == 3
    assert run(tmp_path / "parts", resume=True).finished
    (step, state, position), (whole_step, whole, whole_position) = (
        saved_state(tmp_path / name) for name in ("parts", "whole")
    )
    assert step == whole_step == 6
    jax.tree.map(np.testing.assert_array_equal, state, whole)
    assert position["batches"] == whole_position["batches"]
    names = ("step", "loss", "gradient_norm", "rate", "passage_accuracy", "hidden_loss")
    assert log_of(tmp_path / "parts", *names) == log_of(tmp_path / "whole", *names)


def test_validation_is_the_mean_over_its_batches(tmp_path):
    batches = [next(passage_batches(passages(seed), B, threads=0)) for seed in (1, 2)]
    config = dataclasses.replace(TRAINING, validate_every=3)
    fitted = run(tmp_path, config, validate=PieceValidation(config, batches))
    lines = log_of(tmp_path, "step", "validation", "validation_pitch_accuracy")
    logged = [line for line in lines if line[1] is not None]
    assert [step for step, *_ in logged] == [3, 6]
    found = [encoding_loss(fitted.model, config, jax.tree.map(jnp.asarray, batch))[1] for batch in batches]
    best = min(logged, key=lambda line: line[1])
    assert best[1] == pytest.approx(np.mean([metrics["loss"] for metrics in found]), rel=1e-4)
    assert best[2] == pytest.approx(np.mean([metrics["pitch_accuracy"] for metrics in found]), rel=1e-4)


def step_on(devices):
    """Metrics of a step without dropout."""
    config = dataclasses.replace(TRAINING, dropout=0.0)
    graph, params = nnx.split(with_noise(fresh_encoder()), nnx.Param)
    mesh, optimizer = make_mesh({}, jax.devices()[:devices]), optax.identity()
    step = make_train_step(graph, config, optimizer, mesh, PieceEncoding(config))
    batch = shard_batch(jax.tree.map(np.asarray, batch_of()), mesh)
    _, metrics = step(initial_state(params, optimizer, mesh), batch, jnp.float32(1.0), [])
    return {name: float(value) for name, value in metrics.items()}


def metrics_on_four(output):
    del output
    return step_on(4)


@pytest.mark.slow
def test_devices_tell_the_passages_of_the_whole_batch_apart(tmp_path):
    printed, _ = run_on_four_devices("test_piece_encoding", "metrics_on_four", tmp_path)
    assert json.loads(printed.splitlines()[-1]) == pytest.approx(step_on(1), rel=2e-3)


@pytest.mark.usefixtures("any_types")
def test_what_an_encoder_cannot_share_is_refused():
    mesh: Any = jax.sharding.AbstractMesh((1, 1, 2), ("data", "fsdp", "sequence"))
    with pytest.raises(TrainingError, match="no context to split over the mesh axis sequence"):
        PieceEncoding(TRAINING).check(mesh)


def test_a_model_without_an_objective_is_refused(tmp_path):
    with pytest.raises(TypeError, match="give an objective"):
        Trainer(fresh_encoder(), TRAINING, passage_batches(passages(), B), output=tmp_path)


def test_the_temperature_must_be_positive():
    with pytest.raises(TrainingError, match="temperature must be a number above 0"):
        EncoderTrainingConfig(steps=1, temperature=0.0)


@pytest.mark.slow
def test_the_command_trains_an_encoder_that_embeds(capsys, prepared, tmp_path, midi_file):
    from music_ar.midi.io import read_midi

    command = ["train-encoder", "--data", prepared, "--output", tmp_path / "run", "--preset", "tiny", "--steps", "2"]
    options = ["--batch-size", "2", "--notes", "64", "--log-every", "1", "--validate-every", "2"]
    assert run_command(capsys, *command, *options)[0] == 0
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert {"validation", "validation_passage_accuracy"} <= last.keys()
    embedder = PieceEmbedder.from_pretrained(tmp_path / "run" / "model")
    assert embedder.embed([read_midi(midi_file)]).shape == (1, 16)
