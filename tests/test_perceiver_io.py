"""Perceiver IO: a reference in NumPy, what sees what, and what does not matter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import with_noise
from flax import nnx
from reference_model import parameters

from music_ar.model.perceiver_io import PerceiverIO, PerceiverIOConfig

CONFIG = PerceiverIOConfig(
    inputs=5, queries=3, outputs=4, latents=6, width=12, layers=1, reads=2, heads=4, kv_heads=2, head_size=4, hidden=20
)
SIZES = pytest.mark.parametrize(
    "sizes",
    [{}, {"shared": True, "reads": 3}, {"layers": 2, "reads": 1}],
    ids=["iterated", "shared weights", "one read"],
)
MASK = np.array([[True, True, False, True, True], [False, False, True, False, False]])


@functools.cache
def model_of(config):
    return with_noise(PerceiverIO(config, rngs=nnx.Rngs(0)))


def data(rng=0):
    """Inputs [B, M, C] and queries [B, Q, R]."""
    rng = np.random.default_rng(rng)
    return jnp.asarray(rng.normal(size=(2, 5, 5)), "float32"), jnp.asarray(rng.normal(size=(2, 2, 3)), "float32")


def reference(model, inputs, mask, queries):
    """Outputs [Q, O] of one row, by the formulas of the papers."""
    config, params = model.config, parameters(model)

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params[f"{name}.scale"]

    def heads(x, count):
        return x.reshape(len(x), count, config.head_size)

    def block(x, name, read):
        group = config.heads // config.kv_heads
        q = norm(
            heads(norm(x, f"{name}.attention_norm") @ params[f"{name}.query.kernel"], config.heads),
            f"{name}.query_norm",
        )
        k = norm(heads(read @ params[f"{name}.key.kernel"], config.kv_heads), f"{name}.key_norm")
        v = heads(read @ params[f"{name}.value.kernel"], config.kv_heads)
        scores = np.einsum("qhk,shk->hqs", q, np.repeat(k, group, axis=1)) / np.sqrt(config.head_size)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        attended = np.einsum("hqs,shk->qhk", weights, np.repeat(v, group, axis=1))
        x = x + attended.reshape(len(x), -1) @ params[f"{name}.output.kernel"]
        hidden = norm(x, f"{name}.feed_forward_norm") @ params[f"{name}.expand.kernel"]
        return x + np.maximum(hidden, 0) ** 2 @ params[f"{name}.contract.kernel"]

    inputs, queries = np.asarray(inputs, np.float64), np.asarray(queries, np.float64)
    read = norm(inputs[mask] @ params["input.kernel"], "input_norm")  # hidden inputs are not there
    x = params["latents"]
    for number in range(config.reads):
        group = min(number, 1) if config.shared else number
        x = block(x, f"cross.{group}", read)
        for layer in range(config.layers):
            name = f"blocks.{group}.{layer}"
            x = block(x, name, norm(x, f"{name}.attention_norm"))
    outputs = block(queries @ params["query.kernel"], "decoder", norm(x, "latent_norm"))
    return norm(outputs, "output_norm") @ params["head.kernel"]


@SIZES
def test_it_computes_what_the_papers_say(sizes):
    model, (inputs, queries) = model_of(dataclasses.replace(CONFIG, **sizes)), data()
    found = model(inputs, jnp.asarray(MASK), queries)
    for row in range(2):
        expected = reference(model, inputs[row], MASK[row], queries[row])
        np.testing.assert_allclose(found[row], expected, rtol=2e-3, atol=2e-3)


def test_shared_weights_are_kept_once():
    def blocks(**sizes):
        model = PerceiverIO(dataclasses.replace(CONFIG, **sizes), rngs=nnx.Rngs(0))
        return len(model.cross), sum(len(group) for group in model.blocks)

    found = [blocks(reads=3), blocks(shared=True, reads=3), blocks(shared=True, reads=9), blocks(shared=True, reads=1)]
    assert found == [(3, 3), (2, 2), (2, 2), (1, 1)]


def test_what_each_output_sees():
    """Row b's outputs depend on row b's inputs where the mask is true, and each on its own query only."""
    model, (inputs, queries) = model_of(CONFIG), data()

    def outputs(inputs, queries):
        return model(inputs, jnp.asarray(MASK), queries)

    by_input, by_query = jax.jit(jax.jacobian(outputs, argnums=(0, 1)))(inputs, queries)
    of_inputs = np.abs(by_input).sum(axis=(2, 5)) > 0  # [B, Q, B, M]
    own, other = [[1, 1, 0, 1, 1], [0, 0, 0, 0, 0]], [[0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]
    assert of_inputs.astype(int).tolist() == [[own, own], [other, other]]
    of_queries = np.abs(by_query).sum(axis=(2, 5)) > 0  # [B, Q, B, Q]
    assert of_queries.astype(int).tolist() == [
        [[[1, 0], [0, 0]], [[0, 1], [0, 0]]],
        [[[0, 0], [1, 0]], [[0, 0], [0, 1]]],
    ]


def test_the_order_of_inputs_and_queries_does_not_matter():
    model, (inputs, queries) = model_of(CONFIG), data()
    order = [3, 0, 4, 2, 1]
    outputs = model(inputs, jnp.asarray(MASK), queries)
    permuted = model(inputs[:, order], jnp.asarray(MASK[:, order]), queries[:, ::-1])
    np.testing.assert_allclose(permuted[:, ::-1], outputs, rtol=1e-4, atol=1e-5)


def test_what_the_mask_hides_does_not_matter():
    model, (inputs, queries) = model_of(CONFIG), data()
    longer = jnp.concatenate([inputs, jnp.full((2, 3, 5), 1e6)], axis=1)
    mask = np.concatenate([MASK, np.zeros((2, 3), bool)], axis=1)
    outputs = model(inputs, jnp.asarray(MASK), queries)
    np.testing.assert_allclose(model(longer, jnp.asarray(mask), queries), outputs, rtol=1e-4, atol=1e-5)


def test_the_outputs_of_a_new_model_depend_on_its_inputs():
    """Otherwise a contrastive loss would have no gradient."""
    model = PerceiverIO(CONFIG, rngs=nnx.Rngs(0))
    inputs, queries = data()
    one, other = (model(each, jnp.ones((2, 5), bool), queries) for each in (inputs, inputs + 1))
    assert float(jnp.abs(one - other).max()) > 1e-3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"latents": 0}, "latents must be a whole number from 1 to"),
        ({"heads": 3, "kv_heads": 2}, "heads must be a multiple of kv_heads, got 3 and 2"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **sizes)
