"""Training: golden steps, exact resuming, and everything a step is made of, by hand."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model
from flax import nnx
from reference_model import reference

from music_ar.decoding import decoder as decoding
from music_ar.decoding.sampling import SamplingOptions
from music_ar.model.config import ModelConfig
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.pretrained import CheckpointError
from music_ar.tokens import vocabulary
from music_ar.training.losses import token_loss
from music_ar.training.optimizer import build_optimizer
from music_ar.training.step import TrainState, make_train_step, stacked_teachers
from music_ar.training.trainer import TrainingConfig, TrainingError, fit

M, N, B = 12, 8, 4
CONFIG = ModelConfig(
    context=M, latents=N, width=16, layers=1, heads=4, kv_heads=2, head_size=4, hidden=32, conv_width=3
)
# Checkpoints after every step, the hardest case for whatever may be saved while it changes.
TRAINING = TrainingConfig(
    steps=6, batch_size=B, warmup_steps=2, decay_fraction=0.6, log_every=2, checkpoint_minutes=0.0, final_fraction=0.5
)
EXACT = dataclasses.replace(TRAINING, dropout=0.0, prefix_keep=1.0)


class CountingBatches:
    """Batch i holds rising sequences, easy to learn, drawn from i; some of its weights are not 1."""

    def __init__(self):
        self.next = 0

    def __next__(self):
        rng = np.random.default_rng(self.next)
        tokens = (
            rng.integers(0, 300, (B, 1)) + np.arange(M + 1) * rng.integers(1, 4, (B, 1))
        ) % vocabulary.VOCABULARY_SIZE
        self.next += 1
        return {"tokens": tokens.astype(np.int32), "weights": rng.choice([0.5, 1, 1], (B, N)).astype(np.float32)}

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


@functools.cache
def fresh_model():
    return PerceiverAR(CONFIG, rngs=nnx.Rngs(0))


def run(output, config=TRAINING, **options: Any):
    options.setdefault("final_batches", CountingBatches())
    return fit(fresh_model(), config, CountingBatches(), output=output, **options)


def log_of(output, *names):
    """The log without what depends on the time of day."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [tuple(line.get(name) for name in (names or ("step", "loss", "gradient_norm", "rate"))) for line in lines]


def saved_state(output):
    """All arrays of the newest checkpoint: step, parameters, averages and the optimiser's state."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager((output / "training").absolute(), item_names=("state", "position")) as manager:
        step = manager.latest_step()
        restored = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(), position=ocp.args.JsonRestore())
        )
    return step, jax.tree.map(np.asarray, restored["state"]), restored["position"]


def assert_same_run(output, expected):
    step, state, position = saved_state(output)
    expected_step, expected_state, expected_position = saved_state(expected)
    assert step == expected_step
    assert len(state) > 30
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)
    assert position["batches"] == expected_position["batches"]
    assert log_of(output) == log_of(expected)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted")
    fitted = run(output)
    assert fitted.finished
    return output


GOLDEN = """The losses of a fixed tiny run have changed. If you meant to change nothing that a run computes
(a refactoring, a faster layout), this is a bug. If you changed the model, the optimiser, the loss, an initialisation or
a default on purpose, put the new numbers here and say in the commit why they changed."""


@pytest.mark.parametrize(
    ("optimizer", "golden"),
    [
        ("muon", [5.9687, 5.9621, 5.9675, 5.9026, 5.8907, 5.9058]),
        ("adamw", [5.9687, 5.9642, 5.9673, 5.9034, 5.8995, 5.9165]),
    ],
)
def test_golden_losses(optimizer, golden, tmp_path):
    run(tmp_path, dataclasses.replace(EXACT, optimizer=optimizer, log_every=1, checkpoint_minutes=5.0))
    np.testing.assert_allclose([loss for (loss,) in log_of(tmp_path, "loss")], golden, atol=2e-3, err_msg=GOLDEN)


def test_a_run_learns_and_leaves_the_callers_model_alone(tmp_path):
    model = fresh_model()
    config = dataclasses.replace(EXACT, steps=150, log_every=10, checkpoint_minutes=5.0)
    fitted = fit(model, config, CountingBatches(), output=tmp_path)
    losses = [loss for (loss,) in log_of(tmp_path, "loss")]
    assert losses[-1] < losses[0] - 0.3
    assert not model.head.kernel[...].any()
    assert fitted.model.head.kernel[...].any()


class StoppingBatches(CountingBatches):
    """SIGTERM comes while the last of `left` batches, over all such iterators, is made."""

    left = 0

    def __next__(self):
        StoppingBatches.left -= 1
        if StoppingBatches.left == 0:
            signal.raise_signal(signal.SIGTERM)
        return super().__next__()


def test_stopped_and_resumed_is_uninterrupted_to_the_bit(uninterrupted, tmp_path):
    """SIGTERM in the middle of what a log line tells of, twice."""

    def not_handled(*_):
        pytest.fail("fit did not handle SIGTERM")

    before = signal.signal(signal.SIGTERM, not_handled)
    try:
        for resume, steps, step in ((False, 3, 3), (True, 2, 5)):
            StoppingBatches.left = steps
            fitted = fit(
                fresh_model(),
                TRAINING,
                StoppingBatches(),
                final_batches=StoppingBatches(),
                output=tmp_path,
                resume=resume,
            )
            assert (fitted.step, fitted.finished) == (step, False)
        assert signal.getsignal(signal.SIGTERM) is not_handled
    finally:
        signal.signal(signal.SIGTERM, before)
    assert run(tmp_path, resume=True).finished
    assert_same_run(tmp_path, uninterrupted)


def in_a_process(code, **environment):
    """Runs Python that may use this file's names, as `t`."""
    prelude = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_training as t\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        cwd=Path(__file__).parents[1],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


