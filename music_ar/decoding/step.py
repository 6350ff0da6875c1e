"""One decoding step: the pending token through the model, and the state after a new one."""

from collections.abc import Sequence
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from music_ar.decoding import history_bias
from music_ar.decoding.attention import PlainAttention
from music_ar.decoding.pallas_attention import FusedAttention
from music_ar.decoding.state import Caches, DecodeState
from music_ar.features import keyboard, retrieval
from music_ar.model.attention import Block
from music_ar.model.perceiver_ar import PerceiverAR, Told
from music_ar.tokens import grammar, vocabulary

WindowMode = Literal["exact", "sliding"]


WINDOW_MODES: tuple[WindowMode, ...] = get_args(WindowMode)


_NEVER = np.int32(2**30)


class _Graph:
    """A model's structure and how it is decoded, as a static argument: what JAX hashes at each call is kept."""

    def __init__(self, graph: nnx.GraphDef[PerceiverAR], fused: bool):
        self.graph, self._hash = graph, hash((graph, fused))
        self.fused = fused

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Graph) and (self.graph, self.fused) == (other.graph, other.fused))


def drawable(state: DecodeState) -> Bool[Array, "B V"]:
    """Which tokens may be drawn next: `grammar.playable_events`, or only releases where keys are `keyboard.overdue`.

    Where a model forgets to let go of the pedal once, what it was trained on does not tell it to later on: without
    this, dozens of notes would sound for half a minute (docs/evaluation.md). And where nothing has sounded for long
    (`keyboard.paused`), no time shift may be drawn.
    """
    playable_BxV = grammar.playable_events(state.grammar, jnp)
    paused_Bx1 = keyboard.paused(state.keyboard, state.grammar.held, jnp)[:, None]
    playable_BxV &= ~(paused_Bx1 & vocabulary.is_shift(jnp.arange(playable_BxV.shape[1]))[None])
    overdue_Bx128 = keyboard.overdue(state.keyboard, state.grammar.held, jnp)
    before, behind = vocabulary.NOTE_OFF, playable_BxV.shape[1] - vocabulary.NOTE_OFF - vocabulary.PITCHES
    # None may follow a note-on that a prompt ends with; then they follow the next shift.
    releases_BxV = jnp.pad(overdue_Bx128, ((0, 0), (before, behind))) & playable_BxV
    return jnp.where(releases_BxV.any(axis=1, keepdims=True), releases_BxV, playable_BxV)


def take(state: DecodeState, token_B: Int[Array, " B"]) -> DecodeState:
    """Makes `token_B` pending (`vocabulary.PAD` in rows that have ended) and keeps the grammar and the time."""
    token_B = jnp.where(state.ended_B, vocabulary.PAD, token_B)
    after = keyboard.advance(state.keyboard, token_B, jnp)
    memory = state.memory
    if memory is not None:
        memory = retrieval.advance(memory, token_B, after.step, after.velocity)
    return state._replace(
        recent_BxL=jnp.concatenate([state.recent_BxL[:, 1:], token_B[:, None]], axis=1),
        keyboard=after,
        memory=memory,
        heard=history_bias.advance(state.heard, token_B, after.velocity),
        grammar=grammar.advance(state.grammar, token_B, jnp),
        steps_B=state.steps_B + after.step - state.keyboard.step,
        ended_B=state.ended_B | (token_B == vocabulary.END),
    )


