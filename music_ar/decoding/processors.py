"""Logit processors, applied to a model's logits before a token is drawn.

`PROCESSORS` is the chain, in order. To add one, write a small class with `__call__(logits, state, options)`, add it to
the chain, and test it on its own (tests/test_processors.py). Options are read from `SamplingOptions` by name.

Dimension key, in addition to that of `music_ar.model.config`: C token types, W the size of the largest.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from music_ar.decoding import history_bias
from music_ar.decoding.interface import Options
from music_ar.decoding.state import DecodeState
from music_ar.features import gap, keyboard
from music_ar.features.keyboard import Keyboard
from music_ar.tokens import grammar, vocabulary

LONGEST_HOLD_STEPS = 800
"""Longest time that a generated note may sound: 8 s. 99.84 % of the notes of MAESTRO's train split are no longer."""
LONGEST_SILENCE_STEPS = 300
"""Longest silence in generated music: 3 s. Of the pieces of MAESTRO's train split, 3.5 % have a longer one in their
first two minutes."""
_FINGERS_STEPS = 200  # keys struck within this time may still be held by the fingers when the pedal is released


@runtime_checkable
class LogitProcessor(Protocol):
    """One link of the chain."""

    def __call__(self, logits_BxV: Float[Array, "B V"], state: DecodeState, options: Options) -> Float[Array, "B V"]:
        """The logits of the token after the pending one; -inf for tokens that must not be drawn."""
        ...


class HistoryBias:
    """Biases logits towards the notes that the piece has had, with the option `steadiness` as strength."""

    def __call__(self, logits_BxV: Float[Array, "B V"], state: DecodeState, options: Options) -> Float[Array, "B V"]:
        """See `history_bias.biased`."""
        return history_bias.biased(logits_BxV, state.history, options["steadiness"])


class Grammar:
    """Rules out tokens that the event grammar does not allow or a piano cannot play."""

    def __call__(self, logits_BxV: Float[Array, "B V"], state: DecodeState, options: Options) -> Float[Array, "B V"]:
        """See `grammar.playable_tokens`; it knows no tokens of gaps."""
        del options
        playable_BxV = grammar.playable_tokens(state.grammar)
        playable_BxV = jnp.pad(playable_BxV, ((0, 0), (0, logits_BxV.shape[1] - playable_BxV.shape[1])))
        return jnp.where(playable_BxV, logits_BxV, -jnp.inf)


class GapEnd:
    """Ends a gap exactly: a wait beyond its end is a wait up to it, and there it is marked, whatever is held.

    After that, what is held is released, and the piece ends with the last release.
    """

    def __call__(self, logits_BxV: Float[Array, "B V"], state: DecodeState, options: Options) -> Float[Array, "B V"]:
        """The logits, the same in rows without a gap."""
        del options
        if state.gap is None:
            return logits_BxV
        left_B, counts_B = gap.steps_left(state.gap, state.keyboard.time)
        left_Bx1, counts_Bx1, over_Bx1 = (each[:, None] for each in (left_B, counts_B, state.gap.over))
        token_1xV = jnp.arange(logits_BxV.shape[1])[None]
        is_shift_1xV = vocabulary.is_shift(token_1xV)
        beyond_BxV = jnp.where(is_shift_1xV, token_1xV - (vocabulary.TIME_SHIFT - 1) - left_Bx1, -1)
        waits_Bx1 = jax.nn.logsumexp(jnp.where(beyond_BxV >= 0, logits_BxV, -jnp.inf), axis=1, keepdims=True)
        logits_BxV = jnp.where(counts_Bx1 & (beyond_BxV == 0), waits_Bx1, logits_BxV)
        logits_BxV = jnp.where(counts_Bx1 & ((beyond_BxV > 0) | (token_1xV == vocabulary.END)), -jnp.inf, logits_BxV)
        is_off_1xV = (token_1xV >= vocabulary.NOTE_OFF) & (token_1xV < vocabulary.TIME_SHIFT)
        logits_BxV = jnp.where(over_Bx1 & ~(is_shift_1xV | is_off_1xV), -jnp.inf, logits_BxV)
        silent_B = (state.held_Bx128 == 0).all(axis=1)
        logits_BxV = _only(logits_BxV, counts_B & (left_B <= 0), vocabulary.END_OF_GAP)
        return _only(logits_BxV, state.gap.over & silent_B, vocabulary.END)


