"""One decoding step: run the pending token through the model, then advance the state by a new token."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from music_ar.decoding import history_bias
from music_ar.decoding.attention import PlainAttention, StepAttention
from music_ar.decoding.backend import Backend
from music_ar.decoding.layers import DecodingModel
from music_ar.decoding.state import Caches, DecodeState, EarlyExit
from music_ar.decoding.windows import window_starts
from music_ar.features import gap, keyboard, notes, retrieval
from music_ar.tokens import grammar, vocabulary


def advance(state: DecodeState, token_B: Int[Array, " B"]) -> DecodeState:
    """The state with `token_B` pending, `vocabulary.PAD` in rows that have ended; caches and clock do not change."""
    token_B = jnp.where(state.ended_B, vocabulary.PAD, token_B)
    after = keyboard.step(state.keyboard, token_B)
    last_notes = notes.step(state.notes, token_B, after.time, after.velocity)
    return state._replace(
        recent_BxL=jnp.concatenate([state.recent_BxL[:, 1:], token_B[:, None]], axis=1),
        held_Bx128=grammar.step(state.grammar, token_B).held,
        keyboard=after,
        notes=last_notes,
        match=None if state.match is None else retrieval.step(state.match, last_notes, token_B),
        gap=None if state.gap is None else gap.step(state.gap, token_B, after.time),
        history=history_bias.step(state.history, token_B, after.velocity),
        ended_B=state.ended_B | (token_B == vocabulary.END),
    )


def step(
    model: DecodingModel, state: DecodeState, backend: Backend, micro_batches: int = 1, *, pairs: bool = False
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Run the pending token through the model.

    As many self blocks run as the state has caches for. If `state.early` is set, a token leaves at the first exit where
    that is expected to cost little enough. Its stream then stays as it is, and the keys and values of the blocks that
    it skips follow from that stream, so that later tokens see complete caches (CALM, Schuster et al., arXiv
    2207.07061). Here those blocks are computed all the same and their results dropped; the native engine, of which this
    is the reference, saves the work.

    Args:
        model: the model.
        state: the state with the pending token.
        backend: how to compute attention; must fit the layout of the caches.
        micro_batches: number of equal parts of the rows. They depend on each other only for their turn at the caches,
            so they can overlap; more than one only with the attention kernel.
        pairs: whether rows are pairs, of which both leave early or neither; see `guidance`.

    Returns:
        Logits of the token after the pending one, and the state one token later.
    """
    caches, B, W = state.caches, state.clock_B.shape[0], state.caches.windows
    starts_BxW, active_B = window_starts(state.age_B, state.latents_B, W)
    visible_since_B = jnp.maximum(state.birth_B, 0)
    window_since_BxW = starts_BxW + state.birth_B[:, None]
    outer = model.outer
    embedded_BxD = outer.condition(outer.embed_last(state.recent_BxL), state.conditioning(model.config))
    embedded_Bx1xD = state.with_wishes(embedded_BxD[:, None])

    rows = [slice(first, first + B // micro_batches) for first in range(0, B, B // micro_batches)]
    attentions = [_attention(model, state, backend, part, W, micro_batches) for part in rows]
    cross, streams = (caches.cross_k, caches.cross_v), []
    contexts = [outer.context_norm(embedded_Bx1xD[part]) for part in rows]
    latents = [outer.latent(embedded_Bx1xD[part]) for part in rows]
    for part, attention, x_Bx1xD, context in zip(rows, attentions, latents, contexts, strict=True):
        found, cross = attention.cross(model.cross, x_Bx1xD, context, cross, visible_since_B[part])
        streams.append(model.cross.add(x_Bx1xD, found))
    streams = [jnp.repeat(x_Bx1xD, W, axis=0) for x_Bx1xD in streams]

    def active_Bx1xD(streams: list[Array]) -> Array:
        return jnp.concatenate(streams)[jnp.arange(B) * W + active_B]

    filled, early, left_B = [], state.early, jnp.zeros(B, bool)
    for depth, (block, *layer) in enumerate(zip(model.blocks, caches.self_k, caches.self_v, strict=False)):
        if early is not None and depth in model.config.exits:
            cheap_B = outer.leaving_cost(active_Bx1xD(streams)[:, 0], depth) < early.tolerance_B
            left_B |= jnp.repeat(cheap_B[0::2] & cheap_B[1::2], 2) if pairs else cheap_B
        cache, after = (layer[0], layer[1]), []
        for part, attention, x_BWx1xD in zip(rows, attentions, streams, strict=True):
            found, cache = attention.within(block, x_BWx1xD, cache, window_since_BxW[part].reshape(-1))
            after.append(_unless(left_B[part], block.add(x_BWx1xD, found), x_BWx1xD, early))
        streams = after
        filled.append(cache)
        if early is not None:
            early = early._replace(layers_run_B=early.layers_run_B + ~(left_B | state.ended_B))
    caches = Caches(*cross, *zip(*filled, strict=True))
    logits_BxV = outer.logits(active_Bx1xD(streams))[:, 0]
    return logits_BxV, state._replace(clock_B=state.clock_B + 1, caches=caches, early=early)


def _unless(left_B: Array, after_BWx1xD: Array, before_BWx1xD: Array, early: EarlyExit | None) -> Array:
    """The stream after a block, in rows that have not left."""
    if early is None:
        return after_BWx1xD
    left_BW = jnp.repeat(left_B, after_BWx1xD.shape[0] // left_B.shape[0])
    return jnp.where(left_BW[:, None, None], before_BWx1xD, after_BWx1xD)


def _attention(
    model: DecodingModel, state: DecodeState, backend: Backend, rows: slice, windows: int, micro_batches: int
) -> StepAttention:
    """The attention of some rows."""
    positions_BxP = jnp.stack([state.age_B, state.keyboard.time], axis=-1)[rows]
    if backend.attention == "plain":
        return PlainAttention(state.clock_B[rows], positions_BxP, windows)
    from music_ar.decoding.pallas_attention import PallasAttention

    return PallasAttention(
        model.config,
        state.clock_B[rows],
        positions_BxP,
        windows,
        first=rows.start,
        overlapped=micro_batches > 1,
        interpreted=backend.attention == "interpreted",
    )
