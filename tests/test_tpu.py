"""What runs on accelerators lowers for a TPU, which the tests do not have."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_training import CONFIG, TRAINING, CountingBatches, N

from music_ar.decoding.backend import Backend
from music_ar.decoding.decoder import Decoder
from music_ar.decoding.interface import shared_options
from music_ar.decoding.sampling import SamplingOptions
from music_ar.model.config import Compute
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.tokens import vocabulary
from music_ar.training.mesh import make_mesh
from music_ar.training.next_tokens import NextTokens
from music_ar.training.optimizer import build_optimizer
from music_ar.training.step import initial_state, make_train_step

COMPUTE = Compute(dtype="bfloat16")


@pytest.fixture(scope="module")
def model():
    return PerceiverAR(CONFIG, rngs=nnx.Rngs(0), compute=COMPUTE)


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def test_the_training_step_lowers(model):
    config = dataclasses.replace(TRAINING, micro_batches=2)
    graph, params = nnx.split(model, nnx.Param)
    optimizer, mesh = build_optimizer(config), make_mesh(devices=jax.devices()[:1])
    objective = NextTokens(model.config, COMPUTE, config)
    step: Any = make_train_step(graph, config, optimizer, mesh, objective)  # what jax.jit returns
    exported = jax.export.export(step, platforms=["tpu"])(
        shapes(initial_state(params, optimizer, mesh)),
        shapes(next(CountingBatches())),
        jax.ShapeDtypeStruct((), jnp.float32),
        [],
    )
    assert exported.platforms == ("tpu",)
    assert "bf16" in exported.mlir_module()


def test_the_decoding_loop_lowers(model):
    decoder = Decoder(model, Backend(compute=COMPUTE))
    state = decoder.start([np.array([vocabulary.START])], latents=N, seeds=[0], limit_steps=100)
    decode = jax.jit(lambda state, options: decoder.decode(state, options, length=16))
    exported = jax.export.export(decode, platforms=["tpu"])(shapes(state), shapes(shared_options(SamplingOptions())))
    assert exported.platforms == ("tpu",)
    assert "stablehlo.while" in exported.mlir_module()