class SilenceLimit:
    """Rules out time shifts once nothing has sounded for `LONGEST_SILENCE_STEPS`; an opening silence counts too."""

    def __call__(self, logits_BxV: Float[Array, "B V"], state: DecodeState, options: Options) -> Float[Array, "B V"]:
        """The logits, without time shifts in silent rows."""
        del options
        begin_B = jnp.zeros_like(state.keyboard.time) if state.gap is None else state.gap.begin
        silent_Bx1 = is_silent(state.keyboard, state.held_Bx128, begin_B)[:, None]
        is_shift_1xV = vocabulary.is_shift(jnp.arange(logits_BxV.shape[1]))[None]
        return jnp.where(silent_Bx1 & is_shift_1xV, -jnp.inf, logits_BxV)


class StuckNotes:
    """Allows nothing but note-offs where a note has been held for `LONGEST_HOLD_STEPS`.

    A model that once forgets to release the pedal has not learned to release it later: without this, dozens of notes
    would sound for half a minute (docs/results/evaluation.md).
    """

    def __call__(self, logits_BxV: Float[Array, "B V"], state: DecodeState, options: Options) -> Float[Array, "B V"]:
        """Only the releases that are due, in rows where the grammar allows any."""
        del options
        due_Bx128 = stuck_notes(state.keyboard, state.held_Bx128)
        after = logits_BxV.shape[1] - vocabulary.NOTE_OFF - vocabulary.PITCHES
        due_BxV = jnp.pad(due_Bx128, ((0, 0), (vocabulary.NOTE_OFF, after)))
        # No release may follow a note-on at the end of a prompt; the releases then come after the next time shift.
        due_BxV &= logits_BxV > -jnp.inf
        return jnp.where(due_BxV | ~due_BxV.any(axis=1, keepdims=True), logits_BxV, -jnp.inf)


class PitchRange:
    """Rules out note-ons outside the keyboard, by the options `lowest_pitch` and `highest_pitch`."""

    def __call__(self, logits_BxV: Float[Array, "B V"], state: DecodeState, options: Options) -> Float[Array, "B V"]:
        """Only pitches in the range, unless nothing else could follow: all of them held, and a velocity before."""
        del state
        pitch_1xV = jnp.arange(logits_BxV.shape[1])[None] - vocabulary.NOTE_ON
        lowest, highest = (options[name].reshape(-1, 1) for name in ("lowest_pitch", "highest_pitch"))
        outside = vocabulary.is_note_on(pitch_1xV + vocabulary.NOTE_ON) & ((pitch_1xV < lowest) | (pitch_1xV > highest))
        masked_BxV = jnp.where(outside, -jnp.inf, logits_BxV)
        return jnp.where((masked_BxV > -jnp.inf).any(axis=1, keepdims=True), masked_BxV, logits_BxV)


