"""Prefill: the caches filled from a prompt in one forward pass."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from music_ar.decoding.state import Caches, DecodeState
from music_ar.decoding.step import _KEEP, _Graph, window_starts
from music_ar.model.attention import Block, causal_attention
from music_ar.model.perceiver_ar import PerceiverAR, Told


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(graph: _Graph, params: nnx.State, state: DecodeState, tokens_BxP: Array, told_BxP: Told) -> DecodeState:
    """Fills the caches with P tokens at once.

    In exact mode they hold what P steps would have left there, but for rounding; in sliding mode, the last n latents as
    the model was trained to compute them.

    `tokens_BxP` are left-padded; their last has time clock_B - 1. `told_BxP` is after each of them.
    """
    model = nnx.merge(graph.graph, params)
    caches = state.caches
    B, P = tokens_BxP.shape
    M, R = caches.cross_v.shape[1], caches.self_v[0].shape[1]
    W = caches.self_v[0].shape[0] // caches.cross_v.shape[0]
    times_BxP = jnp.broadcast_to(jnp.arange(P)[None], (B, P))
    # From here on P is also the two ways to count a position, as in `model`.
    places_BxPxP = jnp.stack([times_BxP - state.birth_B[:, None], told_BxP.keyboard.step], axis=-1)
    embedded_BxPxD = model.tell(model.embed(tokens_BxP), told_BxP)
    k_BxPxGxK, v_BxPxGxK = model.cross.keys_values(model.context_norm(embedded_BxPxD), places_BxPxP)

    # The latents from each window's start; those at or after P are in the future and are masked later. The one that
    # predicts comes first; of two, the other holds at most half the budget.
    starts_BxW, active_B = window_starts(P - 1 - state.birth_B, state.budget_B, W)
    by_age = []
    for turn in range(W):
        start_B = jnp.take_along_axis(starts_BxW, (active_B[:, None] + turn) % W, axis=1)[:, 0] + state.birth_B
        times_BxR = start_B[:, None] + jnp.arange(min(R >> turn, P))[None]
        filled = _prefill_window(model, embedded_BxPxD, places_BxPxP, k_BxPxGxK, v_BxPxGxK, state.birth_B, times_BxR)
        by_age.append([[_in_slots(x, times_BxR % R, R) for x in layer] for layer in filled])
    order_BxW = (jnp.arange(W)[None] - active_B[:, None]) % W

    def by_window(turns: Sequence[Array]) -> Array:
        stacked_BxWxRxGxK = jnp.stack(turns, axis=1)
        in_order = jnp.take_along_axis(stacked_BxWxRxGxK, order_BxW[:, :, None, None, None], axis=1)
        return in_order.reshape(B * W, *in_order.shape[2:])

    layers = [[by_window(pair) for pair in zip(*turns, strict=True)] for turns in zip(*by_age, strict=True)]
    last_1xM = jnp.arange(max(0, P - M), P)[None]
    cross_k, cross_v = (_in_slots(x[:, -M:], last_1xM % M, M) for x in (k_BxPxGxK, v_BxPxGxK))
    key_layout = _value_layout if graph.fused else _key_layout
    caches = Caches(
        cross_k=key_layout(cross_k).astype(caches.cross_k.dtype),
        cross_v=_value_layout(cross_v),
        self_k=tuple(key_layout(k).astype(caches.cross_k.dtype) for k, _ in layers),
        self_v=tuple(_value_layout(v) for _, v in layers),
    )
    return state._replace(caches=caches)


def _in_slots(x_BxTxGxK: Array, slots_BxT: Array, size: int) -> Float[Array, "B size G K"]:
    """Entries put into the slots of a ring; the others are zero."""
    empty = jnp.zeros((size, *x_BxTxGxK.shape[2:]), x_BxTxGxK.dtype)
    slots_BxT = jnp.broadcast_to(slots_BxT, x_BxTxGxK.shape[:2])
    return jax.vmap(lambda x, slots: empty.at[slots].set(x))(x_BxTxGxK, slots_BxT)


def _key_layout(k_BxRxGxK: Array) -> Float[Array, "BG K R"]:
    return k_BxRxGxK.transpose(0, 2, 3, 1).reshape(-1, k_BxRxGxK.shape[-1], k_BxRxGxK.shape[1])


def _value_layout(v_BxRxGxK: Array) -> Float[Array, "BG R K"]:
    return v_BxRxGxK.swapaxes(1, 2).reshape(-1, v_BxRxGxK.shape[1], v_BxRxGxK.shape[-1])


def _prefill_window(
    model: PerceiverAR, embedded_BxPxD: Array, places_BxPxP: Array, k: Array, v: Array, birth_B: Array, times_BxR: Array
) -> list[tuple[Array, Array]]:
    """Keys and values [B, R, G, K], a pair a layer, of the latents at `times_BxR`."""
    P, M = embedded_BxPxD.shape[1], model.config.context
    times_BxR = jnp.clip(times_BxR, 0, P - 1)
    places_BxRxP = jnp.take_along_axis(places_BxPxP, times_BxR[..., None], axis=1)
    keys_1x1xP = jnp.arange(P)[None, None]
    seen_BxRxP = (keys_1x1xP <= times_BxR[..., None]) & (keys_1x1xP > times_BxR[..., None] - M)
    seen_BxRxP &= (keys_1x1xP >= birth_B[:, None, None]) | (keys_1x1xP == times_BxR[..., None])

    def attend_context(block: Block, x_BxRxD: Array) -> Array:
        q = block.queries(x_BxRxD, places_BxRxP)
        return block.add(x_BxRxD, jax.nn.dot_product_attention(q, k, v, mask=seen_BxRxP[:, None]), _KEEP)

    x_BxRxD = jnp.take_along_axis(embedded_BxPxD, times_BxR[..., None], axis=1)
    x_BxRxD = attend_context(model.cross, model.latent(x_BxRxD))
    further = dict(zip(model.config.cross_depths, model.further_crosses, strict=True))
    filled = []
    for depth, block in enumerate(model.blocks):
        if depth in further:
            x_BxRxD = attend_context(further[depth], x_BxRxD)
        q, *filled_by = block.queries_keys_values(x_BxRxD, places_BxRxP)
        filled.append(tuple(filled_by))
        x_BxRxD = block.add(x_BxRxD, causal_attention(q, *filled_by), _KEEP)
    return filled
