"""The estimate of a training step's memory, and what is refused by it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tiny_training import EXACT, run

from music_ar.model.config import PRESETS, Compute, ModelConfig
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.training import memory
from music_ar.training.config import TrainingConfig, TrainingError
from music_ar.training.memory import check_memory, step_memory
from music_ar.training.mesh import make_mesh
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
    train_step: Any = make_train_step(graph, ONE_WINDOW, optimizer, mesh)  # what jax.jit returns
    lowered = train_step.lower(state, batch, jax.ShapeDtypeStruct((), jnp.float32), [])
    analysis = lowered.compile().memory_analysis()
    found = step_memory(sizes, Compute(), ONE_WINDOW, ONE).total
    assert 1 / 1.3 < found / (analysis.argument_size_in_bytes + analysis.temp_size_in_bytes) < 1.3


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


def test_unknown_memory_refuses_nothing(monkeypatch):
    monkeypatch.setattr(memory, "usable_memory", lambda: None)
    check_memory(dataclasses.replace(BARE, context=2**20), CUDNN, ONE_WINDOW, make_mesh())
