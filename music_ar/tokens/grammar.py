"""Which event tokens may follow which."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Integer

from music_ar.tokens.vocabulary import (
    END,
    EVENT_CLASSES,
    MAX_SHIFT_STEPS,
    NOTE_OFF,
    NOTE_ON,
    PAD,
    PITCHES,
    TIME_SHIFT,
    VELOCITY,
    VELOCITY_BINS,
    VOCABULARY_SIZE,
    _flat_integers,
    is_on,
    is_velocity,
)


def _by_pitch(note_tokens: Int64[np.ndarray, " e"]) -> Int64[np.ndarray, " e"]:
    """The order of note-ons and note-offs by pitch, then by position."""
    return np.argsort((note_tokens % PITCHES).astype(np.int8), kind="stable")  # int8: a radix sort


def _stray_offs(pitch: Int64[np.ndarray, " e"], is_on: Bool[np.ndarray, " e"]) -> Bool[np.ndarray, " e"]:
    """Which note-offs find nothing held, for note events sorted by pitch and then by time.

    Per pitch let S count note-ons less note-offs. A note-off is stray exactly where S falls below zero and below
    everything before it. To do this for all pitches at once, each pitch's walk begins far below the one before it.
    """
    walk = np.cumsum(np.where(is_on, 1, -1))
    first = np.searchsorted(pitch, pitch)  # index of the pitch's first event
    floor = -pitch * (2 * len(pitch) + 2)
    walk = floor + walk - np.append(0, walk)[first]
    lowest_before = np.minimum(floor, np.append(0, np.minimum.accumulate(walk))[:-1])
    return walk < lowest_before


class GrammarState(NamedTuple):
    """What the next event depends on; any leading batch shape. See `advance` and `allowed_events`.

    Attributes:
      held: `int32 [..., 128]`, how many notes of each pitch are held.
      velocity: `int32 [...]`, the velocity bin in force, 0 before the first.
      previous: `int32 [...]`, the last token that was not `PAD`, -1 before the first.
    """

    held: Any
    velocity: Any
    previous: Any


def grammar_start(batch_shape: tuple[int, ...] = (), xp: Any = np) -> GrammarState:
    """The state before the first token, where only `START` may come.

    Args:
      batch_shape: leading axes of the state.
      xp: the array module, `numpy` or `jax.numpy`.
    """
    return GrammarState(
        held=xp.zeros((*batch_shape, PITCHES), xp.int32),
        velocity=xp.zeros(batch_shape, xp.int32),
        previous=xp.full(batch_shape, -1, xp.int32),
    )


def allowed_events(state: GrammarState, xp: Any = np) -> Bool[Any, "*batch 391"]:
    """Which tokens may come next: exactly what `START`, `encode` of some performance and `END` can hold there.

    - The first token is `START`, and only the first; after `END` nothing but `PAD`, and `PAD` nowhere else.
    - A note-on needs a velocity in force. A velocity differs from the one in force and a note-on follows it.
    - A note-off needs a held note of its pitch, and in a step no note-off comes after a note-on.
    - A shift follows a shift only if that one has the full length.
    - `END` comes after the note-off that ends the last held note.

    The rules look at one state only; `advance` takes it from token to token. Both are pure array operations, so
    the same rule filters logits under `jax.jit` and checks arrays in the tests.
    """
    held, velocity, previous = state
    unstarted, ended = previous == -1, previous == END
    after_on = is_on(previous)
    after_off = (previous >= NOTE_OFF) & (previous < TIME_SHIFT)
    after_short_shift = (previous >= TIME_SHIFT) & (previous < TIME_SHIFT + MAX_SHIFT_STEPS - 1)
    after_velocity = is_velocity(previous)
    playing = ~(unstarted | ended)
    free = playing & ~after_velocity

    def row(permission: Any, width: int) -> Any:
        return xp.broadcast_to(permission[..., None], (*permission.shape, width))

    bins = xp.arange(1, VELOCITY_BINS + 1).reshape((1,) * velocity.ndim + (VELOCITY_BINS,))
    return xp.concatenate(
        [
            row(playing & (velocity > 0), PITCHES),
            row(free & ~after_on, PITCHES) & (held > 0),
            row(free & ~after_short_shift, MAX_SHIFT_STEPS),
            row(free, VELOCITY_BINS) & (bins != velocity[..., None]),
            row(ended, 1),
            row(unstarted, 1),
            row(after_off & (held == 0).all(axis=-1), 1),
        ],
        axis=-1,
    )


def playable_events(state: GrammarState, xp: Any = np) -> Bool[Any, "*batch 391"]:
    """Which tokens may be drawn next: those allowed, but no note-on of a pitch that is held.

    A key struck again ends the note that the pedal held, so MAESTRO's performances do not hold a pitch twice (6 of its
    7,040,164 note-ons do). A model that once slips into it goes on so, and leaves notes sounding for ever.
    """
    struck = xp.concatenate(
        [state.held > 0, xp.zeros((*state.velocity.shape, VOCABULARY_SIZE - PITCHES), bool)], axis=-1
    )
    return allowed_events(state, xp) & ~struck


def advance(state: GrammarState, token: Integer[Any, "*batch"] | int, xp: Any = np) -> GrammarState:
    """The state after `token`, allowed or not; `PAD` changes nothing, so neither does padding on either side."""
    held, velocity, previous = state
    event: Any = xp.asarray(token, xp.int32)
    pitches = xp.arange(PITCHES).reshape((1,) * event.ndim + (PITCHES,))
    begins = event[..., None] - NOTE_ON == pitches
    ends = (event[..., None] - NOTE_OFF == pitches) & (held > 0)
    is_velocity = (event >= VELOCITY) & (event < EVENT_CLASSES)
    return GrammarState(
        held=held + begins.astype(held.dtype) - ends.astype(held.dtype),
        velocity=xp.where(is_velocity, event - (VELOCITY - 1), velocity).astype(velocity.dtype),
        previous=xp.where(event == PAD, previous, event).astype(previous.dtype),
    )


def grammar_after(tokens: Integer[np.ndarray, " T"]) -> GrammarState:
    """The state after a token sequence: `advance` from `grammar_start`, over all tokens at once."""
    tokens = _flat_integers(tokens)
    notes = tokens[(tokens >= 0) & (tokens < TIME_SHIFT)]
    notes = notes[_by_pitch(notes)]
    pitch, is_on = notes % PITCHES, notes < NOTE_OFF
    counts = is_on | ~_stray_offs(pitch, is_on)
    held = np.bincount(pitch[is_on], minlength=PITCHES) - np.bincount(pitch[~is_on & counts], minlength=PITCHES)
    velocities = tokens[(tokens >= VELOCITY) & (tokens < EVENT_CLASSES)]
    real = tokens[tokens != PAD]
    return GrammarState(
        held=held.astype(np.int32),
        velocity=np.int32(velocities[-1] - (VELOCITY - 1) if len(velocities) else 0),
        previous=np.int32(real[-1] if len(real) else -1),
    )
