"""What a training step consists of, by hand: loss, gradients, teachers, averages, devices."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import noisy_model
from flax import nnx
from four_devices import run_on_four_devices
from reference_model import reference
from tiny_training import CONFIG, EXACT, TRAINING, B, CountingBatches, M, N, log_of, noisy, run

from music_ar.model.config import Compute
from music_ar.tokens import vocabulary
from music_ar.training.config import TrainingError
from music_ar.training.distillation import CrossFitted, Ensemble
from music_ar.training.losses import token_loss
from music_ar.training.mesh import make_mesh, shard_batch
from music_ar.training.next_tokens import NextTokens
from music_ar.training.step import TrainState, initial_state, make_train_step, student_loss


def mesh_of(devices, **axes):
    return make_mesh(axes, jax.devices()[:devices])


@functools.cache
def fainter():
    """The noisy model with smaller weights."""
    graph, params = nnx.split(noisy())
    return nnx.merge(graph, jax.tree.map(lambda leaf: 0.9 * leaf, params))


@functools.cache
def teachers_of(kind):
    return kind([noisy(), fainter()])


def objective_of(config, teachers):
    return NextTokens(CONFIG, Compute(), config, teachers)


@pytest.fixture(scope="module")
def take_step():
    """Takes a step of a config from the noisy model: the state before it, after it, and its metrics.

    The optimizer passes the gradient on as it is.
    """
    graph, params = nnx.split(noisy(), nnx.Param)
    optimizer, mesh = optax.identity(), mesh_of(1)

    @functools.cache
    def compiled(config, teachers):
        return make_train_step(graph, config, optimizer, mesh, objective_of(config, teachers))

    def take(config, *, rate=1.0, done=0, teachers=None, weighed=slice(None)):
        before = TrainState(jnp.int32(done), params, jax.tree.map(jnp.zeros_like, params), optimizer.init(params))
        batch = jax.tree.map(jnp.asarray, next(CountingBatches()))
        batch["weights"] = jnp.zeros_like(batch["weights"]).at[weighed].set(batch["weights"][weighed])
        placed = [] if teachers is None else teachers.place(mesh)
        step = compiled(config, teachers)
        return before, *step(jax.tree.map(jnp.copy, before), batch, jnp.float32(rate), placed)

    return take


def test_micro_batches_give_the_gradient_of_the_whole(take_step):
    before, whole, metrics = take_step(EXACT)
    _, parts, in_parts = take_step(dataclasses.replace(EXACT, micro_batches=2))
    assert float(in_parts["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)
    assert float(in_parts["gradient_norm"]) == pytest.approx(float(metrics["gradient_norm"]), rel=1e-4)
    for old, one, part in zip(*map(jax.tree.leaves, (before.params, whole.params, parts.params)), strict=True):
        np.testing.assert_allclose(part - old, one - old, rtol=2e-3, atol=1e-5)


def test_the_loss_is_that_of_the_last_inputs_next_tokens(take_step):
    """Weighted cross-entropy of `tokens[:, -N:]`, computed from the model's own logits."""
    batch = next(CountingBatches())
    logits = np.stack([reference(noisy(), tokens, N) for tokens in batch["tokens"][:, :-1]])
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = np.take_along_axis(chances, batch["tokens"][:, -N:, None], axis=-1)[..., 0]
    expected = -(np.log(found) * batch["weights"]).sum() / batch["weights"].sum()
    assert float(take_step(EXACT)[2]["loss"]) == pytest.approx(expected, rel=1e-4)


@functools.cache
def with_exits():
    """A noisy model of three layers, with exits after the first and the second."""
    return noisy_model(dataclasses.replace(CONFIG, layers=3, exits=(1, 2)))


def losses_of(model, config, teachers=None):
    """The loss and the cross-entropy of a batch."""
    batch = jax.tree.map(jnp.asarray, next(CountingBatches()))
    graph, params = nnx.split(model, nnx.Param)
    placed = [] if teachers is None else teachers.place(mesh_of(1))
    loss, metrics = student_loss(graph, config, teachers, params, placed, batch, jax.random.key(0))
    return float(loss), float(metrics["loss"])


