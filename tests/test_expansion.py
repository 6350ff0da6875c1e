"""A grown model computes what the smaller one did, and all that is new learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model
from flax import nnx
from test_model import CONFIG as WITHOUT_RECALL

from music_ar.model.expansion import grown
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.tokens import vocabulary
from music_ar.training.losses import token_nats

CONFIG = dataclasses.replace(WITHOUT_RECALL, recall=12)
LARGER = dataclasses.replace(CONFIG, width=20, layers=3, heads=10, kv_heads=5, time_heads=2, hidden=28, view_size=3)

TOLD = ("keyboard", "recall")  # most of whose features no window shows


def tokens_of(model):
    """Any events, and notes that return, so that something is recalled."""
    rng, length = np.random.default_rng(0), model.config.window
    return jnp.asarray(
        np.stack(
            [
                rng.integers(0, vocabulary.EVENT_CLASSES, length),
                *np.tile(rng.integers(40, 90, (2, 6)), length)[:, :length],
            ]
        ),
        jnp.int32,
    )


@pytest.mark.parametrize(
    "sizes",
    [
        {"width": 20},
        {"layers": 3},
        {"heads": 6, "kv_heads": 3},
        {"heads": 6, "kv_heads": 3, "time_heads": 2},
        {"hidden": 28},
        {"view_size": 3},
        {name: getattr(LARGER, name) for name in ("width", "layers", "heads", "kv_heads", "time_heads", "hidden")},
    ],
)
def test_a_grown_model_computes_the_same(sizes):
    model = noisy_model(CONFIG)
    larger = grown(model, dataclasses.replace(CONFIG, **sizes), rngs=nnx.Rngs(1))
    assert larger.config == dataclasses.replace(CONFIG, **sizes)
    view = jnp.ones((3, 3)) if larger.config.view_size else None
    np.testing.assert_allclose(larger(tokens_of(model), view_BxC=view), model(tokens_of(model)), atol=2e-4)


def test_all_that_is_new_learns_after_some_steps():
    model = grown(noisy_model(CONFIG), LARGER, rngs=nnx.Rngs(1))
    tokens = tokens_of(model)
    graph, params = nnx.split(model, nnx.Param)

    @jax.jit
    @jax.grad
    def gradient(params):
        logits = nnx.merge(graph, params)(tokens, view_BxC=jnp.eye(3))
        return token_nats(logits, tokens[:, -8:]).mean()

    for _ in range(4):  # what is read by what was zero gets its gradient a step later
        grads = gradient(params)
        params = jax.tree.map(
            lambda leaf, grad: leaf - 0.1 * grad / jnp.maximum(jnp.abs(grad).max(), 1e-12), params, grads
        )
    for path, grad in nnx.to_flat_state(gradient(params)):
        if path[-1] == "kernel":
            moved = jnp.abs(grad[...]) > 0
            assert moved.any(axis=0).mean() > 0.5, path
            assert moved.any(axis=1).mean() > (0 if path[0] in TOLD else 0.5), path


def test_a_model_of_the_same_sizes_is_itself():
    model = noisy_model(CONFIG)
    assert grown(model, CONFIG, rngs=nnx.Rngs(1)) is model


@pytest.mark.parametrize(
    "sizes",
    [
        {"width": 8},
        {"heads": 8},
        {"conv_width": 4},
        {"kv_heads": 4, "heads": 8, "time_heads": 4},
        {"context": 32},
    ],
)
def test_what_cannot_be_grown_into_is_refused(sizes):
    with pytest.raises(ValueError, match="a model can grow in width, layers"):
        grown(noisy_model(CONFIG), dataclasses.replace(CONFIG, **sizes), rngs=nnx.Rngs(1))


def test_views_of_another_size_are_refused():
    told = grown(noisy_model(CONFIG), dataclasses.replace(CONFIG, view_size=3), rngs=nnx.Rngs(1))
    assert isinstance(told, PerceiverAR)
    with pytest.raises(ValueError, match="be told views if it was not"):
        grown(told, dataclasses.replace(CONFIG, view_size=4), rngs=nnx.Rngs(1))
