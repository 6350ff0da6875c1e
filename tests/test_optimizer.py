"""The optimizer: Muon for hidden matrices, AdamW for the rest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model
from flax import nnx
from tiny_training import CONFIG, TRAINING

from music_ar.training.optimizer import build_optimizer

MATRICES = {
    f"{block}.{name}.kernel"
    for block in ("cross", "blocks.0")
    for name in ("query", "key", "value", "output", "expand", "contract")
} | {"latent.kernel", "keyboard.kernel", "retrieval.kernel", "label.kernel"}
WITH_FEATURES = {"onsets": 2, "retrieval_notes": 12, "label_size": 3}


def named(tree):
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(tree)}


@pytest.fixture(scope="module")
def params():
    return nnx.state(noisy_model(dataclasses.replace(CONFIG, **WITH_FEATURES)), nnx.Param)


@pytest.fixture(scope="module")
def muon(params):
    """The optimizer's compiled `update`, and its state at the start."""
    optimizer = build_optimizer(TRAINING)
    return jax.jit(optimizer.update), jax.jit(optimizer.init)(params)


def random_like(params, seed, norm):
    """Gradients of a given global norm."""
    rng = np.random.default_rng(seed)
    grads = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
    scale = norm / np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(grads)))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf * np.float32(scale)), grads)


def test_matrices_alone_decay(params, muon):
    update, state = muon
    updates, _ = update(jax.tree.map(jnp.zeros_like, params), state, params)
    for name, moved in named(updates).items():
        decay = TRAINING.muon_learning_rate * TRAINING.weight_decay if name in MATRICES else 0
        np.testing.assert_allclose(moved, -decay * named(params)[name], rtol=1e-5, atol=1e-9, err_msg=name)


def test_muon_makes_steps_of_matrices_orthogonal_and_adamw_moves_the_rest(params, muon):
    update, state = muon
    updates, _ = update(random_like(params, 0, 1.0), state, jax.tree.map(jnp.zeros_like, params))
    assert named(updates).keys() > MATRICES
    for name, moved in named(updates).items():
        if name in MATRICES:
            rows, columns = moved.shape
            sizes = np.linalg.svd(moved, compute_uv=False) / TRAINING.muon_learning_rate
            sizes /= np.sqrt(max(1, columns / rows))
            assert (sizes > 0.6).all(), name
            assert (sizes < 1.3).all(), name
        else:  # Adam's first step has the same size everywhere, here with Nesterov momentum
            size = np.abs(moved).mean()
            np.testing.assert_allclose(np.abs(moved), size, rtol=0.05, err_msg=name)
            assert 1 <= size / TRAINING.adamw_learning_rate < 1.5


def test_gradients_are_clipped_by_their_norm(params, muon):
    update, start = muon

    def second_update(norm):
        """The step after a gradient of this norm: moments remember how large it was."""
        _, state = update(random_like(params, 0, norm), start, params)
        return named(update(random_like(params, 1, 1.0), state, params)[0])

    clipped, at_the_limit, below = (second_update(norm) for norm in (700.0, 1.0, 0.3))
    for name, moved in clipped.items():
        np.testing.assert_allclose(moved, at_the_limit[name], rtol=1e-2, atol=1e-5)
    assert max(np.abs(clipped[name] - below[name]).max() for name in clipped) > 1e-4