def entropies_at_depths(teacher=None):
    """The cross-entropy of each depth of the model with exits: with the data, or with probabilities [B, N, V]."""
    batch = next(CountingBatches())
    depths = with_exits().at_depths(jnp.asarray(batch["tokens"][:, :-1]), depths=(1, 2, 3), latents=N)
    targets = jax.nn.one_hot(batch["tokens"][:, -N:], vocabulary.VOCABULARY_SIZE) if teacher is None else teacher
    nll = [-(jax.nn.log_softmax(logits) * targets).sum(-1) for logits in depths]
    return [float((each * batch["weights"]).sum() / batch["weights"].sum()) for each in nll], depths


PLAIN = dataclasses.replace(EXACT, z_loss=0.0)


def test_exits_share_the_loss_with_weights_that_rise_with_depth():
    config = dataclasses.replace(PLAIN, exit_weight=0.9, exit_weight_power=2.0)
    assert config.exit_weights((1, 2, 3)) == pytest.approx([0.1 / 1.5, 0.4 / 1.5, 1 / 1.5])
    entropies, _ = entropies_at_depths()
    loss, cross_entropy = losses_of(with_exits(), config)
    assert cross_entropy == pytest.approx(entropies[2], rel=1e-4)
    assert loss == pytest.approx(np.dot(entropies, [0.1, 0.4, 1.0]) / 1.5, rel=1e-4)


def test_the_prediction_of_all_layers_teaches_the_exits_and_does_not_learn_from_them():
    config = dataclasses.replace(PLAIN, exit_weight=1.5, exit_weight_power=1.0, exit_distillation=1.0)
    data, depths = entropies_at_depths()
    taught, _ = entropies_at_depths(jax.nn.softmax(depths[2]))
    assert losses_of(with_exits(), config)[0] == pytest.approx((0.5 * taught[0] + taught[1] + data[2]) / 2.5, rel=1e-4)
    graph, params = nnx.split(with_exits(), nnx.Param)
    batch = jax.tree.map(jnp.asarray, next(CountingBatches()))

    def gradient(weight):
        of = dataclasses.replace(config, exit_weight=weight)
        grads = jax.grad(lambda params: student_loss(graph, of, None, params, [], batch, jax.random.key(0))[0])(params)
        last = nnx.to_pure_dict(grads)["blocks"][2]["contract"]["kernel"]
        return np.asarray(last) / of.exit_weights((1, 2, 3))[-1]

    np.testing.assert_allclose(gradient(1.0), gradient(0.1), rtol=1e-3, atol=1e-6)


def test_teachers_teach_the_exits_too():
    config = dataclasses.replace(PLAIN, distillation_weight=1.0, exit_weight=1.5)
    batch = next(CountingBatches())
    teacher = jax.nn.softmax(noisy()(jnp.asarray(batch["tokens"][:, :-1]), latents=N))
    taught, _ = entropies_at_depths(teacher)
    loss, _ = losses_of(with_exits(), config, Ensemble([noisy()]))
    assert loss == pytest.approx((0.5 * taught[0] + taught[1] + taught[2]) / 2.5, rel=1e-4)


def test_the_rate_scales_the_step(take_step):
    before, whole, _ = take_step(EXACT)
    _, half, _ = take_step(EXACT, rate=0.5)
    _, none, _ = take_step(EXACT, rate=0.0)
    jax.tree.map(np.testing.assert_array_equal, none.params, before.params)
    for old, one, part in zip(*map(jax.tree.leaves, (before.params, whole.params, half.params)), strict=True):
        assert (old != one).any()
        np.testing.assert_allclose(part - old, (one - old) / 2, atol=1e-6)


