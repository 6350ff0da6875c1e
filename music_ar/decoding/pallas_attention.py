"""Attention of one decoding step by a kernel, one call per block; `attention.PlainAttention` is the plain version.

It is imported only where it is used, since JAX has deprecated the Triton backend of Pallas.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from music_ar.decoding.attention import KeysValues
from music_ar.decoding.layers import CrossBlock, SelfBlock
from music_ar.decoding.pallas_kernel import LEAST_BLOCK, Heads, Tiling, attend, rotations
from music_ar.model.config import ModelConfig

_LARGEST_HEAD = 64  # larger ones may exceed the shared memory


def suits(config: ModelConfig) -> bool:
    """Whether the kernel can be used for a model: Triton's blocks are powers of two, and at least 16."""
    K = config.head_size
    return LEAST_BLOCK <= K <= _LARGEST_HEAD and K & (K - 1) == 0 and config.context % LEAST_BLOCK == 0


class PallasAttention:
    """`attention.StepAttention` by the kernel. Keys are laid out like values.

    Args:
        config: of the model.
        clock_B: the time of the step, by row.
        positions_BxP: the position in the piece, counted in tokens and in time.
        windows: W.
        first: batch row of the caches at which these rows begin.
        overlapped: whether the attention of another micro-batch runs at the same time.
        interpreted: run as ordinary operations, for tests.
    """

    def __init__(
        self,
        config: ModelConfig,
        clock_B: Int[Array, " B"],
        positions_BxP: Int[Array, "B P"],
        windows: int,
        *,
        first: int = 0,
        overlapped: bool = False,
        interpreted: bool = False,
    ) -> None:
        self._config, self._clock_B, self._windows, self._first = config, clock_B, windows, first
        self._overlapped, self._interpreted = overlapped, interpreted
        self._rotations_BxPx2xK = rotations(config, positions_BxP)
        # The kernels use these one after another, and leave them as they were.
        self._counters_E = jnp.zeros(len(clock_B) * windows * config.kv_heads, jnp.int32)

    def cross(
        self,
        block: CrossBlock,
        x_Bx1xD: Float[Array, "B 1 D"],
        context_Bx1xD: Float[Array, "B 1 D"],
        cache: KeysValues,
        since_B: Int[Array, " B"],
    ) -> tuple[Float[Array, "B 1 H K"], KeysValues]:
        """See `StepAttention.cross`."""
        q = Heads(self._heads(block.query(block.attention_norm(x_Bx1xD))), scale=_scale_rows(block.query_norm))
        k = Heads(self._heads(block.key(context_Bx1xD)), scale=_scale_rows(block.key_norm))
        v = Heads(self._heads(block.value(context_Bx1xD)))
        return self._attend(q, k, v, cache, since_B, windows=1)

    def within(
        self, block: SelfBlock, x_BWx1xD: Float[Array, "BW 1 D"], cache: KeysValues, since_BW: Int[Array, " BW"]
    ) -> tuple[Float[Array, "BW 1 H K"], KeysValues]:
        """See `StepAttention.within`."""
        H, G, K = self._config.heads, self._config.kv_heads, self._config.head_size
        qkv = self._heads(block.projection(x_BWx1xD))
        scale = block.scale_1x1xHxK[...].reshape(H + G, K)
        q, v = Heads(qkv, scale=scale), Heads(qkv, first=H + G)
        k = Heads(qkv, first=H, scale=scale, scale_row=H)
        return self._attend(q, k, v, cache, since_BW, windows=self._windows)

    def _attend(
        self, q: Heads, k: Heads, v: Heads, cache: KeysValues, since_X: Array, *, windows: int
    ) -> tuple[Array, KeysValues]:
        config, size = self._config, cache[0].shape[1]
        clock_X = jnp.repeat(self._clock_B, windows)
        found, keys, values, self._counters_E = attend(
            q,
            k,
            v,
            *cache,
            jnp.stack([clock_X % size, clock_X - since_X], axis=1),
            jnp.repeat(self._rotations_BxPx2xK, windows, axis=0),
            self._counters_E,
            config=config,
            first_row=self._first * windows * config.kv_heads,
            tiling=Tiling.of(len(clock_X) * config.kv_heads, size, overlapped=self._overlapped),
            interpreted=self._interpreted,
        )
        return found[:, None], (keys, values)

    def _heads(self, x_Xx1xC: Array) -> Array:
        return x_Xx1xC.reshape(-1, x_Xx1xC.shape[-1] // self._config.head_size, self._config.head_size)


def _scale_rows(norm: nnx.RMSNorm) -> Float[Array, "1 K"]:
    assert norm.scale is not None
    return norm.scale[...].reshape(1, -1)