KILLED = """
import os, pathlib, signal
def kill_after_four(progress):
    if progress.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
t.run(pathlib.Path({output!r}), on_progress=kill_after_four)
"""


def test_killed_and_resumed_is_uninterrupted_to_the_bit(uninterrupted, tmp_path):
    result = in_a_process(KILLED.format(output=str(tmp_path)))
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert log_of(tmp_path)[-1][0] == 4
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')  # and a kill may cut a line
    assert run(tmp_path, resume=True).finished
    assert_same_run(tmp_path, uninterrupted)


def test_a_finished_run_resumed_is_only_read(uninterrupted):
    before = saved_state(uninterrupted), log_of(uninterrupted)
    fitted = run(uninterrupted, resume=True)
    assert (fitted.step, fitted.finished) == (6, True)
    after = saved_state(uninterrupted), log_of(uninterrupted)
    jax.tree.map(np.testing.assert_array_equal, before[0][1], after[0][1])
    assert before[1] == after[1]


@pytest.fixture(scope="module")
def every_step(tmp_path_factory):
    """The uninterrupted run again, but with a log line a step; its folder and what `validate` was given."""
    output, validated = tmp_path_factory.mktemp("every step"), []

    def validate(model):
        validated.append(np.asarray(model.head.bias[...]))
        return float(len(validated))

    config = dataclasses.replace(TRAINING, log_every=1, checkpoint_minutes=5.0, validate_every=3)
    fitted = run(output, config, validate=validate)
    return output, validated, fitted


def test_a_log_line_tells_the_mean_of_its_steps(uninterrupted, every_step):
    lines = [line for line in log_of(every_step[0], "step", "loss", "gradient_norm") if line[1] is not None]
    assert [step for step, *_ in lines] == [1, 2, 3, 4, 5, 6]
    for line, *pair in zip(log_of(uninterrupted), lines[::2], lines[1::2], strict=True):
        assert line[:3] == pytest.approx((pair[1][0], *np.mean([step[1:] for step in pair], axis=0)))


def test_the_averaged_model_is_validated_and_returned(every_step):
    output, validated, fitted = every_step
    logged = [line for line in log_of(output, "step", "validation") if line[1] is not None]
    assert logged == [(3, 1.0), (6, 2.0)]
    np.testing.assert_array_equal(validated[0], fitted.model.head.bias[...])  # the one with the lowest figure
    assert fitted.model_step == 3
    assert (validated[0] != validated[1]).any()