def test_each_step_draws_its_own_dropout(take_step):
    losses = [float(take_step(TRAINING, done=done)[2]["loss"]) for done in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(("done", "decay"), [(0, 0.1), (10, 11 / 20), (10**6, 0.9995)])
def test_the_average_follows_the_weights(take_step, done, decay):
    _, after, _ = take_step(EXACT, done=done)
    assert int(after.step) == done + 1
    for average, param in zip(jax.tree.leaves(after.ema), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_allclose(average, (1 - decay) * param, rtol=1e-3, atol=1e-7)  # it was zero before


# The teachers' predictions are all that counts.
DISTILLED = dataclasses.replace(EXACT, z_loss=0.0, distillation_weight=1.0)


def cross_entropy_and_norm(student, teachers, config, batch):
    """The cross-entropy of a student, and the norm of the gradient of its loss, on one device."""
    graph, params = nnx.split(student, nnx.Param)
    gradient = jax.jit(jax.grad(functools.partial(student_loss, graph, config, teachers), has_aux=True))
    arrays = jax.tree.map(jnp.asarray, batch)
    grads, metrics = gradient(params, teachers.place(mesh_of(1)), arrays, jax.random.key(0))
    return float(metrics["loss"]), float(optax.tree.norm(grads))


def test_a_student_that_predicts_as_its_teachers_has_nothing_to_learn():
    """The teachers read the same part of the prefix as the student."""
    config, batch = dataclasses.replace(DISTILLED, prefix_keep=0.5), next(CountingBatches())
    by_itself = cross_entropy_and_norm(noisy(), Ensemble([noisy(), noisy()]), config, batch)
    by_both = cross_entropy_and_norm(noisy(), Ensemble([noisy(), fainter()]), config, batch)
    assert by_itself[1] < 1e-3 * by_both[1]
    assert by_itself[0] == pytest.approx(by_both[0])  # what is reported is the cross-entropy with the tokens


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_each_cross_fitted_teacher_predicts_its_own_part_of_the_batch(take_step, micro_batches):
    config, half = dataclasses.replace(DISTILLED, micro_batches=micro_batches), B // 2

    def learnt(weighed):
        return float(take_step(config, teachers=teachers_of(CrossFitted), weighed=weighed)[2]["gradient_norm"])

    assert learnt(slice(0, half)) < 1e-3 * learnt(slice(half, None))


def test_a_teacher_reads_what_its_own_window_holds():
    """A student with retrieval has a longer one; here it ignores what it retrieves, and so predicts the same."""
    student = noisy_model(dataclasses.replace(CONFIG, retrieval_notes=12))
    nnx.update(student, nnx.state(noisy(), nnx.Param))
    student.retrieval.kernel[...] = jnp.zeros_like(student.retrieval.kernel[...])
    size = (B, student.config.window + 1)
    tokens = np.random.default_rng(0).integers(0, vocabulary.EVENT_CLASSES, size, np.int32)
    batch = {"tokens": tokens, "weights": np.ones((B, N), np.float32)}
    norms = [
        cross_entropy_and_norm(student, Ensemble([teacher]), DISTILLED, batch)[1] for teacher in (noisy(), fainter())
    ]
    assert norms[0] < 1e-4 * norms[1]


@pytest.mark.parametrize("kind", [Ensemble, CrossFitted])
def test_a_teacher_without_the_tokens_of_gaps_teaches_the_examples_without_them(kind):
    """The others are learned from their tokens alone, whatever the weight of the teachers."""
    student = noisy_model(dataclasses.replace(CONFIG, vocabulary_size=vocabulary.INFILL_VOCABULARY_SIZE))
    graph, params = nnx.split(student, nnx.Param)
    tokens = next(CountingBatches())["tokens"].copy()
    tokens[1, 2], tokens[3, -3] = vocabulary.SEPARATOR, vocabulary.MIDDLE

    def loss(example, config, teachers):
        weights = np.zeros((B, N), np.float32)
        weights[example] = 1
        batch = {"tokens": jnp.asarray(tokens), "weights": jnp.asarray(weights)}
        placed = [] if teachers is None else teachers.place(mesh_of(1))
        return float(student_loss(graph, config, teachers, params, placed, batch, jax.random.key(0))[0])

    probabilities = jax.nn.softmax(noisy()(jnp.asarray(tokens[:, :-1]), latents=N))
    new = student.config.vocabulary_size - vocabulary.VOCABULARY_SIZE
    logits = jax.nn.log_softmax(student(jnp.asarray(tokens[:, :-1]), latents=N))
    taught = -(logits * jnp.pad(probabilities, ((0, 0), (0, 0), (0, new)))).sum(-1).mean(-1)
    for example in range(B):
        alone = loss(example, PLAIN, None)
        expected = alone if example in (1, 3) else float(taught[example])
        assert loss(example, DISTILLED, kind([noisy(), noisy()])) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("conditioned", ["student", "teachers", "nobody"])
@pytest.mark.parametrize("kind", [Ensemble, CrossFitted])
def test_models_with_labels_get_them(conditioned, kind):
    plain, labeled = noisy(), noisy_model(dataclasses.replace(CONFIG, label_size=3))
    student, teacher = (labeled if conditioned == who else plain for who in ("student", "teachers"))
    teachers, (graph, params) = kind([teacher, teacher]), nnx.split(student, nnx.Param)
    loss = jax.jit(functools.partial(student_loss, graph, DISTILLED, teachers))
    found = []
    for labels in (np.zeros((B, 3)), np.eye(B, 3, k=-1)):  # the second: others for all examples but the first
        batch = jax.tree.map(jnp.asarray, next(CountingBatches()) | {"labels": labels.astype(np.float32)})
        found.append(float(loss(params, teachers.place(mesh_of(1)), batch, jax.random.key(0))[0]))
    assert (abs(found[1] / found[0] - 1) > 1e-3) == (conditioned != "nobody")


def test_the_loss_by_hand():
    logits = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 1.0], [5.0, 5.0]]]))  # partitions 4, 2, 10
    loss, cross_entropy = token_loss(logits, jnp.array([[0, 1, 1]]), jnp.array([[1.0, 0.5, 0.0]]), z_loss=0.1)
    assert float(cross_entropy) == pytest.approx((np.log(4) + 0.5 * np.log(2)) / 1.5)
    assert float(loss - cross_entropy) == pytest.approx(0.1 * (np.log(4) ** 2 + 0.5 * np.log(2) ** 2) / 1.5)


