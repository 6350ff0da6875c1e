"""Attention of one decoding step over rolling caches, as plain operations. `pallas_attention` is the kernel version."""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from music_ar.decoding.layers import CrossBlock, SelfBlock

KeysValues = tuple[Array, Array]


@runtime_checkable
class StepAttention(Protocol):
    """Attention of all blocks in one step, for the rows of one micro-batch."""

    def cross(
        self,
        block: CrossBlock,
        x_Bx1xD: Float[Array, "B 1 D"],
        context_Bx1xD: Float[Array, "B 1 D"],
        cache: KeysValues,
        since_B: Int[Array, " B"],
    ) -> tuple[Float[Array, "B 1 H K"], KeysValues]:
        """Output of the cross block's attention to the context, and the context's updated cache.

        Args:
            block: the block.
            x_Bx1xD: the residual stream of the latent.
            context_Bx1xD: the new input of the context, normalized.
            cache: of the context.
            since_B: time from which inputs are visible.
        """
        ...

    def within(
        self, block: SelfBlock, x_BWx1xD: Float[Array, "BW 1 D"], cache: KeysValues, since_BW: Int[Array, " BW"]
    ) -> tuple[Float[Array, "BW 1 H K"], KeysValues]:
        """Output of a self block's attention within each window, and the windows' updated cache.

        Args:
            block: the block.
            x_BWx1xD: the residual stream.
            cache: of the windows.
            since_BW: start of each window. A window that has not begun sees only the new entry, so that its softmax has
                a key; its result is not used.
        """
        ...


class PlainAttention:
    """`StepAttention` as ordinary operations.

    Args:
        clock_B: the time of the step, by row.
        positions_BxP: the position in the piece, counted in tokens and in time.
        windows: W.
    """

    def __init__(self, clock_B: Int[Array, " B"], positions_BxP: Int[Array, "B P"], windows: int) -> None:
        self._clock_B, self._positions_Bx1xP, self._windows = clock_B, positions_BxP[:, None], windows

    def cross(
        self,
        block: CrossBlock,
        x_Bx1xD: Float[Array, "B 1 D"],
        context_Bx1xD: Float[Array, "B 1 D"],
        cache: KeysValues,
        since_B: Int[Array, " B"],
    ) -> tuple[Float[Array, "B 1 H K"], KeysValues]:
        """See `StepAttention.cross`."""
        cache = _write(*cache, *block.keys_values(context_Bx1xD, self._positions_Bx1xP), self._clock_B)
        visible_BxM = _times(self._clock_B, cache[1].shape[1]) >= since_B[:, None]
        return _attend(block.queries(x_Bx1xD, self._positions_Bx1xP), *cache, visible_BxM), cache

    def within(
        self, block: SelfBlock, x_BWx1xD: Float[Array, "BW 1 D"], cache: KeysValues, since_BW: Int[Array, " BW"]
    ) -> tuple[Float[Array, "BW 1 H K"], KeysValues]:
        """See `StepAttention.within`."""
        clock_BW = jnp.repeat(self._clock_B, self._windows)
        q, k, v = block.queries_keys_values(x_BWx1xD, jnp.repeat(self._positions_Bx1xP, self._windows, axis=0))
        cache = _write(*cache, k, v, clock_BW)
        times_BWxR = _times(clock_BW, cache[1].shape[1])
        visible_BWxR = (times_BWxR >= since_BW[:, None]) | (times_BWxR == clock_BW[:, None])
        return _attend(q, *cache, visible_BWxR), cache


def _times(clock_B: Array, size: int) -> Int[Array, "B size"]:
    """Time that each slot of a rolling cache holds, once the slot of `clock_B` is written."""
    return clock_B[:, None] - (clock_B[:, None] - jnp.arange(size)[None]) % size


def _write(
    k_cache_ExKxR: Array, v_cache_ExRxK: Array, k_Bx1xGxK: Array, v_Bx1xGxK: Array, clock_B: Array
) -> KeysValues:
    """Write the new key and value into the clock's slot of the caches."""
    E, K, R = k_cache_ExKxR.shape
    slot_E = jnp.repeat(clock_B % R, E // len(clock_B))
    return (
        k_cache_ExKxR.at[jnp.arange(E), :, slot_E].set(k_Bx1xGxK.reshape(E, K).astype(k_cache_ExKxR.dtype)),
        v_cache_ExRxK.at[jnp.arange(E), slot_E].set(v_Bx1xGxK.reshape(E, K)),
    )


def _attend(q_Bx1xHxK: Array, k_ExKxR: Array, v_ExRxK: Array, visible_BxR: Array) -> Float[Array, "B 1 H K"]:
    """Attention of one query per row to that row's cache; float32 softmax."""
    B, T, H, K = q_Bx1xHxK.shape
    G = k_ExKxR.shape[0] // B
    q_ExQxK = q_Bx1xHxK.astype(k_ExKxR.dtype).reshape(B, T, G, H // G, K).swapaxes(1, 2).reshape(B * G, -1, K)
    scores_ExQxR = jnp.einsum("eqk,ekr->eqr", q_ExQxK, k_ExKxR, preferred_element_type=jnp.float32)
    visible_Ex1xR = jnp.repeat(visible_BxR, G, axis=0)[:, None]
    weights_ExQxR = jax.nn.softmax(jnp.where(visible_Ex1xR, scores_ExQxR * K**-0.5, -jnp.inf), axis=-1)
    found_ExQxK = jnp.einsum("eqr,erk->eqk", weights_ExQxR.astype(v_ExRxK.dtype), v_ExRxK)
    return found_ExQxK.reshape(B, G, T, H // G, K).swapaxes(1, 2).reshape(B, T, H, K)