def test_the_model_that_validated_best_survives_a_stop(tmp_path):
    """Figures 3, 1, 2, 2.5, …, with a stop after each of them; the end of the run is validated too."""
    figures, biases = iter([3.0, 1.0, 2.0, 2.5]), []
    config = dataclasses.replace(TRAINING, steps=7, validate_every=2)

    def validate(model):
        biases.append(np.asarray(model.head.bias[...]))
        return next(figures)

    for steps, model_step in ((2, 2), (2, 4), (2, 4), (2, 4)):
        StoppingBatches.left = steps
        batches, final = StoppingBatches(), StoppingBatches()
        resume = (tmp_path / "training").exists()
        fitted = fit(
            fresh_model(), config, batches, final_batches=final, output=tmp_path, resume=resume, validate=validate
        )
        assert fitted.model_step == model_step
    assert fitted.finished
    assert (7, 2.5) in log_of(tmp_path, "step", "validation")
    np.testing.assert_array_equal(np.asarray(fitted.model.head.bias), biases[1])


def test_the_end_of_a_run_reads_the_final_batches(uninterrupted):
    assert saved_state(uninterrupted)[2]["batches"] == [{"next": 3}, {"next": 3}]


def test_tensorboard_is_told_too(uninterrupted):
    written = b"".join(path.read_bytes() for path in (uninterrupted / "tensorboard").iterdir())
    assert b"gradient_norm" in written


DEVICES = """
import pathlib
import pytest
from music_ar import training
shards = []
put = trainer._put_batch
def watched(batch, mesh):
    placed = put(batch, mesh)
    shards.append({{name: [part.data.shape for part in array.addressable_shards] for name, array in placed.items()}})
    return placed
trainer._put_batch = watched
output = pathlib.Path({output!r})
config = t.dataclasses.replace(t.EXACT, log_every=1, checkpoint_minutes=5.0)
teachers = [t.noisy(), t.fresh_model()]
t.run(output / "plain", config)
t.run(output / "taught", config, teachers=teachers)
t.run(output / "out of fold", config, teachers=teachers, out_of_fold=True)
if {devices} > 1:
    B = 4 // {devices}
    assert shards == [{{"tokens": [(B, 13)] * {devices}, "weights": [(B, 8)] * {devices}}}] * 18, shards
    with pytest.raises(trainer.TrainingError, match="accumulation . devices, got 6, 2 and {devices}"):
        t.run(output / "other", t.dataclasses.replace(config, batch_size=6, accumulation=2))
"""


