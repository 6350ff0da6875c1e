"""Training runs: golden losses, exact resuming, logs, validation and what is refused."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model
from flax import nnx
from tiny_training import CONFIG, EXACT, TRAINING, B, CountingBatches, fresh_model, log_of, noisy, run

from music_ar.model.config import Compute
from music_ar.model.weights import CheckpointError
from music_ar.training import log
from music_ar.training.config import TrainingConfig, TrainingError
from music_ar.training.distillation import CrossFitted, Ensemble
from music_ar.training.log import flops_utilization
from music_ar.training.next_tokens import NextTokens
from music_ar.training.trainer import Trainer


def saved_state(output):
    """All arrays of the newest checkpoint: step, parameters, averages and the optimizer's state."""
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


GOLDEN = """The losses of a fixed tiny run have changed. If you meant to change nothing that a run computes (a
refactoring, a faster layout), this is a bug. If you changed the model, the optimizer, the loss, an initialization or a
default on purpose, put the new numbers here and say in the commit why they changed."""


def test_golden_losses(tmp_path):
    run(tmp_path, dataclasses.replace(EXACT, log_every=1))
    golden = [5.9687, 5.9621, 5.9675, 5.9026, 5.8907, 5.9058]
    np.testing.assert_allclose([loss for (loss,) in log_of(tmp_path, "loss")], golden, atol=2e-3, err_msg=GOLDEN)


def test_a_run_learns_and_leaves_the_callers_model_alone(tmp_path):
    model = fresh_model()
    config = dataclasses.replace(EXACT, steps=150, log_every=10)
    fitted = Trainer(model, config, CountingBatches(), output=tmp_path).fit()
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


def run_until_stopped(output, steps, config=TRAINING, **options):
    StoppingBatches.left = steps
    batches, final_batches = StoppingBatches(), StoppingBatches()
    return Trainer(fresh_model(), config, batches, final_batches=final_batches, output=output, **options).fit()


def test_stopped_and_resumed_is_uninterrupted_to_the_bit(uninterrupted, tmp_path):
    """SIGTERM in the middle of what a log line covers, twice."""

    def not_handled(*_):
        pytest.fail("fit did not handle SIGTERM")

    before = signal.signal(signal.SIGTERM, not_handled)
    try:
        for resume, steps, step in ((False, 3, 3), (True, 2, 5)):
            fitted = run_until_stopped(tmp_path, steps, resume=resume)
            assert (fitted.step, fitted.finished) == (step, False)
        assert signal.getsignal(signal.SIGTERM) is not_handled
    finally:
        signal.signal(signal.SIGTERM, before)
    assert run(tmp_path, resume=True).finished
    assert_same_run(tmp_path, uninterrupted)


KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, {tests!r})
from tiny_training import run
def kill_after_four(progress):
    if progress.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
