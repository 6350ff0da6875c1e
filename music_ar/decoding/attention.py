"""Attention of one decoding step over rolling caches, as ordinary operations."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from music_ar.model.attention import Block

KeysValues = tuple[Array, Array]


class PlainAttention:
    """The attention of all blocks in one step, as ordinary operations; `FusedAttention` does the same in a kernel.

    Args:
        clock_B: the time of the step, by row.
        places_BxP: the position that it has in the piece, by either way to count.
        windows: W.
    """

    def __init__(self, clock_B: Int[Array, " B"], places_BxP: Int[Array, "B P"], windows: int) -> None:
        self._clock_B, self._places_Bx1xP, self._windows = clock_B, places_BxP[:, None], windows

    def cross(
        self,
        block: Block,
        x_BxTxD: Float[Array, "B T D"],
        context_Bx1xD: Float[Array, "B 1 D"] | None,
        cache: KeysValues,
        since_B: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T H K"], KeysValues]:
        """What a cross block finds in the context for T latents a row, and the context's cache.

        Args:
            block: the block.
            x_BxTxD: the stream of the latents.
            context_Bx1xD: the normalised input that is new in the context; None if the cache has it already.
            cache: of the context.
            since_B: the time from which on inputs are seen.
        """
        if context_Bx1xD is not None:
            cache = _write(*cache, *block.keys_values(context_Bx1xD, self._places_Bx1xP), self._clock_B)
        places_BxTxP = jnp.repeat(self._places_Bx1xP, x_BxTxD.shape[1], axis=1)
        seen_BxM = _times(self._clock_B, cache[1].shape[1]) >= since_B[:, None]
        return _attend(block.queries(x_BxTxD, places_BxTxP), *cache, seen_BxM), cache

    def within(
        self, block: Block, x_BWx1xD: Float[Array, "BW 1 D"], cache: KeysValues, since_BW: Int[Array, " BW"]
    ) -> tuple[Float[Array, "BW 1 H K"], KeysValues]:
        """What a self block finds in each window, and the windows' cache.

        Args:
            block: the block.
            x_BWx1xD: the stream.
            cache: of the windows.
            since_BW: when each window began. One that has not begun sees itself, so that its softmax has a key; nobody
                reads it.
        """
        clock_BW = jnp.repeat(self._clock_B, self._windows)
        q, k, v = block.queries_keys_values(x_BWx1xD, jnp.repeat(self._places_Bx1xP, self._windows, axis=0))
        cache = _write(*cache, k, v, clock_BW)
        times_BWxR = _times(clock_BW, cache[1].shape[1])
        in_window_BWxR = (times_BWxR >= since_BW[:, None]) | (times_BWxR == clock_BW[:, None])
        return _attend(q, *cache, in_window_BWxR), cache


def _times(clock_B: Array, size: int) -> Int[Array, "B size"]:
    """The time that each slot of a ring holds, once the slot of `clock_B` is written."""
    return clock_B[:, None] - (clock_B[:, None] - jnp.arange(size)[None]) % size


def _write(
    k_cache_ExKxR: Array, v_cache_ExRxK: Array, k_Bx1xGxK: Array, v_Bx1xGxK: Array, clock_B: Array
) -> KeysValues:
    """The caches with the key and value of the clock's time in its slot."""
    E, K, R = k_cache_ExKxR.shape
    slot_E = jnp.repeat(clock_B % R, E // len(clock_B))
    return (
        k_cache_ExKxR.at[jnp.arange(E), :, slot_E].set(k_Bx1xGxK.reshape(E, K).astype(k_cache_ExKxR.dtype)),
        v_cache_ExRxK.at[jnp.arange(E), slot_E].set(v_Bx1xGxK.reshape(E, K)),
    )


def _attend(q_BxTxHxK: Array, k_ExKxR: Array, v_ExRxK: Array, seen_BxR: Array) -> Float[Array, "B T H K"]:
    """Attention of T queries a row to that row's ring; float32 softmax."""
    B, T, H, K = q_BxTxHxK.shape
    G = k_ExKxR.shape[0] // B
    q_ExQxK = q_BxTxHxK.astype(k_ExKxR.dtype).reshape(B, T, G, H // G, K).swapaxes(1, 2).reshape(B * G, -1, K)
    scores_ExQxR = jnp.einsum("eqk,ekr->eqr", q_ExQxK, k_ExKxR, preferred_element_type=jnp.float32)
    seen_Ex1xR = jnp.repeat(seen_BxR, G, axis=0)[:, None]
    chances_ExQxR = jax.nn.softmax(jnp.where(seen_Ex1xR, scores_ExQxR * K**-0.5, -jnp.inf), axis=-1)
    found_ExQxK = jnp.einsum("eqr,erk->eqk", chances_ExQxR.astype(v_ExRxK.dtype), v_ExRxK)
    return found_ExQxK.reshape(B, G, T, H // G, K).swapaxes(1, 2).reshape(B, T, H, K)
