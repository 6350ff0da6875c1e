"""Cached decoding, one token at a time, under a latent budget.

The latent budget n is how many latents may stand behind a prediction. Training computes the latent at time t in a
window that began at some earlier time s; a cached latent is exact only for the s it was computed with, so dropping
the oldest latent of a full window would not be what the model was trained to do. Instead two windows run side by
side, staggered by n / 2. Each begins anew every n tokens, so one of them always holds n / 2 to n latents, and that
one makes the prediction:

    time      0      n/2      n      3n/2     2n
    window 0  [---------------)[---------------)
    window 1         [---------------)[-----------
    predicts  0       0       1       0       1

The keys and values of the cross-attention depend on nothing but the token, its near predecessors and its position:
they are computed once and kept in a ring of the last M. A window is a ring too; when it begins anew nothing is
moved, its older entries are masked.

Dimension key, beside that of `model.py`: P prompt tokens, R latents that a window's ring can hold, W conv taps,
Q query heads that share a key head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from music_ar import events
from music_ar.model import Block, PerceiverAR
from music_ar.sampling import Filters, sample

WINDOWS = 2
_NEVER = np.int32(2**30)


class Caches(NamedTuple):
    """Rotated keys and values; each is laid out so that a step reads it in order.

    Batch, window and key head are one axis. That is not for brevity: XLA drops an axis of length 1 (a batch of one)
    by a reshape, fuses the reshape with the write of the new entry, and then copies the whole cache at each token.

    Attributes:
        cross_k, cross_v: of the inputs, [B G, K, M] and [B G, M, K]; time t is in slot t mod M.
        self_k, self_v: of the latents, one array a layer, [B 2 G, K, R] and [B 2 G, R, K].
    """

    cross_k: Float[Array, "BG K M"]
    cross_v: Float[Array, "BG M K"]
    self_k: tuple[Float[Array, "B2G K R"], ...]
    self_v: tuple[Float[Array, "B2G R K"], ...]


class DecodeState(NamedTuple):
    """All that decoding carries from token to token; one pytree, donated to each call.

    The rows of a batch share a clock, so that all write the same slot; each has its own time of birth, and what it
    computes depends on the time since then alone.

    Attributes:
        clock: time of `pending`, counted over the batch.
        birth_B: clock at which the row's piece began; negative if its start lies before what was prefilled.
        half_B: half of the latent budget, n / 2.
        recent_BxW: the last tokens, `pending` last: what the convolution reads.
        caches: keys and values of all tokens before `pending`.
        grammar: what may follow `pending`.
        steps_B: music made so far, in steps of 10 ms.
        limit_B: a row is done once its music is this long.
        keys_B: each row's own source of chance.
        done_B: whether the piece has ended.
    """

    clock: Int[Array, ""]
    birth_B: Int[Array, " B"]
    half_B: Int[Array, " B"]
    recent_BxW: Int[Array, "B W"]
    caches: Caches
    grammar: events.GrammarState
    steps_B: Int[Array, " B"]
    limit_B: Int[Array, " B"]
    keys_B: Array
    done_B: Array


def ring_size(latents: int) -> int:
    """R for a latent budget: the next power of two, so that most budgets share a compilation."""
    return max(8, 1 << (latents - 1).bit_length())


def start(
    model: PerceiverAR,
    prompts: list[Int[np.ndarray, " _P"]],
    *,
    latents: int,
    seeds: list[int],
    limit_steps: int,
) -> DecodeState:
    """A state that holds all of each prompt but its last token, which is pending.

    Args:
        model: the model.
        prompts: one token array a row, each beginning with `events.START`.
        latents: the budget n; at least 2, odd ones act as n - 1.
        seeds: one a row; a row's tokens depend on its own prompt, seed and options alone.
        limit_steps: stop a row when this much music (in steps of 10 ms) follows its prompt.
    """
    config = model.config
    R, W = ring_size(latents), config.conv_width
    longest = max(len(prompt) for prompt in prompts) - 1
    # What a latent still in a window could see, and the taps before that.
    reach = config.context + R + W
    P = 0 if longest == 0 else min(reach, max(16, 1 << (longest - 1).bit_length()))
    tokens_BxP = np.full((len(prompts), P + W), events.PAD, np.int32)
    for row, prompt in zip(tokens_BxP, prompts, strict=True):
        kept = prompt[-(P + W) :]
        row[P + W - len(kept) :] = kept
    grammars = [events.grammar_after(prompt) for prompt in prompts]
    B = len(prompts)
    state = DecodeState(
        clock=jnp.int32(P),
        birth_B=jnp.array([P + 1 - len(prompt) for prompt in prompts], jnp.int32),
        half_B=jnp.full(B, max(1, latents // 2), jnp.int32),
        recent_BxW=jnp.asarray(tokens_BxP[:, P:]),
        caches=_empty_caches(model, B, R),
        grammar=jax.tree.map(lambda *rows: jnp.stack([jnp.asarray(row) for row in rows]), *grammars),
        steps_B=jnp.zeros(B, jnp.int32),
        limit_B=jnp.full(B, limit_steps, jnp.int32),
        keys_B=jnp.stack([jax.random.key(seed) for seed in seeds]),
        done_B=jnp.zeros(B, bool),
    )
    if P == 0:
        return state
    graph, params = nnx.split(model)
    return _prefill(graph, params, state, jnp.asarray(tokens_BxP[:, W - 1 : -1]))


def decode(
    model: PerceiverAR, state: DecodeState, filters: Filters, *, length: int
) -> tuple[DecodeState, Int[Array, "B length"]]:
    """Samples up to `length` tokens a row.

    Args:
        model: the model.
        state: where to go on from; donated.
        filters: how to sample.
        length: tokens a row; it is compiled in.

    Returns:
        The state, whose pending tokens are the last sampled, and the tokens, `events.PAD` after a row is done.
    """
    graph, params = nnx.split(model)
    return _decode(graph, params, state, filters, length)


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def _decode(
    graph: nnx.GraphDef[PerceiverAR], params: nnx.State, state: DecodeState, filters: Filters, length: int
) -> tuple[DecodeState, Array]:
    model = nnx.merge(graph, params)

    def unfinished(carry: tuple[Array, DecodeState, Array]) -> Array:
        index, state, _ = carry
        return (index < length) & ~state.done_B.all()

    def one_token(carry: tuple[Array, DecodeState, Array]) -> tuple[Array, DecodeState, Array]:
        index, state, tokens = carry
        logits_BxV, state = step(model, state)
        logits_BxV = jnp.where(events.allowed_events(state.grammar, jnp), logits_BxV, -jnp.inf)
        age_B = state.clock - state.birth_B
        drawn_B = sample(jax.vmap(jax.random.fold_in)(state.keys_B, age_B), logits_BxV, filters)
        state = take(state, drawn_B)
        return index + 1, state, tokens.at[:, index].set(state.recent_BxW[:, -1])

    tokens = jnp.full((state.done_B.shape[0], length), events.PAD, jnp.int32)
    _, state, tokens = jax.lax.while_loop(unfinished, one_token, (jnp.int32(0), state, tokens))
    return state, tokens


def take(state: DecodeState, token_B: Int[Array, " B"]) -> DecodeState:
    """Makes `token_B` pending (`events.PAD` in rows that are done) and keeps the grammar and the time."""
    token_B = jnp.where(state.done_B, events.PAD, token_B)
    is_shift_B = (token_B >= events.TIME_SHIFT) & (token_B < events.VELOCITY)
    steps_B = state.steps_B + jnp.where(is_shift_B, token_B - events.TIME_SHIFT + 1, 0)
    return state._replace(
        recent_BxW=jnp.concatenate([state.recent_BxW[:, 1:], token_B[:, None]], axis=1),
        grammar=events.advance(state.grammar, token_B, jnp),
        steps_B=steps_B,
        done_B=state.done_B | (token_B == events.END) | (steps_B >= state.limit_B),
    )


def step(model: PerceiverAR, state: DecodeState) -> tuple[Float[Array, "B V"], DecodeState]:
    """Runs the pending token through the model: logits of what follows it, and the state one tick later."""
    clock, caches = state.clock, state.caches
    M, R = caches.cross_k.shape[-1], caches.self_k[0].shape[-1]
    B = state.birth_B.shape[0]
    age_B = clock - state.birth_B
    starts_Bx2, active_B = window_starts(age_B, state.half_B)
    seen_BxM = _times(clock, M)[None] >= jnp.maximum(state.birth_B, 0)[:, None]
    times_1xR = _times(clock, R)[None]
    # A window that has not begun sees itself, so that its softmax has a key; nobody reads it.
    in_window_B2xR = times_1xR >= (starts_Bx2 + state.birth_B[:, None]).reshape(-1, 1)
    in_window_B2xR |= times_1xR == clock

    embedded_Bx1xD = model.embed_last(state.recent_BxW)[:, None]
    k, v = model.cross.keys_values(model.context_norm(embedded_Bx1xD), age_B[:, None])
    cross_k, cross_v = _write(caches.cross_k, caches.cross_v, k, v, clock % M)

    def attend_context(block: Block, x_BxTxD: Array, ages_BxT: Array) -> Array:
        q_BxTxHxK = block.queries(x_BxTxD, ages_BxT)
        return block.add(x_BxTxD, _attend(q_BxTxHxK, cross_k, cross_v, seen_BxM), _KEEP)

    x_Bx1xD = attend_context(model.cross, model.latent(embedded_Bx1xD), age_B[:, None])
    x_B2x1xD = jnp.repeat(x_Bx1xD, WINDOWS, axis=0)
    ages_B2x1 = jnp.repeat(age_B, WINDOWS)[:, None]
    further = dict(zip(model.config.cross_depths, model.further_crosses, strict=True))
    self_k, self_v = [], []
    for depth, block in enumerate(model.blocks):
        if depth in further:
            x_Bx2xD = attend_context(further[depth], x_B2x1xD.reshape(B, WINDOWS, -1), ages_B2x1.reshape(B, WINDOWS))
            x_B2x1xD = x_Bx2xD.reshape(x_B2x1xD.shape)
        k, v = block.keys_values(block.attention_norm(x_B2x1xD), ages_B2x1)
        written = _write(caches.self_k[depth], caches.self_v[depth], k, v, clock % R)
        x_B2x1xD = block.add(x_B2x1xD, _attend(block.queries(x_B2x1xD, ages_B2x1), *written, in_window_B2xR), _KEEP)
        self_k.append(written[0])
        self_v.append(written[1])
    predicting_Bx1xD = x_B2x1xD[jnp.arange(B) * WINDOWS + active_B]
    caches = Caches(cross_k, cross_v, tuple(self_k), tuple(self_v))
    return model.logits(predicting_Bx1xD)[:, 0], state._replace(clock=clock + 1, caches=caches)


def window_starts(age_B: Int[Array, " B"], half_B: Int[Array, " B"]) -> tuple[Int[Array, "B 2"], Int[Array, " B"]]:
    """When the two windows that a latent of this age is in began, and which of them predicts.

    Window w begins at the multiples of n / 2 whose number is even (w = 0) or odd (w = 1); before n / 2, window 1
    has not begun.
    """
    count_B = age_B // half_B
    numbers_Bx2 = count_B[:, None] - (count_B[:, None] - jnp.arange(WINDOWS)[None]) % 2
    starts_Bx2 = jnp.where(numbers_Bx2 >= 0, numbers_Bx2 * half_B[:, None], _NEVER)
    return starts_Bx2, jnp.where(count_B == 0, 0, (count_B + 1) % 2)


_KEEP = nnx.Dropout(0.0, deterministic=True)


def _times(clock: Array, size: int) -> Int[Array, " size"]:
    """The time that each slot of a ring holds, once the slot of `clock` is written."""
    return clock - (clock - jnp.arange(size)) % size


def _write(
    k_cache_BGxKxR: Array, v_cache_BGxRxK: Array, k_Bx1xGxK: Array, v_Bx1xGxK: Array, slot: Array
) -> tuple[Array, Array]:
    """The caches with the key and value of one time in `slot`."""
    K = k_Bx1xGxK.shape[-1]
    return (
        jax.lax.dynamic_update_slice_in_dim(k_cache_BGxKxR, k_Bx1xGxK.reshape(-1, K, 1), slot, axis=2),
        jax.lax.dynamic_update_slice_in_dim(v_cache_BGxRxK, v_Bx1xGxK.reshape(-1, 1, K), slot, axis=1),
    )


def _attend(q_BxTxHxK: Array, k_BGxKxR: Array, v_BGxRxK: Array, seen_BxR: Array) -> Float[Array, "B T H K"]:
    """Attention of T queries a row to that row's ring; float32 softmax."""
    B, T, H, K = q_BxTxHxK.shape
    G = k_BGxKxR.shape[0] // B
    q_BGxQxK = q_BxTxHxK.reshape(B, T, G, H // G, K).swapaxes(1, 2).reshape(B * G, -1, K)
    scores = jnp.einsum("eqk,ekr->eqr", q_BGxQxK, k_BGxKxR, preferred_element_type=jnp.float32)
    seen_BGx1xR = jnp.repeat(seen_BxR, G, axis=0)[:, None]
    chances = jax.nn.softmax(jnp.where(seen_BGx1xR, scores * K**-0.5, -jnp.inf), axis=-1)
    found_BGxQxK = jnp.einsum("eqr,erk->eqk", chances.astype(v_BGxRxK.dtype), v_BGxRxK)
    return found_BGxQxK.reshape(B, G, T, H // G, K).swapaxes(1, 2).reshape(B, T, H, K)


def _empty_caches(model: PerceiverAR, B: int, R: int) -> Caches:
    config = model.config
    G, K, M = config.kv_heads, config.head_size, config.context
    layers = range(config.layers)
    return Caches(
        cross_k=jnp.zeros((B * G, K, M), model.dtype),
        cross_v=jnp.zeros((B * G, M, K), model.dtype),
        self_k=tuple(jnp.zeros((B * WINDOWS * G, K, R), model.dtype) for _ in layers),
        self_v=tuple(jnp.zeros((B * WINDOWS * G, R, K), model.dtype) for _ in layers),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(graph: nnx.GraphDef[PerceiverAR], params: nnx.State, state: DecodeState, tokens_BxP: Array) -> DecodeState:
    """Fills the caches with P tokens at once, to what P steps would have left there.

    `tokens_BxP` are left-padded; their last has time clock - 1.
    """
    model = nnx.merge(graph, params)
    config = model.config
    B, P = tokens_BxP.shape
    R = state.caches.self_k[0].shape[-1]
    times_BxP = jnp.broadcast_to(jnp.arange(P)[None], (B, P))
    ages_BxP = times_BxP - state.birth_B[:, None]
    embedded_BxPxD = model.embed(tokens_BxP)
    k_BxPxGxK, v_BxPxGxK = model.cross.keys_values(model.context_norm(embedded_BxPxD), ages_BxP)

    # The R latents from each window's start; those at or after P are in the future and are masked later.
    starts_Bx2, _ = window_starts(P - 1 - state.birth_B, state.half_B)
    rows_Bx2xR = (starts_Bx2 + state.birth_B[:, None])[..., None] + jnp.arange(R)[None, None]
    windows = [
        _prefill_window(model, embedded_BxPxD, k_BxPxGxK, v_BxPxGxK, state.birth_B, rows_Bx2xR[:, window])
        for window in range(WINDOWS)
    ]
    slots_B2xR = rows_Bx2xR.reshape(-1, R) % R
    in_slots = jax.vmap(lambda entries_RxGxK, slots_R: jnp.zeros_like(entries_RxGxK).at[slots_R].set(entries_RxGxK))
    self_k, self_v = [], []
    for layer in zip(*windows, strict=True):  # the two windows' keys and values of one layer
        k_B2xRxGxK, v_B2xRxGxK = (
            in_slots(jnp.stack(pair, axis=1).reshape(-1, *pair[0].shape[1:]), slots_B2xR)
            for pair in zip(*layer, strict=True)
        )
        self_k.append(_key_layout(k_B2xRxGxK))
        self_v.append(_value_layout(v_B2xRxGxK))

    M = config.context
    slots = np.arange(max(0, P - M), P) % M
    cross_k = state.caches.cross_k.at[:, :, slots].set(_key_layout(k_BxPxGxK[:, -M:]))
    cross_v = state.caches.cross_v.at[:, slots].set(_value_layout(v_BxPxGxK[:, -M:]))
    return state._replace(caches=Caches(cross_k, cross_v, tuple(self_k), tuple(self_v)))


def _key_layout(k_BxTxGxK: Array) -> Float[Array, "BG K T"]:
    return k_BxTxGxK.transpose(0, 2, 3, 1).reshape(-1, k_BxTxGxK.shape[-1], k_BxTxGxK.shape[1])


def _value_layout(v_BxTxGxK: Array) -> Float[Array, "BG T K"]:
    return v_BxTxGxK.swapaxes(1, 2).reshape(-1, v_BxTxGxK.shape[1], v_BxTxGxK.shape[-1])


def _prefill_window(
    model: PerceiverAR, embedded_BxPxD: Array, k: Array, v: Array, birth_B: Array, rows_BxR: Array
) -> list[tuple[Array, Array]]:
    """Keys and values [B, R, G, K], a pair a layer, of the latents at times `rows_BxR`."""
    P, M = embedded_BxPxD.shape[1], model.config.context
    times_BxR = jnp.clip(rows_BxR, 0, P - 1)
    ages_BxR = rows_BxR - birth_B[:, None]
    keys_1x1xP = jnp.arange(P)[None, None]
    seen_Bx1xRxP = (keys_1x1xP <= times_BxR[..., None]) & (keys_1x1xP > times_BxR[..., None] - M)
    seen_Bx1xRxP &= (keys_1x1xP >= birth_B[:, None, None]) | (keys_1x1xP == times_BxR[..., None])
    seen_Bx1xRxP = seen_Bx1xRxP[:, None]

    def attend_context(block: Block, x_BxRxD: Array) -> Array:
        q = block.queries(x_BxRxD, ages_BxR)
        return block.add(x_BxRxD, jax.nn.dot_product_attention(q, k, v, mask=seen_Bx1xRxP), _KEEP)

    x_BxRxD = jnp.take_along_axis(embedded_BxPxD, times_BxR[..., None], axis=1)
    x_BxRxD = attend_context(model.cross, model.latent(x_BxRxD))
    further = dict(zip(model.config.cross_depths, model.further_crosses, strict=True))
    filled = []
    for depth, block in enumerate(model.blocks):
        if depth in further:
            x_BxRxD = attend_context(further[depth], x_BxRxD)
        filled.append(block.keys_values(block.attention_norm(x_BxRxD), ages_BxR))
        x_BxRxD = block.attend_self(x_BxRxD, ages_BxR, _KEEP)
    return filled
