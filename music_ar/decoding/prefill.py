"""Prefill: fills the caches from prompts in one forward pass."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Integer

from music_ar.decoding import history_bias
from music_ar.decoding.backend import Backend
from music_ar.decoding.layers import DecodingModel, HashedGraph, SelfBlock
from music_ar.decoding.state import Caches, DecodeState
from music_ar.decoding.windows import window_starts
from music_ar.features import gap, keyboard, notes, retrieval
from music_ar.features.gap import Place
from music_ar.features.keyboard import Keyboard
from music_ar.features.notes import Onsets
from music_ar.features.retrieval import Retrieved
from music_ar.model.attention import causal_attention
from music_ar.model.config import ModelConfig
from music_ar.model.perceiver_ar import Conditioning
from music_ar.tokens import grammar, vocabulary

_LEAST_PREFILL = 16
_QUERIES_AT_ONCE = 512  # of the cross-attention


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts ready to be prefilled, in NumPy.

    Attributes:
        tokens_BxPL: the last P + L tokens of each, left-padded; the last of them will be pending.
        conditioning_BxP: features after each of the last P + 1 tokens.
        birth_B: when each piece began, if the pending token has time P.
        state: the fields of `DecodeState` that follow from the prompts alone.
    """

    tokens_BxPL: Int[np.ndarray, "B PL"]
    conditioning_BxP: Conditioning
    birth_B: Int[np.ndarray, " B"]
    state: dict[str, Any]

    @property
    def length(self) -> int:
        """P: tokens before the pending one, padded to a length that many prompts share."""
        return self.conditioning_BxP.keyboard.time.shape[1] - 1

    @classmethod
    def of(cls, prompts: Sequence[Integer[np.ndarray, " _P"]], config: ModelConfig, most: int) -> "Prompts":
        """Prepare prompts, of which at most the last `most` tokens can still be visible."""
        L = config.conv_width
        longest = max(len(prompt) for prompt in prompts) - 1
        P = 0 if longest == 0 else min(most, max(_LEAST_PREFILL, 1 << (longest - 1).bit_length()))
        tokens_BxPL = np.full((len(prompts), P + L), vocabulary.PAD, np.int32)
        for row, prompt in zip(tokens_BxPL, prompts, strict=True):
            kept = prompt[-(P + L) :]
            row[P + L - len(kept) :] = kept
        conditioning_BxP, states = _stack([_features(prompt, config, P + 1) for prompt in prompts])
        birth_B = np.array([P + 1 - len(prompt) for prompt in prompts], np.int32)
        return cls(tokens_BxPL, conditioning_BxP, birth_B, states)


def _features(
    prompt: Integer[np.ndarray, " _P"], config: ModelConfig, size: int
) -> tuple[Conditioning, dict[str, Any]]:
    """Features after each of the last `size` tokens of a prompt, and the states after it; empty before its start."""
    kept = min(size, len(prompt))
    padding = (size - kept,)
    keyboards = Keyboard(*_padded(keyboard.init(padding), keyboard.scan_each(prompt), kept))
    no_onsets = Onsets(np.zeros((*padding, config.onsets), np.int32), np.full((*padding, config.onsets), -1, np.int32))
    onsets = Onsets(*_padded(no_onsets, notes.scan_each(prompt, config.onsets), kept))
    times = keyboard.times_and_velocities(prompt)[0]
    place = None
    if config.fills_gaps:
        outside = Place(np.full(padding, -1, np.int32), np.zeros(padding, np.int32))
        place = Place(*_padded(outside, gap.scan_each(prompt, times), kept))
    found, match = None, None
    if config.retrieval_notes:
        index = retrieval.Index.of(prompt, config.retrieval_notes)
        found = Retrieved(*_padded(retrieval.nothing(padding), index.retrieved(kept), kept))
        match = index.state(config.retrieval_notes)
    states = {
        "held_Bx128": grammar.scan(prompt).held,
        "notes": notes.scan(prompt, config.notes_kept),
        "match": match,
        "gap": gap.scan(prompt, times) if config.fills_gaps else None,
        "history": history_bias.scan(prompt),
    }
    return Conditioning(keyboards, onsets, found, place), states