class TypeFilters:
    """Temperature, then top-k, top-p and min-p within each token type; a type's likeliest token always stays.

    Filtered together, rare types would vanish where another type is likely, and pieces would come out slow and sparse
    (docs/results/evaluation.md). Top-p is that of Holtzman et al. (arXiv 1904.09751), min-p that of Nguyen et al.
    (arXiv 2407.01082).
    """

    def __call__(self, logits_BxV: Float[Array, "B V"], state: DecodeState, options: Options) -> Float[Array, "B V"]:
        """The logits divided by the temperature, -inf for tokens that are filtered out."""
        del state
        names = ("temperature", "top_k", "top_p", "min_p")
        temperature, top_k, top_p, min_p = (options[name].reshape(-1, 1, 1) for name in names)
        types = jnp.split(
            logits_BxV, [start for start in vocabulary.TYPE_STARTS if start < logits_BxV.shape[1]], axis=1
        )
        W = max(each.shape[1] for each in types)
        padded = [jnp.pad(each, ((0, 0), (0, W - each.shape[1])), constant_values=-jnp.inf) for each in types]
        # A temperature of 0 is the limit: the likeliest stays, everything else is infinitely far below it.
        scaled_BxCxW = jnp.stack(padded, axis=1) / jnp.maximum(temperature, 1e-6)
        falling_BxCxW = jnp.sort(scaled_BxCxW, axis=-1, descending=True)
        highest_BxCx1 = jnp.maximum(falling_BxCxW[..., :1], jnp.finfo(jnp.float32).min)  # finite where all are -inf
        top_k = jnp.where(top_k == 0, logits_BxV.shape[1], top_k)
        in_top_k_BxCxW = jnp.arange(W)[None, None] < top_k
        mass_BxCxW = jnp.where(in_top_k_BxCxW, jnp.exp(falling_BxCxW - highest_BxCx1), 0)
        before_BxCxW = jnp.cumsum(mass_BxCxW, axis=-1) - mass_BxCxW
        # Rounding may make the running sum reach the total a little early: at top_p = 1, nothing is cut.
        in_top_p_BxCxW = (before_BxCxW < top_p * mass_BxCxW.sum(axis=-1, keepdims=True)) | (top_p >= 1)
        kept_BxCxW = in_top_k_BxCxW & in_top_p_BxCxW & (falling_BxCxW >= highest_BxCx1 + jnp.log(min_p))
        lowest_BxCx1 = jnp.min(jnp.where(kept_BxCxW, falling_BxCxW, jnp.inf), axis=-1, keepdims=True)
        cut_BxCxW = jnp.where(scaled_BxCxW >= jnp.minimum(lowest_BxCx1, highest_BxCx1), scaled_BxCxW, -jnp.inf)
        return jnp.concatenate([cut_BxCxW[:, index, : each.shape[1]] for index, each in enumerate(types)], axis=1)


PROCESSORS: tuple[LogitProcessor, ...] = (
    HistoryBias(),
    Grammar(),
    GapEnd(),
    SilenceLimit(),
    StuckNotes(),
    PitchRange(),
    TypeFilters(),
)
"""The chain, in the order in which it is applied."""


def draw(rng_B: Array, logits_BxV: Float[Array, "B V"], state: DecodeState, options: Options) -> Int[Array, " B"]:
    """Draw one token per row: apply the chain, then draw with the row's own key."""
    for process in PROCESSORS:
        logits_BxV = process(logits_BxV, state, options)
    return jax.vmap(jax.random.categorical)(rng_B, logits_BxV).astype(jnp.int32)


def _only(logits_BxV: Float[Array, "B V"], rows_B: Bool[Array, " B"], token: int) -> Float[Array, "B V"]:
    """The logits, in some rows those of one token alone."""
    alone_1xV = jnp.where(jnp.arange(logits_BxV.shape[1]) == token, 0.0, -jnp.inf)[None]
    return jnp.where(rows_B[:, None], alone_1xV, logits_BxV)


def stuck_notes(state: Keyboard, held: Int[Array, "B 128"]) -> Bool[Array, "B 128"]:
    """Keys that must be released before anything else; none, unless one has been held for `LONGEST_HOLD_STEPS`.

    Only the pedal holds a key that long, and a pianist who lifts it releases all notes except those just struck. So all
    keys that have been down for `_FINGERS_STEPS` are released. The keys held too long go last, since they are what
    triggers the release. (Performances are encoded in the opposite order, by onset; that would need extra state.)

    Args:
        state: the keyboard.
        held: number of held notes of each key.
    """
    # The age of a key that was struck twice and released once counts from its release.
    age = jnp.where(held > 0, keyboard.steps_since_event(state), -1)
    too_long = age >= LONGEST_HOLD_STEPS
    others = (age >= _FINGERS_STEPS) & ~too_long & too_long.any(axis=-1, keepdims=True)
    return jnp.where(others.any(axis=-1, keepdims=True), others, too_long)


def is_silent(state: Keyboard, held: Int[Array, "B 128"], begin: Int[Array, " B"]) -> Bool[Array, " B"]:
    """Whether nothing has sounded for `LONGEST_SILENCE_STEPS`; an opening silence counts too.

    Args:
        state: the keyboard.
        held: number of held notes of each key.
        begin: time at which the timeline began.
    """
    last_event = jnp.maximum(keyboard.last_event_steps(state).max(axis=-1), begin)
    return (held.sum(axis=-1) == 0) & (state.time - last_event >= LONGEST_SILENCE_STEPS)