def test_the_loss_with_a_teacher_by_hand():
    logits, targets = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 1.0]]])), jnp.array([[0, 1]])
    teacher = jnp.array([[[0.5, 0.5], [0.25, 0.75]]])
    weights = jnp.array([[1.0, 1.0]])
    loss, cross_entropy = token_loss(
        logits, targets, weights, z_loss=0.0, teacher_BxNxV=teacher, distillation_weight=0.25
    )
    with_teacher = (0.5 * np.log(4) + 0.5 * np.log(4 / 3) + np.log(2)) / 2
    assert float(cross_entropy) == pytest.approx((np.log(4) + np.log(2)) / 2)
    assert float(loss) == pytest.approx(0.75 * float(cross_entropy) + 0.25 * with_teacher)


def test_a_batch_without_weight_has_no_loss():
    loss, cross_entropy = token_loss(jnp.ones((1, 2, 3)), jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2)), z_loss=0.1)
    assert (float(loss), float(cross_entropy)) == (0, 0)


def metrics_on_devices(output):
    """Loss and gradient norm of a step, on two and on four devices of this process: more than there are teachers.

    Also runs `Trainer`, with Muon, on all four, and checks how a batch is split.
    """
    batch, optimizer = next(CountingBatches()), optax.identity()
    graph, params = nnx.split(noisy(), nnx.Param)
    found = []
    for devices, kind in ((2, CrossFitted), (4, CrossFitted), (4, Ensemble)):
        mesh, rows, teachers = mesh_of(devices), B // devices, teachers_of(kind)
        shards = shard_batch(batch, mesh)
        assert [part.data.shape for part in shards["tokens"].addressable_shards] == [(rows, M + 1)] * devices
        assert [part.data.shape for part in shards["weights"].addressable_shards] == [(rows, N)] * devices
        step = make_train_step(graph, DISTILLED, optimizer, mesh, objective_of(DISTILLED, teachers))
        _, metrics = step(initial_state(params, optimizer, mesh), shards, jnp.float32(1.0), teachers.place(mesh))
        found.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
    with pytest.raises(TrainingError, match=r"batch_size must be a multiple of 8, .* for 4 shards.*; got 4"):
        run(output / "refused", dataclasses.replace(EXACT, micro_batches=2))
    run(output / "on four", dataclasses.replace(EXACT, log_every=1))
    return found


@pytest.mark.slow
def test_devices_share_the_batch_and_its_teachers_and_give_the_losses_of_one(take_step, tmp_path):
    printed, _ = run_on_four_devices("test_train_step", "metrics_on_devices", tmp_path)
    on_one = [take_step(DISTILLED, teachers=teachers_of(kind))[2] for kind in (CrossFitted, CrossFitted, Ensemble)]
    expected = [[float(metrics["loss"]), float(metrics["gradient_norm"])] for metrics in on_one]
    assert abs(expected[1][1] - expected[2][1]) > 1e-2  # what teaches makes a difference
    np.testing.assert_allclose(json.loads(printed.splitlines()[-1]), expected, rtol=1e-3)
    run(tmp_path / "on one", dataclasses.replace(EXACT, log_every=1))
    of_one, of_four = (np.array(log_of(tmp_path / name, "loss", "gradient_norm")) for name in ("on one", "on four"))
    assert len(of_one) == 6
    np.testing.assert_allclose(of_four[:, 0], of_one[:, 0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(of_four[:, 1], of_one[:, 1], rtol=1e-3)
