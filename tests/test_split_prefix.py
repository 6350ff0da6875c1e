"""A prefix that is split over devices gives what a whole one does: values, gradients, padding, prefix dropout.

`jax.vmap` with the name of an axis stands for the devices of a mesh axis: collectives work in it as on real ones.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model
from flax import nnx
from reference_model import SMALL
from test_context_attention import HEADS, KEY_HEADS, SIZE, in_parts, with_gradients

from music_ar.model.config import PRESETS, Compute
from music_ar.model.context_attention import attend_context
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.tokens import vocabulary


def on_devices(devices, function):
    """Calls a function with the same arguments on each device of the axis "sequence"; results get a leading axis."""

    def of_all(*arguments):
        return jax.vmap(lambda _: function(*arguments), axis_name="sequence")(jnp.arange(devices))

    return jax.jit(of_all)


def split_attention(devices, latents, prefix, q, k, v):
    """`attend_context` of one device: its share of the prefix, then the latents of each row."""
    longest = k.shape[1] - latents
    share = -(-longest // devices)
    start = share * jax.lax.axis_index("sequence")
    at = jnp.arange(latents)[None] + prefix[:, None]

    def own(x):
        padded = jnp.pad(x[:, :longest], ((0, 0), (0, share * devices - longest), (0, 0), (0, 0)))
        own_share = jax.lax.dynamic_slice_in_dim(padded, start, share, axis=1)
        return jnp.concatenate([own_share, jnp.take_along_axis(x, at[..., None, None], axis=1)], axis=1)

    return attend_context(q, own(k), own(v), jnp.clip(prefix - start, 0, share), Compute(), "sequence")


@pytest.mark.parametrize(
    ("devices", "latents", "longest", "prefix"),
    [(2, 4, 5, [5, 0, 3]), (3, 7, 2500, [2500, 1024, 0]), (2, 2, 40_000, [40_000, 17_000])],
)
def test_attention_equals_that_to_the_whole_prefix(devices, latents, longest, prefix):
    rng = np.random.default_rng(latents)
    sizes = [(latents, HEADS), (longest + latents, KEY_HEADS), (longest + latents, KEY_HEADS), (latents, HEADS)]
    q, k, v, probe = (jnp.asarray(rng.normal(size=(len(prefix), *size, SIZE)), jnp.float32) for size in sizes)

    def with_shares_of_gradients(prefix, q, k, v, probe):
        out, pull = jax.vjp(functools.partial(split_attention, devices, latents, prefix), q, k, v)
        return out, *pull(probe)

    arguments = jnp.array(prefix), 3 * q, k, v, probe
    out, *shares = on_devices(devices, with_shares_of_gradients)(*arguments)
    expected_out, *expected = with_gradients(in_parts, *arguments)
    for of_device in out:
        np.testing.assert_allclose(of_device, expected_out, atol=2e-5 * float(jnp.abs(expected_out).max()))
    # The loss of each device is the same, so the sum of their gradients is that many times the gradient.
    for of_devices, gradient in zip(shares, expected, strict=True):
        np.testing.assert_allclose(
            of_devices.sum(axis=0) / devices, gradient, atol=2e-5 * float(jnp.abs(gradient).max())
        )


@functools.cache
def model_parts():
    return nnx.split(noisy_model(dataclasses.replace(SMALL, layers=1)), nnx.Param)


def loss(params, tokens, **options):
    model = nnx.merge(model_parts()[0], params)
    logits = model(tokens, latents=5, **options)
    return jnp.square(jax.nn.log_softmax(logits)).sum(where=(tokens[:, -5:] != vocabulary.PAD)[..., None]) / 1000


@pytest.mark.parametrize(("devices", "kept"), [pytest.param(2, None, marks=pytest.mark.slow), (3, 6)])
def test_the_model_equals_that_with_the_whole_prefix(devices, kept):
    """One row is full, one is partly padding, and one has less than its latents.

    The model has a convolution, keyboard features and time heads.
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary.EVENT_CLASSES, (3, SMALL.context)).astype(np.int32)
    tokens[1, :7], tokens[2, :-3] = vocabulary.PAD, vocabulary.PAD
    options = {"kept_prefix": kept, "dropout": 0.2, "key": jax.random.key(1)}
    _, params = model_parts()
    whole = jax.jit(jax.value_and_grad(functools.partial(loss, **options)))
    split = jax.value_and_grad(functools.partial(loss, **options, split_over="sequence"))
    value, gradients = whole(params, jnp.asarray(tokens))
    values, shares = on_devices(devices, split)(params, jnp.asarray(tokens))
    np.testing.assert_allclose(values, value, rtol=1e-5)
    for of_devices, gradient in zip(jax.tree.leaves(shares), jax.tree.leaves(gradients), strict=True):
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(of_devices.sum(axis=0) / devices, gradient, atol=1e-4 * max(scale, 1e-3))


@pytest.mark.parametrize("preset", ["small-xl", "tiny"])
def test_what_has_no_prefix_cannot_be_split(preset):
    model = nnx.eval_shape(lambda: PerceiverAR(PRESETS[preset], rngs=nnx.Rngs(0)))
    latents = PRESETS[preset].latents
    tokens = jax.ShapeDtypeStruct((1, latents), jnp.int32)
    with pytest.raises(ValueError, match=f"no prefix to split over devices: all {latents} inputs are latents"):
        jax.eval_shape(functools.partial(nnx.merge(*nnx.split(model)), split_over="sequence"), tokens)
