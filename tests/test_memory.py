"""The estimate of a training step's memory, and what is refused by it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_training import EXACT, noisy, run

from music_ar.evaluation import likelihood
from music_ar.evaluation.likelihood import ScoringConfig, score
from music_ar.evaluation.memory import ScoringError, window_bytes, windows_at_once
from music_ar.model.config import PRESETS, Compute, ModelConfig
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.tokens import vocabulary
from music_ar.training import memory
from music_ar.training.config import TrainingConfig, TrainingError
from music_ar.training.memory import check_memory, step_memory
from music_ar.training.mesh import make_mesh
from music_ar.training.next_tokens import NextTokens
from music_ar.training.optimizer import build_optimizer
from music_ar.training.step import TrainState, make_train_step

ONE = {"data": 1, "fsdp": 1, "sequence": 1}
CUDNN = Compute(dtype="bfloat16", attention="cudnn")
BARE = dataclasses.replace(PRESETS["small"], latents=1024, layers=6, onsets=0, retrieval_notes=0)
ONE_WINDOW = TrainingConfig(steps=1, batch_size=1, dropout=0.0, prefix_keep=1.0)


@pytest.mark.parametrize(
    ("context", "measured_gb"), [(4096, 0.46), (16_384, 0.5), (65_536, 0.87), (131_072, 1.36), (1_048_576, 7.9)]
)
def test_the_estimate_is_near_the_peaks_measured_on_a_gpu(context, measured_gb):
    """docs/results/long-context.md; the benchmark keeps no best average."""
    found = step_memory(dataclasses.replace(BARE, context=context), CUDNN, ONE_WINDOW, ONE).total
    assert 1 / 1.3 < found / 1e9 / measured_gb < 1.3


@pytest.mark.slow
def test_the_estimate_is_near_what_xla_says_of_a_step():
    sizes = ModelConfig(context=4096, latents=256, width=128, layers=2, heads=4, kv_heads=2, head_size=32, hidden=384)
    mesh = make_mesh(devices=jax.devices()[:1])
    graph, params = nnx.split(nnx.eval_shape(lambda: PerceiverAR(sizes, rngs=nnx.Rngs(0))), nnx.Param)
    optimizer = build_optimizer(ONE_WINDOW, mesh)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step, params, params, jax.eval_shape(optimizer.init, params))
    batch = {
        "tokens": jax.ShapeDtypeStruct((1, sizes.window + 1), jnp.int32),
        "weights": jax.ShapeDtypeStruct((1, sizes.latents), jnp.float32),
    }
    objective = NextTokens(sizes, Compute(), ONE_WINDOW)
    train_step: Any = make_train_step(graph, ONE_WINDOW, optimizer, mesh, objective)  # what jax.jit returns
    lowered = train_step.lower(state, batch, jax.ShapeDtypeStruct((), jnp.float32), [])
    analysis = lowered.compile().memory_analysis()
    found = step_memory(sizes, Compute(), ONE_WINDOW, ONE).total
    # So small a step is estimated less closely than those of real models.
    assert 1 / 1.4 < found / (analysis.argument_size_in_bytes + analysis.temp_size_in_bytes) < 1.4


def test_each_axis_splits_its_part():
    config = TrainingConfig(steps=1, batch_size=8, prefix_keep=1.0)
    model = dataclasses.replace(PRESETS["large"], context=2**17, retrieval_notes=0)
    whole, data, fsdp, sequence = (
        step_memory(model, CUDNN, config, ONE | axes) for axes in ({}, {"data": 2}, {"fsdp": 2}, {"sequence": 2})
    )
    assert (data.model, sequence.model) == (whole.model, whole.model)
    assert data.windows == fsdp.windows == pytest.approx(whole.windows / 2)
    assert fsdp.model < whole.model
    assert 0.5 < sequence.windows / whole.windows < 0.7  # the latents are on each device


def refusal(monkeypatch, available, model, config):
    monkeypatch.setattr(memory, "usable_memory", lambda: available)
    with pytest.raises(TrainingError) as error:
        check_memory(model, CUDNN, config, make_mesh(devices=jax.devices()[:1]))
    return str(error.value)


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch):
    model = dataclasses.replace(BARE, context=2**20)
    config = dataclasses.replace(ONE_WINDOW, batch_size=16)
    assert refusal(monkeypatch, 80 * 10**9, model, config) == (
        "training needs about 127 GB on the device, which has 80 GB: 0.391 GB for the model and its optimizer, 126 GB "
        "for windows of 1,048,576 tokens. What would fit: 2 micro-batches, a batch of 10, a context of 524,288 "
        "tokens or more devices, split by fsdp=2"
    )
    for changed in (
        (model, dataclasses.replace(config, micro_batches=2)),
        (model, dataclasses.replace(config, batch_size=10)),
        (dataclasses.replace(model, context=524_288), config),
    ):
        check_memory(changed[0], CUDNN, changed[1], make_mesh(devices=jax.devices()[:1]))


def test_a_model_that_is_too_large_has_no_other_way(monkeypatch):
    assert refusal(monkeypatch, 10**9, PRESETS["large"], ONE_WINDOW).endswith("What would fit: a smaller model")


def test_a_run_that_does_not_fit_leaves_nothing(monkeypatch, tmp_path, compilations):
    monkeypatch.setattr(memory, "usable_memory", lambda: 1000)
    with compilations() as compiled, pytest.raises(TrainingError, match=r"needs about .* which has 1e-06 GB"):
        run(tmp_path, EXACT)
    assert "step" not in compiled
    assert not any(tmp_path.iterdir())


SCORED = [  # context, width, layers, heads, windows; temporary MB by XLA's analysis on a CPU
    (4096, 128, 2, 4, 1, 12.3),
    (65_536, 128, 2, 4, 1, 102.1),
    (1024, 128, 4, 4, 4, 69.4),
    (1024, 512, 4, 8, 2, 70.4),
]


@pytest.mark.parametrize(("context", "width", "layers", "heads", "windows", "measured_mb"), SCORED)
def test_the_memory_of_scoring_is_near_what_xla_says(context, width, layers, heads, windows, measured_mb):
    sizes = {"head_size": width // heads, "kv_heads": 2, "hidden": 3 * width, "conv_width": 8}
    model = ModelConfig(context=context, latents=512, width=width, layers=layers, heads=heads, **sizes)
    latents = 256 if width == 128 and layers == 2 else 512
    found = windows * window_bytes(model, Compute(), context, latents)
    assert 1 / 1.3 < found / 1e6 / measured_mb < 1.3


def test_as_many_windows_are_scored_at_once_as_fit(monkeypatch):
    one = window_bytes(BARE, CUDNN, 4096, 1024)
    for free, expected in ((100 * one, 32), (10 * one, 10), (one, 1), (0.8 * one, 1), (None, 32)):
        monkeypatch.setattr(memory, "usable_memory", lambda free=free: free if free is None else int(free))
        assert windows_at_once(BARE, CUDNN, 4096, 1024, 32) == expected


def test_a_window_that_cannot_be_scored_is_refused_with_what_would_fit(monkeypatch):
    monkeypatch.setattr(memory, "usable_memory", lambda: 10**9)
    with pytest.raises(ScoringError, match=r"about 2.7 GB .* has 1 GB left\. What would fit: a context of 262,144 tok"):
        windows_at_once(BARE, CUDNN, 2**20, 1024, 32)
    monkeypatch.setattr(memory, "usable_memory", lambda: 10**6)
    with pytest.raises(ScoringError, match=r"has 0.001 GB left\. Use fewer latents, or a smaller model"):
        windows_at_once(BARE, CUDNN, 2**20, 1024, 32)


def test_scores_do_not_depend_on_how_many_windows_fit(monkeypatch):
    pieces = [np.r_[vocabulary.START, np.arange(30), vocabulary.END].astype(np.int32)]
    config = ScoringConfig(context=12, latents=8, stride=4)
    expected = score(noisy(), pieces, config)
    monkeypatch.setattr(likelihood, "windows_at_once", lambda *_: 3)
    assert score(noisy(), pieces, config).nll == pytest.approx(expected.nll, rel=1e-5)


def test_unknown_memory_refuses_nothing(monkeypatch):
    monkeypatch.setattr(memory, "usable_memory", lambda: None)
    check_memory(dataclasses.replace(BARE, context=2**20), CUDNN, ONE_WINDOW, make_mesh())