@pytest.fixture(scope="module")
def losses_on_devices(tmp_path_factory):
    """Loss and gradient of a plain run, one with two teachers and one with them out of fold, on so many devices."""

    def losses(devices):
        output = tmp_path_factory.mktemp(f"devices-{devices}")
        script = DEVICES.format(output=str(output), devices=devices)
        result = in_a_process(script, JAX_NUM_CPU_DEVICES=str(devices))
        assert result.returncode == 0, result.stderr
        kinds = ("plain", "taught", "out of fold")
        return np.array([log_of(output / kind, "loss", "gradient_norm") for kind in kinds])

    return functools.cache(losses)


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_share_the_batch_and_its_teachers_and_give_the_losses_of_one(losses_on_devices, devices):
    """Four devices are more than there are teachers."""
    of_one, of_several = losses_on_devices(1), losses_on_devices(devices)
    # What teaches, and what it teaches, makes a difference.
    assert np.abs(np.diff(of_one[:, 1:, 0], axis=0)).max(axis=1).min() > 1e-3
    np.testing.assert_allclose(of_several[..., 0], of_one[..., 0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(of_several[..., 1], of_one[..., 1], rtol=1e-3)


@functools.cache
def noisy():
    return noisy_model(CONFIG)


@pytest.fixture(scope="module")
def take_step():
    """Takes a step of a config from a model with noise everywhere: the state before it, after it, and its metrics."""
    graph, params = nnx.split(noisy(), nnx.Param)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @functools.cache
    def compiled(config, teachers, out_of_fold):
        optimizer = build_optimizer(config)
        step = make_train_step(graph, config, optimizer, mesh, [graph] * teachers, out_of_fold=out_of_fold)
        return step, jax.jit(optimizer.init)(params)

    def take(config, *, rate=1.0, done=0, teachers=(), out_of_fold=False, weighed=slice(None)):
        step, optimizer_state = compiled(config, len(teachers), out_of_fold)
        before = TrainState(jnp.int32(done), params, jax.tree.map(jnp.zeros_like, params), optimizer_state)
        batch = jax.tree.map(jnp.asarray, next(CountingBatches()))
        batch["weights"] = jnp.zeros_like(batch["weights"]).at[weighed].set(batch["weights"][weighed])
        taught = stacked_teachers(teachers, devices=1) if out_of_fold else list(teachers)
        after, metrics = step(jax.tree.map(jnp.copy, before), batch, jnp.float32(rate), taught)
        return before, after, metrics

    return take


def test_accumulated_parts_give_the_gradient_of_the_whole(take_step):
    _, whole, metrics = take_step(EXACT)
    _, parts, in_parts = take_step(dataclasses.replace(EXACT, accumulation=2))
    assert float(in_parts["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)
    assert float(in_parts["gradient_norm"]) == pytest.approx(float(metrics["gradient_norm"]), rel=1e-4)
    moments = zip(jax.tree.leaves(parts.optimizer), jax.tree.leaves(whole.optimizer), strict=True)
    for part, one in moments:  # the optimiser's first moments are the clipped gradients
        np.testing.assert_allclose(part, one, rtol=2e-3, atol=1e-5)


def test_the_loss_is_that_of_the_last_inputs_next_tokens(take_step):
    """Weighted cross-entropy of `tokens[:, -N:]`, computed from the model's own logits."""
    batch = next(CountingBatches())
    logits = np.stack([reference(noisy(), tokens, N) for tokens in batch["tokens"][:, :-1]])
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = np.take_along_axis(chances, batch["tokens"][:, -N:, None], axis=-1)[..., 0]
    expected = -(np.log(found) * batch["weights"]).sum() / batch["weights"].sum()
    assert float(take_step(EXACT)[2]["loss"]) == pytest.approx(expected, rel=1e-4)


def test_the_rate_scales_the_step(take_step):
    before, whole, _ = take_step(EXACT)
    _, half, _ = take_step(EXACT, rate=0.5)
    _, none, _ = take_step(EXACT, rate=0.0)
    jax.tree.map(np.testing.assert_array_equal, none.params, before.params)
    for old, one, part in zip(*map(jax.tree.leaves, (before.params, whole.params, half.params)), strict=True):
        assert (old != one).any()
        np.testing.assert_allclose(part - old, (one - old) / 2, atol=1e-6)


def test_who_predicts_as_its_teachers_do_has_nothing_to_learn(take_step):
    """Where their mean prediction is all that counts, and a teacher reads what its student does."""
    config = dataclasses.replace(EXACT, prefix_keep=0.5, z_loss=0.0, distillation=1.0)
    own = nnx.split(noisy(), nnx.Param)[1]
    other = jax.tree.map(lambda leaf: 0.9 * leaf, own)
    _, _, alone = take_step(config)
    _, _, by_itself = take_step(config, teachers=[own, own])
    _, _, by_both = take_step(config, teachers=[own, other])
    assert float(by_itself["loss"]) == pytest.approx(
        float(alone["loss"])
    )  # the loss that is told is that of the tokens
    assert float(by_itself["gradient_norm"]) < 1e-4 * float(alone["gradient_norm"])
    assert float(by_both["gradient_norm"]) > 1e-2 * float(alone["gradient_norm"])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_out_of_fold_each_teacher_teaches_its_own_part_of_the_batch(take_step, accumulation):
    config = dataclasses.replace(EXACT, prefix_keep=1.0, z_loss=0.0, distillation=1.0, accumulation=accumulation)
    own = nnx.split(noisy(), nnx.Param)[1]
    other = jax.tree.map(lambda leaf: 0.9 * leaf, own)
    half = EXACT.batch_size // 2

    def learnt(weighed):
        _, _, metrics = take_step(config, teachers=[own, other], out_of_fold=True, weighed=weighed)
        return float(metrics["gradient_norm"])

    assert learnt(slice(0, half)) < 1e-3 * learnt(slice(half, None))


@pytest.mark.parametrize("teachers", [0, 3])
def test_teachers_out_of_fold_that_cannot_share_the_batch_are_refused(tmp_path, teachers):
    with pytest.raises(TrainingError, match=f"common multiple of teachers and devices, got {B}, 1, {teachers} and 1"):
        run(tmp_path, teachers=[noisy()] * teachers, out_of_fold=True)
    assert not any(tmp_path.iterdir())


def test_teachers_out_of_fold_of_two_designs_are_refused(tmp_path):
    other = noisy_model(dataclasses.replace(CONFIG, conv_width=2))
    with pytest.raises(TrainingError, match="teachers must be of one design, got 2"):
        run(tmp_path, teachers=[noisy(), other], out_of_fold=True)
    assert not any(tmp_path.iterdir())


def test_a_teacher_reads_what_its_own_window_holds():
    """A student that recalls has a longer one; here it takes no notice of what it recalls, and so predicts the same."""
    teacher = noisy()
    student = noisy_model(dataclasses.replace(CONFIG, recall=12))
    nnx.update(student, nnx.state(teacher, nnx.Param))
    student.recall.kernel[...] = jnp.zeros_like(student.recall.kernel[...])
    config = dataclasses.replace(EXACT, z_loss=0.0, distillation=1.0)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tokens = np.random.default_rng(0).integers(0, vocabulary.EVENT_CLASSES, (B, student.config.window + 1), np.int32)
    batch = {"tokens": jnp.asarray(tokens), "weights": jnp.ones((B, N))}
    (graph, params), (teacher_graph, taught) = (nnx.split(model, nnx.Param) for model in (student, teacher))
    optimizer = build_optimizer(config)
    norms = []
    for teachers in ([taught], [jax.tree.map(lambda leaf: 0.9 * leaf, taught)]):
        copy = jax.tree.map(jnp.copy, params)
        state = TrainState(jnp.int32(0), copy, jax.tree.map(jnp.zeros_like, params), optimizer.init(params))
        step = make_train_step(graph, config, optimizer, mesh, [teacher_graph])
        norms.append(float(step(state, batch, jnp.float32(1.0), teachers)[1]["gradient_norm"]))
    assert norms[0] < 1e-4 * norms[1]


@pytest.mark.parametrize("told", ["student", "teachers", "nobody"])
@pytest.mark.parametrize("out_of_fold", [False, True])
def test_models_that_have_views_are_told_them(told, out_of_fold):
    plain, viewing = noisy(), noisy_model(dataclasses.replace(CONFIG, view_size=3))
    student, teacher = (viewing if told == who else plain for who in ("student", "teachers"))
    config = dataclasses.replace(EXACT, distillation=1.0)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    (graph, params), (teacher_graph, taught) = (nnx.split(model, nnx.Param) for model in (student, teacher))
    optimizer = build_optimizer(config)
    step = make_train_step(graph, config, optimizer, mesh, [teacher_graph] * 2, out_of_fold=out_of_fold)
    teachers = stacked_teachers([taught, taught], devices=1) if out_of_fold else [taught, taught]
    norms = []
    for view in (np.zeros((B, 3)), np.eye(B, 3, k=-1)):  # the second: other views of all windows but the first
        copy = jax.tree.map(jnp.copy, params)
        state = TrainState(jnp.int32(0), copy, jax.tree.map(jnp.zeros_like, params), optimizer.init(params))
        batch = jax.tree.map(jnp.asarray, next(CountingBatches()) | {"view": view.astype(np.float32)})
        norms.append(float(step(state, batch, jnp.float32(1.0), teachers)[1]["gradient_norm"]))
    assert (abs(norms[1] / norms[0] - 1) > 1e-3) == (told != "nobody")


def test_each_step_draws_its_own_dropout(take_step):
    losses = [float(take_step(TRAINING, done=done)[2]["loss"]) for done in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(("done", "decay"), [(0, 0.1), (10, 11 / 20), (10**6, 0.9995)])
def test_the_average_follows_the_weights(take_step, done, decay):
    _, after, _ = take_step(EXACT, done=done)
    assert int(after.step) == done + 1
    for average, param in zip(jax.tree.leaves(after.ema), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_allclose(average, (1 - decay) * param, rtol=1e-3, atol=1e-7)  # it was zero before


def test_the_loss_by_hand():
    logits = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 1.0], [5.0, 5.0]]]))  # partitions 4, 2, 10
    loss, nats = token_loss(logits, jnp.array([[0, 1, 1]]), jnp.array([[1.0, 0.5, 0.0]]), 0.1)
    assert float(nats) == pytest.approx((np.log(4) + 0.5 * np.log(2)) / 1.5)
    assert float(loss - nats) == pytest.approx(0.1 * (np.log(4) ** 2 + 0.5 * np.log(2) ** 2) / 1.5)


def test_the_loss_with_a_teacher_by_hand():
    logits, targets = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 1.0]]])), jnp.array([[0, 1]])
    taught = jnp.array([[[0.5, 0.5], [0.25, 0.75]]])
    weights = jnp.array([[1.0, 1.0]])
    loss, nats = token_loss(logits, targets, weights, 0.0, taught_BxNxV=taught, distillation=0.25)
    with_teacher = (0.5 * np.log(4) + 0.5 * np.log(4 / 3) + np.log(2)) / 2
    assert float(nats) == pytest.approx((np.log(4) + np.log(2)) / 2)
    assert float(loss) == pytest.approx(0.75 * float(nats) + 0.25 * with_teacher)


