"""The event grammar: which token may follow which.

Like every recurrence over tokens, the grammar has `init`, the state before the first token; `step`, the state after one
more; and `scan`, the state after a whole sequence. The functions take NumPy or JAX arrays.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Integer

from music_ar.tokens.vocabulary import (
    END,
    MAX_SHIFT_STEPS,
    NOTE_OFF,
    NOTE_ON,
    PAD,
    PITCHES,
    SEPARATOR,
    TIME_SHIFT,
    VELOCITY,
    VELOCITY_BINS,
    VOCABULARY_SIZE,
    flat_integers,
    is_note,
    is_note_on,
    is_velocity,
)


class GrammarState(NamedTuple):
    """What the next token depends on; any leading batch shape.

    Attributes:
      held: `int32 [..., 128]`, number of held notes of each pitch.
      velocity: `int32 [...]`, the velocity bin in force, 0 before the first.
      previous: `int32 [...]`, the last token that was not `PAD`, -1 before the first.
    """

    held: Any
    velocity: Any
    previous: Any


def init(batch_shape: tuple[int, ...] = ()) -> GrammarState:
    """The state before the first token, where only `START` is allowed (NumPy)."""
    return GrammarState(
        held=np.zeros((*batch_shape, PITCHES), np.int32),
        velocity=np.zeros(batch_shape, np.int32),
        previous=np.full(batch_shape, -1, np.int32),
    )


def step(state: GrammarState, token: Integer[Any, "*batch"]) -> GrammarState:
    """The state after `token`, allowed or not. `PAD` changes nothing, so sequences may be padded on either side.

    After `SEPARATOR`, nothing is held and no velocity is in force.
    """
    xp = state.held.__array_namespace__()
    held, velocity, previous = state
    event: Any = xp.asarray(token, dtype=xp.int32)
    goes_on = event != SEPARATOR
    held, velocity = held * goes_on[..., None].astype(held.dtype), velocity * goes_on.astype(velocity.dtype)
    pitches = xp.arange(PITCHES).reshape((1,) * event.ndim + (PITCHES,))
    begins = event[..., None] - NOTE_ON == pitches
    ends = (event[..., None] - NOTE_OFF == pitches) & (held > 0)
    return GrammarState(
        held=held + begins.astype(held.dtype) - ends.astype(held.dtype),
        velocity=xp.where(is_velocity(event), event - (VELOCITY - 1), velocity).astype(velocity.dtype),
        previous=xp.where(event == PAD, previous, event).astype(previous.dtype),
    )


def scan(tokens: Integer[np.ndarray, " T"]) -> GrammarState:
    """The state after a whole sequence: `step` folded over it from `init`, in NumPy."""
    tokens = flat_integers(tokens)
    separators = np.flatnonzero(tokens == SEPARATOR)
    if len(separators):
        tokens = tokens[separators[-1] :]
    notes = tokens[is_note(tokens)]
    notes = notes[by_pitch(notes)]
    pitch, note_on = notes % PITCHES, notes < NOTE_OFF
    counts = note_on | ~stray_note_offs(pitch, note_on)
    held = np.bincount(pitch[note_on], minlength=PITCHES) - np.bincount(pitch[~note_on & counts], minlength=PITCHES)
    velocities = tokens[is_velocity(tokens)]
    real = tokens[tokens != PAD]
    return GrammarState(
        held=held.astype(np.int32),
        velocity=np.int32(velocities[-1] - (VELOCITY - 1) if len(velocities) else 0),
        previous=np.int32(real[-1] if len(real) else -1),
    )


def allowed_tokens(state: GrammarState) -> Bool[Any, "*batch 391"]:
    """Mask of the tokens that may come next in a sequence of `START`, the `encode` of some performance, and `END`.

    - `START` is the first token and comes nowhere else; `END` is followed only by `PAD`, which comes nowhere else.
    - A note-on needs a velocity in force. A velocity token must change it, and must be followed by a note-on.
    - A note-off needs a held note of its pitch. Within a step, no note-off comes after a note-on.
    - A time shift may follow another only if the first one has full length.
    - `END` comes after the note-off that ends the last held note.
    """
    xp = state.held.__array_namespace__()
    held, velocity, previous = state
    unstarted, ended = previous == -1, previous == END
    after_on = is_note_on(previous)
    after_off = (previous >= NOTE_OFF) & (previous < TIME_SHIFT)
    after_short_shift = (previous >= TIME_SHIFT) & (previous < TIME_SHIFT + MAX_SHIFT_STEPS - 1)
    playing = ~(unstarted | ended)
    free = playing & ~is_velocity(previous)

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


def playable_tokens(state: GrammarState) -> Bool[Any, "*batch 391"]:
    """Mask of the tokens that may be sampled next: the allowed ones, except note-ons of held pitches.

    On a piano, striking a key again ends the note that the pedal held, so MAESTRO's performances almost never hold a
    pitch twice (6 of 7,040,164 note-ons do). A model that does it once tends to do it again, which leaves notes
    sounding forever.
    """
    xp = state.held.__array_namespace__()
    rest = xp.zeros((*state.velocity.shape, VOCABULARY_SIZE - PITCHES), dtype=bool)
    return allowed_tokens(state) & ~xp.concatenate([state.held > 0, rest], axis=-1)


def by_pitch(note_tokens: Int64[np.ndarray, " e"]) -> Int64[np.ndarray, " e"]:
    """Order of note-ons and note-offs by pitch, then by position."""
    return np.argsort((note_tokens % PITCHES).astype(np.int8), kind="stable")  # int8: a radix sort


def stray_note_offs(pitch: Int64[np.ndarray, " e"], note_on: Bool[np.ndarray, " e"]) -> Bool[np.ndarray, " e"]:
    """Mask of note-offs without a held note, for note events sorted by pitch and then by time.

    Let S count a pitch's note-ons minus its note-offs. A note-off is stray exactly where S falls below zero and below
    everything before it. One cumulative sum covers all pitches: each pitch's walk starts far below the previous one.
    """
    walk = np.cumsum(np.where(note_on, 1, -1))
    first = np.searchsorted(pitch, pitch)  # index of the pitch's first event
    floor = -pitch * (2 * len(pitch) + 2)
    walk = floor + walk - np.append(0, walk)[first]
    lowest_before = np.minimum(floor, np.append(0, np.minimum.accumulate(walk))[:-1])
    return walk < lowest_before
