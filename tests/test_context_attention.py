"""Attention to the context in two parts equals one masked attention: values and all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_ar.model.config import Compute
from music_ar.model.context_attention import attend_context

HEADS, KEY_HEADS, SIZE = 4, 2, 8


def masked(prefix, q, k, v):
    """One softmax over the first `prefix` keys of each row and the latents up to each query."""
    latents = jnp.arange(q.shape[1])[None, :, None]
    key = jnp.arange(k.shape[1])[None, None]
    visible = key <= prefix[:, None, None] + latents
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None])


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(attention, prefix, q, k, v, probe):
    out, pull = jax.vjp(functools.partial(attention, prefix), q, k, v)
    return out, *pull(probe)


def in_parts(prefix, q, k, v):
    return attend_context(q, k, v, prefix, Compute())


# The prefix: none in some rows; shorter than a block, several blocks, several parts.
@pytest.mark.parametrize(
    ("latents", "longest", "prefix"),
    [
        (4, 5, [5, 0, 3]),
        (3, 1, [1, 0]),
        (7, 2500, [2500, 1024, 1]),
        (2, 40_000, [40_000, 17_000]),
        (1100, 3, [3, 0]),
    ],
)
def test_equals_one_masked_attention(latents, longest, prefix):
    rng = np.random.default_rng(latents)
    sizes = [(latents, HEADS), (longest + latents, KEY_HEADS), (longest + latents, KEY_HEADS), (latents, HEADS)]
    q, k, v, probe = (jnp.asarray(rng.normal(size=(len(prefix), *size, SIZE)), jnp.float32) for size in sizes)
    got = with_gradients(in_parts, jnp.array(prefix), 3 * q, k, v, probe)
    expected = with_gradients(masked, jnp.array(prefix), 3 * q, k, v, probe)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * float(jnp.abs(other).max()))


def test_what_is_not_seen_has_no_gradient():
    q, k = jnp.ones((2, 3, HEADS, SIZE)), jnp.ones((2, 9, KEY_HEADS, SIZE))
    *_, k_gradient, v_gradient = with_gradients(
        in_parts, jnp.array([6, 2]), q, k, k * jnp.arange(9)[None, :, None, None], q
    )
    assert np.any(v_gradient[0], axis=(1, 2)).all()
    np.testing.assert_array_equal(np.any(v_gradient[1], axis=(1, 2)), np.arange(9) < 5)
    assert not np.any(k_gradient[1, 5:])


def test_memory_is_linear_in_the_context():
    def temporary_bytes(longest):
        shapes = [(1, 64, HEADS, SIZE), *[(1, longest + 64, KEY_HEADS, SIZE)] * 2, (1, 64, HEADS, SIZE)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
        program = with_gradients.lower(in_parts, lengths, *arrays).compile()
        analysis = program.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary_bytes(65_536) < 2.2 * temporary_bytes(32_768)
    square = 64 * 65_536 * HEADS * 4
    assert temporary_bytes(65_536) < square