def test_a_batch_without_weight_has_no_loss():
    loss, nats = token_loss(jnp.ones((1, 2, 3)), jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2)), 0.1)
    assert (float(loss), float(nats)) == (0, 0)


@pytest.mark.parametrize(
    ("step", "progress", "rate"),
    [(0, 0.0, 0.25), (2, 0.02, 0.75), (3, 0.03, 1), (50, 0.5, 1), (75, 0.75, 0.5), (99, 0.99, 0.02), (100, 1.0, 0)],
)
def test_the_schedule_by_hand(step, progress, rate):
    config = TrainingConfig(steps=100, warmup_steps=4, decay_fraction=0.5)
    assert config.rate(step, progress) == pytest.approx(rate)


def test_a_run_follows_the_schedule(every_step):
    rates = [rate for (rate,) in log_of(every_step[0], "rate") if rate is not None]
    assert rates == pytest.approx([0.5, 1, 1, 0.5 / 0.6, 2 / 6 / 0.6, 1 / 6 / 0.6])


def test_no_warm_up_and_no_decay():
    config = TrainingConfig(steps=100, warmup_steps=0, decay_fraction=0.0)
    assert [config.rate(0, 0.0), config.rate(99, 0.99)] == [1, 1]


MATRICES = {
    f"{block}.{name}.kernel"
    for block in ("cross", "blocks.0")
    for name in ("query", "key", "value", "output", "expand", "contract")
} | {"latent.kernel"}