run(pathlib.Path({output!r}), on_progress=kill_after_four)
"""


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted_to_the_bit(uninterrupted, tmp_path):
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", KILLED.format(tests=str(here), output=str(tmp_path))],
        cwd=here.parent,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert log_of(tmp_path)[-1][0] == 4
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # and a kill may cut a line
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
    """The uninterrupted run again, but with a log line per step; its folder, and what `validate` was given."""
    output, validated = tmp_path_factory.mktemp("every step"), []

    def validate(model):
        validated.append(np.asarray(model.head.bias[...]))
        return float(len(validated))

    config = dataclasses.replace(TRAINING, log_every=1, checkpoint_minutes=5.0, validate_every=3)
    fitted = run(output, config, validate=validate)
    return output, validated, fitted


def test_a_log_line_has_the_means_of_its_steps(uninterrupted, every_step):
    lines = [line for line in log_of(every_step[0], "step", "loss", "gradient_norm") if line[1] is not None]
    assert [step for step, *_ in lines] == [1, 2, 3, 4, 5, 6]
    for line, *pair in zip(log_of(uninterrupted), lines[::2], lines[1::2], strict=True):
        assert line[:3] == pytest.approx((pair[1][0], *np.mean([step[1:] for step in pair], axis=0)))


def test_the_averaged_model_is_validated_and_returned(every_step):
    output, validated, fitted = every_step
    logged = [line for line in log_of(output, "step", "validation") if line[1] is not None]
    assert logged == [(3, 1.0), (6, 2.0)]
    np.testing.assert_array_equal(validated[0], fitted.model.head.bias[...])  # the one with the lowest value
    assert fitted.model_step == 3
    assert (validated[0] != validated[1]).any()


def test_the_model_that_validated_best_survives_a_stop(tmp_path):
    """Validation returns 3, 1, 2, 2.5, with a stop after each of them; the end of the run is validated too."""
    values, biases = iter([3.0, 1.0, 2.0, 2.5]), []
    config = dataclasses.replace(TRAINING, steps=7, validate_every=2)

    def validate(model):
        biases.append(np.asarray(model.head.bias[...]))
        return next(values)

    fitted = None
    for steps, model_step in ((2, 2), (2, 4), (2, 4), (2, 4)):
        fitted = run_until_stopped(tmp_path, steps, config, resume=fitted is not None, validate=validate)
        assert fitted.model_step == model_step
    assert fitted is not None
    assert fitted.finished
    assert (7, 2.5) in log_of(tmp_path, "step", "validation")
    np.testing.assert_array_equal(np.asarray(fitted.model.head.bias), biases[1])


def test_the_end_of_a_run_reads_the_final_batches(uninterrupted):
    assert saved_state(uninterrupted)[2]["batches"] == [{"next": 3}, {"next": 3}]


def test_a_run_follows_the_schedule(every_step):
    rates = [rate for (rate,) in log_of(every_step[0], "rate") if rate is not None]
    assert rates == pytest.approx([0.5, 1, 1, 0.5 / 0.6, 2 / 6 / 0.6, 1 / 6 / 0.6])


def test_tensorboard_gets_the_metrics_too(uninterrupted):
    written = b"".join(path.read_bytes() for path in (uninterrupted / "tensorboard").iterdir())
    assert b"gradient_norm" in written


def test_utilization_is_the_fraction_of_the_peak_of_all_devices():
    assert flops_utilization(989e12, "NVIDIA H100 80GB HBM3", 2) == pytest.approx(0.5)
    assert flops_utilization(197e12, "TPU v5 lite", 1) == pytest.approx(1.0)
    assert flops_utilization(1e12, "cpu", 1) is None


class BreakingBatches(CountingBatches):
    """A target beyond the vocabulary in the fifth batch: its loss is not a number."""

    def __next__(self):
        batch = super().__next__()
        if self.next == 5:
            batch["tokens"][0, -1] = 5000
        return batch


def test_a_broken_loss_stops_the_run_and_is_never_saved(tmp_path):
    config = dataclasses.replace(TRAINING, log_every=100)  # so that saving looks first
    for resume in (False, True):
        with pytest.raises(TrainingError, match="diverged at step 5: loss nan") as caught:
            Trainer(fresh_model(), config, BreakingBatches(), output=tmp_path, resume=resume).fit()
        assert str(tmp_path / "training" / "4") in str(caught.value)
        assert {path.name for path in (tmp_path / "training").iterdir()} == {"3", "4", "settings.json"}


def test_a_broken_gradient_behind_a_finite_loss_stops_the_run(tmp_path):
    model = nnx.merge(*nnx.split(fresh_model()), copy=True)
    model.head.kernel[...] = jnp.full_like(model.head.kernel[...], 1e22).at[:, ::2].multiply(-1)
    with pytest.raises(TrainingError, match=r"diverged at step 1: loss [0-9.e+]+, gradient norm (inf|nan).*none yet"):
        Trainer(model, TRAINING, CountingBatches(), output=tmp_path).fit()
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


def test_a_run_that_saved_nothing_is_started_anew(tmp_path):
    config = dataclasses.replace(TRAINING, checkpoint_minutes=5.0)

    def killed(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, config, on_progress=killed)
    assert log_of(tmp_path)
    run(tmp_path, config)
    assert [step for step, *_ in log_of(tmp_path)] == [2, 4, 6]


def test_a_run_of_minutes_counts_the_time_before_resuming(tmp_path, monkeypatch):
    now_s = iter(range(10**6))  # every look at the clock takes a second

    class Clock:
        @staticmethod
        def monotonic():
            return float(next(now_s))

    monkeypatch.setattr(log, "time", Clock)
    config = dataclasses.replace(TRAINING, steps=None, minutes=1.0, log_every=1, checkpoint_minutes=100.0)
    StoppingBatches.left = 3
    stopped = Trainer(fresh_model(), config, StoppingBatches(), output=tmp_path).fit()
    assert (stopped.step, stopped.finished) == (3, False)
    fitted = Trainer(fresh_model(), config, CountingBatches(), output=tmp_path, resume=True).fit()
    assert fitted.finished
    assert 60 <= fitted.elapsed_s < 70
    elapsed_s = [seconds for (seconds,) in log_of(tmp_path, "elapsed_s")]
    assert elapsed_s == sorted(elapsed_s)
    assert elapsed_s[3] - elapsed_s[2] < 10
    assert log_of(tmp_path, "rate")[-1][0] < 0.15


def test_cross_fitted_teachers_that_cannot_share_the_batch_are_refused(tmp_path):
    with pytest.raises(TrainingError, match=f"a multiple of 3, .* 1 times 3 equal parts .*; got {B}"):
        run(tmp_path, objective=NextTokens(CONFIG, Compute(), TRAINING, CrossFitted([noisy()] * 3)))
    assert not any(tmp_path.iterdir())


def test_cross_fitted_teachers_must_be_alike():
    with pytest.raises(TrainingError, match="same configuration, got 0 teachers"):
        CrossFitted([])
    with pytest.raises(TrainingError, match="same configuration, got 2 teachers with 2 configurations"):
        CrossFitted([noisy(), noisy_model(dataclasses.replace(CONFIG, conv_width=2))])
    with pytest.raises(TrainingError, match="at least one teacher"):
        Ensemble([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either steps or minutes"),
        ({"steps": 3, "minutes": 1.0}, "either steps or minutes"),
        ({"steps": 0}, "steps must be a whole number from 1 to"),
        ({"minutes": 0.0}, "minutes must be a number above 0"),
        ({"minutes": float("nan")}, "minutes must be a number above 0"),
        ({"minutes": float("inf")}, "minutes must be a number above 0"),
        ({"steps": 3, "batch_size": 0}, "batch_size must be a whole number from 1 to"),
        ({"steps": 3, "micro_batches": 0}, "micro_batches must be a whole number from 1 to"),
        ({"steps": 3, "micro_batches": 5}, "multiple of micro_batches, got 16 and 5"),
        ({"steps": 3, "log_every": 0}, "log_every must be a whole number from 1 to"),
        ({"steps": 3, "clip_norm": 0.0}, "clip_norm must be a number above 0"),
        ({"steps": 3, "dropout": 1.5}, "dropout must be a number from 0 to 1, got 1.5"),
        ({"steps": 3, "prefix_keep": -0.1}, "prefix_keep must be"),
        ({"steps": 3, "adamw_learning_rate": -1.0}, "adamw_learning_rate must be a number from 0 to 10"),
        ({"steps": 3, "seed": -1}, "seed must be a whole number from 0"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(TrainingError, match=message):
        TrainingConfig(**options)


@pytest.mark.parametrize(
    ("step", "progress", "rate"),
    [(0, 0.0, 0.25), (2, 0.02, 0.75), (3, 0.03, 1), (50, 0.5, 1), (75, 0.75, 0.5), (99, 0.99, 0.02), (100, 1.0, 0)],
)
def test_the_schedule_by_hand(step, progress, rate):
    config = TrainingConfig(steps=100, warmup_steps=4, decay_fraction=0.5)
    assert config.learning_rate_factor(step, progress) == pytest.approx(rate)


def test_no_warm_up_and_no_decay():
    config = TrainingConfig(steps=100, warmup_steps=0, decay_fraction=0.0)
    assert [config.learning_rate_factor(0, 0.0), config.learning_rate_factor(99, 0.99)] == [1, 1]
