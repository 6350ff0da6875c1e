"""The attention kernel equals attention written down plainly; here it is interpreted, on a CPU.

`test_backend` compares whole steps with it. The last test translates the kernel for a GPU, without one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from music_ar.decoding.backend import Backend
from music_ar.decoding.decoder import Decoder
from music_ar.decoding.interface import shared_options
from music_ar.decoding.sampling import SamplingOptions
from music_ar.decoding.windows import WINDOWS
from music_ar.model.attention import head_runs, rotate_heads
from music_ar.model.config import PRESETS, Compute, ModelConfig
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.tokens import vocabulary

pytest.importorskip("jax.experimental.pallas.triton")  # JAX has deprecated it

from music_ar.decoding.pallas_kernel import LEAST_BLOCK, Heads, Tiling, attend, rotations

CONFIG = ModelConfig(context=64, latents=16, heads=6, kv_heads=2, head_size=16, time_heads=1)
K, R, CACHES = CONFIG.head_size, 96, 4
# In the middle with a few before it; at the end with all before it; at the beginning, wrapped around; with none.
SLOTS = np.array([[41, 7], [95, 95], [2, 40], [10, -1]], np.int32)
POSITIONS = np.array([[41, 500], [95, 3000], [98, 77], [10, 0]], np.int32)  # in tokens and in time


def expected(config, arrays, k_XxGxRxK, v_XxGxRxK):
    """What each query finds, and the caches with the new entries, in float64 but for rotation."""
    heads, kv_heads = config.heads, config.kv_heads
    q_XxHxK, k_XxGxK, v_XxGxK, scales = arrays

    def rotated(x, scale, count):
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale
        positions_Xx1xP = jnp.asarray(POSITIONS)[:, None]
        return np.asarray(
            rotate_heads(config, jnp.asarray(x, jnp.float32)[:, None], positions_Xx1xP, head_runs(config, count))
        )[:, 0]

    q, k = rotated(q_XxHxK, scales[0], heads), rotated(k_XxGxK, scales[1], kv_heads)
    keys, values, found = k_XxGxRxK.copy(), v_XxGxRxK.copy(), np.zeros(q.shape)
    for x, (slot, before) in enumerate(SLOTS):
        keys[x, :, slot], values[x, :, slot] = k[x], v_XxGxK[x]
        visible = [(slot - back) % R for back in range(max(before, 0) + 1)]
        for head in range(heads):
            of = head // (heads // kv_heads)
            scores = keys[x, of, visible] @ q[x, head] / np.sqrt(K)
            weights = np.exp(scores - scores.max())
            found[x, head] = weights @ values[x, of, visible] / weights.sum()
    return found, keys, values


@functools.partial(jax.jit, static_argnames=("config", "fused", "tiling"))
def interpreted(config, arrays, k_ExRxK, v_ExRxK, *, fused, tiling):
    """The kernel, with one array of queries, keys and values as in self blocks, or three as in the cross block."""
    H, G = config.heads, config.kv_heads
    q, k, v, scale_2xK = arrays
    if fused:
        array, scale = jnp.concatenate([q, k, v], axis=1), scale_2xK[np.repeat([0, 1], [H, G])]
        q, k, v = Heads(array, scale=scale), Heads(array, H, scale, H), Heads(array, H + G)
    else:
        q, k, v = Heads(q, scale=scale_2xK[:1]), Heads(k, scale=scale_2xK[1:]), Heads(v)
    return attend(
        q,
        k,
        v,
        k_ExRxK,
        v_ExRxK,
        jnp.asarray(SLOTS),
        rotations(config, jnp.asarray(POSITIONS)),
        jnp.zeros(CACHES * G, jnp.int32),
        config=config,
        first_row=G,
        tiling=tiling,
        interpreted=True,
    )


@pytest.mark.parametrize(
    ("heads", "fused", "tiling"),
    [
        ((6, 2), True, None),
        ((6, 2), False, Tiling(splits=1, block=16)),
        ((6, 2), True, Tiling(splits=2, block=16)),
        ((6, 2), False, Tiling(splits=2, block=48)),
        ((2, 2), False, Tiling(splits=1, block=32)),
        ((8, 1), True, Tiling(splits=2, block=16)),
        ((20, 1), True, Tiling(splits=1, block=96)),  # more queries than the least that Triton multiplies
    ],
)
def test_the_kernel_equals_plain_attention(heads, fused, tiling):
    config = dataclasses.replace(CONFIG, heads=heads[0], kv_heads=heads[1])
    H, G = heads
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(CACHES, count, K)) for count in (H, G, G)] + [rng.normal(size=(2, K))]
    k, v = rng.normal(size=(2, CACHES, G, R, K))
    found, keys, values = expected(config, arrays, k, v)
    beside = np.ones((G, R, K))  # rows of another micro-batch, before and behind these

    def cache_rows(array):
        return np.concatenate([beside, array.reshape(CACHES * G, R, K), beside]).astype(np.float32)

    in_float32 = [array.astype(np.float32) for array in arrays]
    got, *caches, counters = interpreted(config, in_float32, cache_rows(k), cache_rows(v), fused=fused, tiling=tiling)
    np.testing.assert_allclose(got, found, atol=1e-4)
    for cache, wanted in zip(caches, (keys, values), strict=True):
        np.testing.assert_allclose(cache, cache_rows(wanted), atol=1e-5)
    np.testing.assert_array_equal(counters, 0)


def test_without_time_heads_positions_are_counted_in_tokens_alone():
    config = dataclasses.replace(CONFIG, time_heads=0)
    found = rotations(config, jnp.asarray(POSITIONS))
    np.testing.assert_array_equal(found, rotations(CONFIG, jnp.asarray(POSITIONS))[:, :1])


@pytest.mark.parametrize(
    ("cache_rows", "size"), [(2, 1024), (6, 1024), (2, 4096), (2, 65_536), (512, 1024), (4, 16), (6, 48), (4, 24 * 16)]
)
@pytest.mark.parametrize("overlapped", [False, True])
def test_tilings_divide_the_cache(cache_rows, size, overlapped):
    tiling = Tiling.of(cache_rows, size, overlapped=overlapped)
    assert size % (tiling.splits * tiling.block) == 0
    assert tiling.block >= LEAST_BLOCK
    assert {tiling.block & (tiling.block - 1), tiling.splits & (tiling.splits - 1)} == {0}  # powers of two


def test_small_caches_of_few_rows_are_not_split_and_large_ones_are():
    assert Tiling.of(2, 64).splits == 1
    assert Tiling.of(512, 4096).splits == 1
    assert Tiling.of(2, 4096).splits == 64


# An H100 as JAX describes it. Translation needs the description only, from JAX 0.11 on; before, it needs nothing.
H100 = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")


@pytest.mark.parametrize("rows", [1, 256])
@pytest.mark.parametrize("mode", list(WINDOWS))
@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
def test_triton_accepts_the_kernel(rows, mode):
    """Steps with the shipped model's heads are translated for a GPU, which refuses unknown operations and shapes."""
    config = dataclasses.replace(PRESETS["small"], layers=2, width=32, hidden=32)
    model = PerceiverAR(config, rngs=nnx.Rngs(0), compute=Compute(dtype="bfloat16"))
    decoder = Decoder(model, Backend(compute=model.compute, attention="pallas", micro_batch_rows=256))
    prompts = [np.array([vocabulary.START], np.int32)] * rows
    state = jax.eval_shape(lambda: decoder.start(prompts, latents=1024, seeds=range(rows), limit_steps=100, mode=mode))
    decode = jax.jit(lambda state: decoder.decode_scored(state, shared_options(SamplingOptions()), length=2))
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        text = decode.trace(state).lower(lowering_platforms=("cuda",)).as_text()
    kernels = text.count("custom_call @__gpu$xla.gpu.triton")
    assert kernels == (1 + config.layers) * (1 if rows == 1 else 2)