def named(tree):
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(tree)}


@pytest.fixture(scope="module")
def params():
    return nnx.state(noisy(), nnx.Param)


@functools.cache
def updates_of(optimizer):
    """Its compiled `update`, and its state at the start."""
    rule = build_optimizer(dataclasses.replace(TRAINING, optimizer=optimizer))
    return jax.jit(rule.update), jax.jit(rule.init)(nnx.state(noisy(), nnx.Param))


def random_like(params, seed, norm):
    """Gradients of a given global norm."""
    rng = np.random.default_rng(seed)
    grads = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
    scale = norm / np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(grads)))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf * np.float32(scale)), grads)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_matrices_alone_decay(params, optimizer):
    update, state = updates_of(optimizer)
    updates, _ = update(jax.tree.map(jnp.zeros_like, params), state, params)
    rate = {"muon": TRAINING.matrix_learning_rate, "adamw": TRAINING.learning_rate}[optimizer]
    for name, moved in named(updates).items():
        decay = rate * TRAINING.weight_decay if name in MATRICES else 0
        np.testing.assert_allclose(moved, -decay * named(params)[name], rtol=1e-5, atol=1e-9, err_msg=name)


def test_muon_makes_steps_of_matrices_orthogonal_and_adam_moves_the_rest(params):
    update, state = updates_of("muon")
    updates, _ = update(random_like(params, 0, 1.0), state, jax.tree.map(jnp.zeros_like, params))
    assert named(updates).keys() > MATRICES
    for name, moved in named(updates).items():
        if name in MATRICES:
            rows, columns = moved.shape
            sizes = np.linalg.svd(moved, compute_uv=False) / TRAINING.matrix_learning_rate
            sizes /= np.sqrt(max(1, columns / rows))
            assert (sizes > 0.6).all(), name
            assert (sizes < 1.3).all(), name
        else:  # Adam's first step has one size everywhere, here with Nesterov's momentum
            size = np.abs(moved).mean()
            np.testing.assert_allclose(np.abs(moved), size, rtol=0.05, err_msg=name)
            assert 1 <= size / TRAINING.learning_rate < 1.5