def _padded(before: Sequence[np.ndarray], values: Sequence[np.ndarray], kept: int) -> list[np.ndarray]:
    """The last `kept` of each array, after its padding."""
    return [np.concatenate([padding, each[len(each) - kept :]]) for padding, each in zip(before, values, strict=True)]


def _stack(rows: Sequence[Any]) -> Any:
    """Stack pytrees of NumPy arrays along a new first axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def prefill(
    graph: HashedGraph,
    backend: Backend,
    params: nnx.State,
    state: DecodeState,
    tokens_BxP: Array,
    conditioning_BxP: Conditioning,
) -> DecodeState:
    """Fill the caches with P tokens at once.

    With re-anchored windows, they hold what P steps would have left there, up to rounding; with sliding ones, the last
    n latents as the model was trained to compute them.

    Args:
        graph, params: the model.
        backend: how it computes.
        state: with empty caches; donated.
        tokens_BxP: left-padded; the last has time clock_B - 1.
        conditioning_BxP: features after each of them.
    """
    model = nnx.merge(graph.graph, params)
    blocks = list(model.blocks)[: state.layers]
    caches, W = state.caches, state.caches.windows
    B, P = tokens_BxP.shape
    M, R = caches.cross_v.shape[1], caches.self_v[0].shape[1]
    times_BxP = jnp.broadcast_to(jnp.arange(P)[None], (B, P))
    positions_BxPx2 = jnp.stack([times_BxP - state.birth_B[:, None], conditioning_BxP.time], axis=-1)
    embedded_BxPxD = state.with_wishes(model.outer.condition(model.outer.embed(tokens_BxP), conditioning_BxP))
    k_BxPxGxK, v_BxPxGxK = model.cross.keys_values(model.outer.context_norm(embedded_BxPxD), positions_BxPx2)
    context = _Context(embedded_BxPxD, positions_BxPx2, k_BxPxGxK, v_BxPxGxK)

    # The latents from each window's start; those at or after P are in the future and are masked later. The window that
    # predicts comes first; the other, if any, holds at most half the latents.
    starts_BxW, active_B = window_starts(P - 1 - state.birth_B, state.latents_B, W)
    by_age = []
    for turn in range(W):
        start_B = jnp.take_along_axis(starts_BxW, (active_B[:, None] + turn) % W, axis=1)[:, 0] + state.birth_B
        times_BxR = start_B[:, None] + jnp.arange(min(R >> turn, P))[None]
        filled = _prefill_window(model, blocks, backend, context, state.birth_B, times_BxR)
        by_age.append([[_in_slots(x, times_BxR % R, R) for x in layer] for layer in filled])
    order_BxW = (jnp.arange(W)[None] - active_B[:, None]) % W

    def by_window(turns: Sequence[Array]) -> Array:
        stacked_BxWxRxGxK = jnp.stack(turns, axis=1)
        in_order = jnp.take_along_axis(stacked_BxWxRxGxK, order_BxW[:, :, None, None, None], axis=1)
        return in_order.reshape(B * W, *in_order.shape[2:])

    layers = [[by_window(pair) for pair in zip(*turns, strict=True)] for turns in zip(*by_age, strict=True)]
    last_1xM = jnp.arange(max(0, P - M), P)[None]
    cross_k, cross_v = (_in_slots(x[:, -M:], last_1xM % M, M) for x in (k_BxPxGxK, v_BxPxGxK))
    key_layout = _key_layout if backend.attention == "plain" else _value_layout
    return state._replace(
        caches=Caches(
            cross_k=key_layout(cross_k).astype(caches.cross_k.dtype),
            cross_v=_value_layout(cross_v),
            self_k=tuple(key_layout(k).astype(caches.cross_k.dtype) for k, _ in layers),
            self_v=tuple(_value_layout(v) for _, v in layers),
        )
    )


@dataclasses.dataclass(frozen=True)
class _Context:
    """The inputs that latents read: embedded, their positions counted in two ways, and their keys and values."""

    embedded_BxPxD: Array
    positions_BxPx2: Array
    k_BxPxGxK: Array
    v_BxPxGxK: Array


def _prefill_window(
    model: DecodingModel,
    blocks: list[SelfBlock],
    backend: Backend,
    context: _Context,
    birth_B: Array,
    times_BxR: Array,
) -> list[tuple[Array, Array]]:
    """Keys and values [B, R, G, K], one pair per layer, of the latents at `times_BxR`."""
    P, M = context.embedded_BxPxD.shape[1], model.config.reach
    times_BxR = jnp.clip(times_BxR, 0, P - 1)
    positions_BxRx2 = jnp.take_along_axis(context.positions_BxPx2, times_BxR[..., None], axis=1)
    x_BxRxD = model.outer.latent(jnp.take_along_axis(context.embedded_BxPxD, times_BxR[..., None], axis=1))
    q = model.cross.queries(x_BxRxD, positions_BxRx2)
    x_BxRxD = model.cross.add(x_BxRxD, _attend(context, M, birth_B, q, times_BxR))
    filled = []
    for block in blocks:
        q, k, v = block.queries_keys_values(x_BxRxD, positions_BxRx2)
        filled.append((k, v))
        x_BxRxD = block.add(x_BxRxD, causal_attention(q, k, v, backend.compute))
    return filled


def _attend(context: _Context, M: int, birth_B: Array, q_BxRxHxK: Array, times_BxR: Array) -> Array:
    """Attention of the latents at `times_BxR` to the last M inputs of their piece.

    It is computed for some latents at a time, so that memory does not grow with latents times inputs.
    """

    def of_some(q_BxTxHxK: Array, times_BxT: Array) -> Array:
        keys_1x1xP, times_BxTx1 = jnp.arange(context.k_BxPxGxK.shape[1])[None, None], times_BxT[..., None]
        visible_BxTxP = (keys_1x1xP <= times_BxTx1) & (keys_1x1xP > times_BxTx1 - M)
        visible_BxTxP &= (keys_1x1xP >= birth_B[:, None, None]) | (keys_1x1xP == times_BxTx1)
        mask = visible_BxTxP[:, None]
        return jax.nn.dot_product_attention(q_BxTxHxK, context.k_BxPxGxK, context.v_BxPxGxK, mask=mask)

    B, R = times_BxR.shape
    if R <= _QUERIES_AT_ONCE or R % _QUERIES_AT_ONCE:
        return of_some(q_BxRxHxK, times_BxR)
    parts = [x.reshape(B, -1, _QUERIES_AT_ONCE, *x.shape[2:]).swapaxes(0, 1) for x in (q_BxRxHxK, times_BxR)]
    found = jax.lax.map(lambda part: of_some(*part), tuple(parts))
    return found.swapaxes(0, 1).reshape(q_BxRxHxK.shape)


def _in_slots(x_BxTxGxK: Array, slots_BxT: Array, size: int) -> Float[Array, "B size G K"]:
    """Entries in their slots of a rolling cache; the others are zero."""
    empty = jnp.zeros((size, *x_BxTxGxK.shape[2:]), x_BxTxGxK.dtype)
    slots_BxT = jnp.broadcast_to(slots_BxT, x_BxTxGxK.shape[:2])
    return jax.vmap(lambda x, slots: empty.at[slots].set(x))(x_BxTxGxK, slots_BxT)


def _key_layout(k_BxRxGxK: Array) -> Float[Array, "BG K R"]:
    return k_BxRxGxK.transpose(0, 2, 3, 1).reshape(-1, k_BxRxGxK.shape[-1], k_BxRxGxK.shape[1])


def _value_layout(v_BxRxGxK: Array) -> Float[Array, "BG R K"]:
    return v_BxRxGxK.swapaxes(1, 2).reshape(-1, v_BxRxGxK.shape[1], v_BxRxGxK.shape[-1])
