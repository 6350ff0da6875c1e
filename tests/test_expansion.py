"""An expanded model computes what the smaller one did, and all that is new learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model
from flax import nnx
from reference_model import SMALL

from music_ar.model.expansion import expand
from music_ar.tokens import vocabulary
from music_ar.training.losses import token_nll

CONFIG = dataclasses.replace(SMALL, retrieval_notes=12)
LARGER = dataclasses.replace(CONFIG, width=20, layers=3, heads=10, kv_heads=5, time_heads=2, hidden=28, label_size=3)
FEATURES = ("keyboard", "retrieval")  # most of which no window shows

# Any events, and notes that repeat, so that something is retrieved.
TOKENS = np.stack(
    [
        np.random.default_rng(0).integers(0, vocabulary.EVENT_CLASSES, CONFIG.window),
        *np.tile(np.random.default_rng(1).integers(40, 90, (2, 6)), CONFIG.window)[:, : CONFIG.window],
    ]
).astype(np.int32)


@jax.jit
def logits_of(model):
    labels = jnp.ones((3, 3)) if model.config.label_size else None
    return model(jnp.asarray(TOKENS), labels_BxC=labels)


@pytest.fixture(scope="module")
def trained():
    """A model, and its logits."""
    model = noisy_model(CONFIG)
    return model, logits_of(model)


@pytest.mark.parametrize(
    "sizes",
    [
        {"width": 20},
        {"layers": 3},
        {"heads": 6, "kv_heads": 3},
        {"heads": 6, "kv_heads": 3, "time_heads": 2},
        {"hidden": 28},
        {"label_size": 3},
        {"vocabulary_size": vocabulary.INFILL_VOCABULARY_SIZE},
        {name: getattr(LARGER, name) for name in ("width", "layers", "heads", "kv_heads", "time_heads", "hidden")},
    ],
)
def test_an_expanded_model_computes_the_same(trained, sizes):
    model, logits = trained
    larger = expand(model, dataclasses.replace(CONFIG, **sizes), rngs=nnx.Rngs(1))
    assert larger.config == dataclasses.replace(CONFIG, **sizes)
    np.testing.assert_allclose(logits_of(larger)[..., : vocabulary.VOCABULARY_SIZE], logits, atol=2e-4)


def test_all_that_is_new_learns_after_some_steps(trained):
    graph, params = nnx.split(expand(trained[0], LARGER, rngs=nnx.Rngs(1)), nnx.Param)

    @jax.jit
    @jax.grad
    def gradient(params):
        logits = nnx.merge(graph, params)(jnp.asarray(TOKENS), labels_BxC=jnp.eye(3))
        return token_nll(logits, jnp.asarray(TOKENS[:, -8:])).mean()

    for _ in range(4):  # what reads channels that were zero gets its gradient a step later
        grads = gradient(params)
        params = jax.tree.map(
            lambda leaf, grad: leaf - 0.1 * grad / jnp.maximum(jnp.abs(grad).max(), 1e-12), params, grads
        )
    for path, grad in nnx.to_flat_state(gradient(params)):
        if path[-1] == "kernel":
            moved = np.abs(np.asarray(grad[...])) > 0
            assert moved.any(axis=0).mean() > 0.5, path
            assert moved.any(axis=1).mean() > (0 if path[0] in FEATURES else 0.5), path


def test_new_tokens_are_as_unlikely_as_start(trained):
    sizes = {"vocabulary_size": vocabulary.INFILL_VOCABULARY_SIZE, "width": 20}
    logits = logits_of(expand(trained[0], dataclasses.replace(CONFIG, **sizes), rngs=nnx.Rngs(1)))
    for token in (vocabulary.SEPARATOR, vocabulary.MIDDLE, vocabulary.END_OF_GAP):
        np.testing.assert_allclose(logits[..., token], logits[..., vocabulary.START], atol=1e-5)


def test_a_model_of_the_same_sizes_is_itself(trained):
    model, _ = trained
    assert expand(model, CONFIG, rngs=nnx.Rngs(1)) is model


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 8}, "width 12 -> 8"),
        ({"heads": 8}, "heads 4 -> 8"),
        ({"conv_width": 4, "layers": 3}, "layers 2 -> 3, conv_width 3 -> 4"),
        ({"kv_heads": 4, "heads": 8, "time_heads": 4}, "heads 4 -> 8, kv_heads 2 -> 4, time_heads 1 -> 4"),
        ({"context": 32}, "context 16 -> 32"),
    ],
)
def test_other_changes_are_refused_and_named(trained, sizes, message):
    with pytest.raises(ValueError, match=f"only width, layers, .* may increase, .*; differing sizes: {message}$"):
        expand(trained[0], dataclasses.replace(CONFIG, **sizes), rngs=nnx.Rngs(1))


def test_labels_of_another_size_are_refused():
    labeled = noisy_model(dataclasses.replace(CONFIG, label_size=3))
    with pytest.raises(ValueError, match="label_size from 0; differing sizes: label_size 3 -> 4"):
        expand(labeled, dataclasses.replace(CONFIG, label_size=4), rngs=nnx.Rngs(1))