def test_gradients_are_clipped_by_their_norm(params):
    update, start = updates_of("adamw")

    def second_update(norm):
        """The step after a gradient of this norm: moments remember how large it was."""
        _, state = update(random_like(params, 0, norm), start, params)
        return named(update(random_like(params, 1, 1.0), state, params)[0])

    clipped, at_the_limit, below = (second_update(norm) for norm in (700.0, 1.0, 0.3))
    for name, moved in clipped.items():
        np.testing.assert_allclose(moved, at_the_limit[name], rtol=1e-2, atol=1e-5)
    assert max(np.abs(clipped[name] - below[name]).max() for name in clipped) > 1e-4


class BreakingBatches(CountingBatches):
    """A target beyond the vocabulary in the fifth batch: its loss is not a number."""

    def __next__(self):
        batch = super().__next__()
        if self.next == 5:
            batch["tokens"][0, -1] = 5000
        return batch


def test_a_broken_loss_stops_the_run_and_is_never_saved(tmp_path):
    config = dataclasses.replace(TRAINING, log_every=100)  # so that saving looks first
    with pytest.raises(TrainingError, match="broke at step 5: loss nan") as caught:
        fit(fresh_model(), config, BreakingBatches(), output=tmp_path)
    assert str(tmp_path / "training" / "4") in str(caught.value)
    assert {path.name for path in (tmp_path / "training").iterdir()} == {"3", "4", "settings.json"}
    with pytest.raises(TrainingError, match="broke at step 5: loss nan") as caught:
        fit(fresh_model(), config, BreakingBatches(), output=tmp_path, resume=True)
    assert str(tmp_path / "training" / "4") in str(caught.value)


def test_a_broken_gradient_behind_a_finite_loss_stops_the_run(tmp_path):
    model = nnx.merge(*nnx.split(fresh_model()), copy=True)
    model.head.kernel[...] = jnp.full_like(model.head.kernel[...], 1e22).at[:, ::2].multiply(-1)
    with pytest.raises(
        TrainingError, match=r"broke at step 1: loss [0-9.e+]+, norm of the gradient (inf|nan).*none yet"
    ):
        fit(model, TRAINING, CountingBatches(), output=tmp_path)
    assert {path.name for path in (tmp_path / "training").iterdir()} == {"settings.json"}


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (TRAINING, {}, r"already holds a run \(step 6\)"),
        (dataclasses.replace(TRAINING, steps=7), {"resume": True}, r"training\.steps was 6, is 7"),
        (dataclasses.replace(TRAINING, seed=1), {"resume": True}, r"training\.seed was 0, is 1"),
        (TRAINING, {"resume": True, "final_batches": None}, "final_batches was True, is False"),
        (TRAINING, {"resume": True, "data": {"folder": "x"}}, r"data\.folder was None, is x"),
    ],
)
def test_a_folder_of_another_run_is_refused(uninterrupted, config, options, message):
    before = log_of(uninterrupted)
    with pytest.raises(CheckpointError, match=message):
        run(uninterrupted, config, **options)
    assert log_of(uninterrupted) == before