def step(
    model: PerceiverAR, state: DecodeState, *, fused: bool = False, parts: int = 1
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Runs the pending token through the model: logits of what follows it, and the state one tick later.

    Args:
        model: with its self blocks joined, as `Decoder` makes it.
        state: what came before.
        fused: whether attention is one kernel; the caches' layout must fit.
        parts: equal parts that the rows are taken in, which need nothing of each other but their turn at the caches;
            more than one only if `fused`.
    """
    clock_B, caches = state.clock_B, state.caches
    B = state.birth_B.shape[0]
    W = caches.self_v[0].shape[0] // caches.cross_v.shape[0]
    age_B = clock_B - state.birth_B
    starts_BxW, active_B = window_starts(age_B, state.budget_B, W)
    seen_since_B = jnp.maximum(state.birth_B, 0)
    window_since_BxW = starts_BxW + state.birth_B[:, None]
    places_BxP = jnp.stack([age_B, state.keyboard.step], axis=-1)
    told_B = Told(state.keyboard, None if state.memory is None else retrieval.recalled(state.memory))
    embedded_Bx1xD = model.tell(model.embed_last(state.recent_BxL), told_B)[:, None]

    assert B % parts == 0
    assert fused or parts == 1
    rows = [slice(first, first + B // parts) for first in range(0, B, B // parts)]
    attentions: list[FusedAttention | PlainAttention] = [PlainAttention(clock_B, places_BxP, W)]
    if fused:
        attentions = [
            FusedAttention(model.config, clock_B[of], places_BxP[of], W, first=of.start, beside=parts > 1)
            for of in rows
        ]
    cross = (caches.cross_k, caches.cross_v)

    def attend_context(block: Block, streams: list[Array], contexts: Sequence[Array | None]) -> list[Array]:
        nonlocal cross
        after = []
        for of, attention, x_BxTxD, context in zip(rows, attentions, streams, contexts, strict=True):
            found, cross = attention.cross(block, x_BxTxD, context, cross, seen_since_B[of])
            after.append(block.add(x_BxTxD, found, _KEEP))
        return after

    contexts = [model.context_norm(embedded_Bx1xD[of]) for of in rows]
    streams = attend_context(model.cross, [model.latent(embedded_Bx1xD[of]) for of in rows], contexts)
    streams = [jnp.repeat(x_Bx1xD, W, axis=0) for x_Bx1xD in streams]
    further = dict(zip(model.config.cross_depths, model.further_crosses, strict=True))
    filled = []
    for depth, (block, *layer) in enumerate(zip(model.blocks, caches.self_k, caches.self_v, strict=True)):
        if depth in further:
            by_row = [x_BWx1xD.reshape(-1, W, x_BWx1xD.shape[-1]) for x_BWx1xD in streams]
            by_row = attend_context(further[depth], by_row, [None] * parts)
            streams = [x_BxWxD.reshape(-1, 1, x_BxWxD.shape[-1]) for x_BxWxD in by_row]
        cache, after = (layer[0], layer[1]), []
        for of, attention, x_BWx1xD in zip(rows, attentions, streams, strict=True):
            found, cache = attention.within(block, x_BWx1xD, cache, window_since_BxW[of].reshape(-1))
            after.append(block.add(x_BWx1xD, found, _KEEP))
        streams = after
        filled.append(cache)
    predicting_Bx1xD = jnp.concatenate(streams)[jnp.arange(B) * W + active_B]
    caches = Caches(*cross, *zip(*filled, strict=True))
    return model.logits(predicting_Bx1xD)[:, 0], state._replace(clock_B=clock_B + 1, caches=caches)


def window_starts(
    age_B: Int[Array, " B"], budget_B: Int[Array, " B"], windows: int
) -> tuple[Int[Array, "B W"], Int[Array, " B"]]:
    """When the windows that a latent of this age is in began, and which of them predicts.

    Of two (exact), window w begins at the multiples of n / 2 whose number is even (w = 0) or odd (w = 1); before
    n / 2, window 1 has not begun. A single one (sliding) begins n - 1 tokens ago.
    """
    if windows == 1:
        return jnp.maximum(age_B - budget_B + 1, 0)[:, None], jnp.zeros_like(age_B)
    half_B = budget_B // 2
    count_B = age_B // half_B
    numbers_Bx2 = count_B[:, None] - (count_B[:, None] - jnp.arange(2)[None]) % 2
    starts_Bx2 = jnp.where(numbers_Bx2 >= 0, numbers_Bx2 * half_B[:, None], _NEVER)
    return starts_Bx2, jnp.where(count_B == 0, 0, (count_B + 1) % 2)


_KEEP = nnx.Dropout(0.0, deterministic=True)