def test_a_run_that_saved_nothing_is_begun_anew(tmp_path):
    config = dataclasses.replace(TRAINING, checkpoint_minutes=5.0)

    def killed(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, config, on_progress=killed)
    assert log_of(tmp_path)
    run(tmp_path, config)
    assert [step for step, *_ in log_of(tmp_path)] == [2, 4, 6]


def test_a_budget_of_minutes_counts_the_time_before_resuming(tmp_path, monkeypatch):
    from music_ar.training import trainer

    now_s = iter(range(10**6))  # every look at the clock takes a second

    class Clock:
        @staticmethod
        def monotonic():
            return float(next(now_s))

    monkeypatch.setattr(trainer, "time", Clock)
    config = dataclasses.replace(TRAINING, steps=None, minutes=1.0, log_every=1, checkpoint_minutes=100.0)
    StoppingBatches.left = 3
    stopped = fit(fresh_model(), config, StoppingBatches(), output=tmp_path)
    assert (stopped.step, stopped.finished) == (3, False)
    fitted = fit(fresh_model(), config, CountingBatches(), output=tmp_path, resume=True)
    assert fitted.finished
    assert 60 <= fitted.elapsed_s < 70
    elapsed_s = [seconds for (seconds,) in log_of(tmp_path, "elapsed_s")]
    assert elapsed_s == sorted(elapsed_s)
    assert elapsed_s[3] - elapsed_s[2] < 10
    assert log_of(tmp_path, "rate")[-1][0] < 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either steps or minutes"),
        ({"steps": 3, "minutes": 1.0}, "either steps or minutes"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"minutes": 0.0}, "minutes must be above 0"),
        ({"minutes": float("nan")}, "minutes must be above 0"),
        ({"steps": 3, "batch_size": 0}, "batch_size must be at least 1"),
        ({"steps": 3, "accumulation": 0}, "accumulation must be at least 1"),
        ({"steps": 3, "accumulation": 5}, "multiple of accumulation, got 16 and 5"),
        ({"steps": 3, "log_every": 0}, "log_every must be at least 1"),
        ({"steps": 3, "clip_norm": 0.0}, "clip_norm must be above 0"),
        ({"steps": 3, "dropout": 1.5}, r"dropout must lie in 0\.\.1, got 1.5"),
        ({"steps": 3, "prefix_keep": -0.1}, "prefix_keep must lie in"),
        ({"steps": 3, "learning_rate": -1.0}, "learning_rate must not be negative"),
        ({"steps": 3, "optimizer": "sgd"}, "'sgd'"),
        ({"steps": 3, "seed": -1}, "seed must lie in"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(options, message):
    with pytest.raises(TrainingError, match=message):
        TrainingConfig(**options)


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def test_the_training_step_lowers_for_tpu():
    config = dataclasses.replace(TRAINING, accumulation=2)
    model = PerceiverAR(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.dtype(jnp.bfloat16))
    graph, params = nnx.split(model, nnx.Param)
    optimizer = build_optimizer(config)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step: Any = make_train_step(graph, config, optimizer, mesh)  # what jax.jit gives
    state = TrainState(jnp.int32(0), params, params, optimizer.init(params))
    exported = jax.export.export(step, platforms=["tpu"])(
        shapes(state), shapes(next(CountingBatches())), jax.ShapeDtypeStruct((), jnp.float32), []
    )
    assert exported.platforms == ("tpu",)
    assert "bf16" in exported.mlir_module()


def test_the_decoding_loop_lowers_for_tpu():
    model = PerceiverAR(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.dtype(jnp.bfloat16))
    decoder = decoding.Decoder(model, int8=False)
    state = decoder.start([np.array([vocabulary.START])], latents=N, seeds=[0], limit_steps=100)
    exported = jax.export.export(decoding._decode, platforms=["tpu"])(
        decoder.graph, shapes(decoder.params), shapes(state), shapes(SamplingOptions().filters()), 16, None
    )
    assert exported.platforms == ("tpu",)
    assert "stablehlo.while" in exported.mlir_module()
