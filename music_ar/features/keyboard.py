"""The keyboard after each event: which keys are down, since when, and how hard they were struck.

Event tokens describe changes only. From them alone, a model's layers have to work out at every position which keys are
down, and for how long. All of that follows exactly from the tokens, so `PerceiverAR` gets it as features.

At `SEPARATOR` a new timeline begins (see `music_ar.tokens.gaps`): no key has been touched and no velocity is in force.
Its time runs on from `SEPARATOR_STEPS` after the old one, so that time never decreases.

Dimension key, in addition to that of `music_ar.model.config`: B any batch shape.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer

from music_ar.tokens import vocabulary

VELOCITY_SLOTS = 64
"""A velocity bin is packed into one integer with a time or a pitch: `other * 64 + bin`."""
SEPARATOR_STEPS = 1
"""Time between two timelines, so that what belongs to which follows from its time."""
_HELD_DECAYS_STEPS = (8.0, 32.0, 128.0, 512.0)
_RELEASED_DECAYS_STEPS = (32.0, 256.0)
CHANNELS = vocabulary.PITCHES * (2 + len(_HELD_DECAYS_STEPS) + len(_RELEASED_DECAYS_STEPS))
"""Number of features that `channels` gives."""


class Keyboard(NamedTuple):
    """The state after a token; any leading batch shape.

    Attributes:
        time: in steps of 10 ms.
        velocity: the velocity bin in force, 0 before the first.
        keys: the last event of each key as one number that grows with time: (2 * time + 1) * 64 + velocity bin if it
            was struck, 2 * time * 64 if it was released, -1 if it was not touched yet.
    """

    time: Int[Any, "*B"]
    velocity: Int[Any, "*B"]
    keys: Int[Any, "*B 128"]


def init(batch_shape: tuple[int, ...] = ()) -> Keyboard:
    """The state before the first token."""
    return Keyboard(
        time=np.zeros(batch_shape, np.int32),
        velocity=np.zeros(batch_shape, np.int32),
        keys=np.full((*batch_shape, vocabulary.PITCHES), -1, np.int32),
    )


def step(state: Keyboard, token: Integer[Any, "*B"]) -> Keyboard:
    """The state after one more token; of the control tokens, only `SEPARATOR` changes it."""
    xp = state.keys.__array_namespace__()
    token = xp.asarray(token, dtype=xp.int32)
    time, ends = state.time + _steps(token), token == vocabulary.SEPARATOR
    velocity = xp.where(vocabulary.is_velocity(token), token - (vocabulary.VELOCITY - 1), state.velocity)
    velocity = xp.where(ends, 0, velocity).astype(xp.int32)
    keys = xp.where(ends[..., None], -1, state.keys).astype(xp.int32)
    return Keyboard(time, velocity, xp.maximum(keys, _key_events(token, time, velocity)))


def scan(tokens: Integer[np.ndarray, " T"]) -> Keyboard:
    """The state after a whole sequence, in NumPy."""
    if not len(tokens):
        return init()
    return Keyboard(*(leaf[-1] for leaf in scan_each(tokens)))


def scan_each(tokens: Integer[Any, "*B T"]) -> Keyboard:
    """The state after each token of sequences, [*B, T]; keys are taken as untouched before that."""
    xp = tokens.__array_namespace__()
    tokens = xp.asarray(tokens, dtype=xp.int32)
    time, velocity = times_and_velocities(tokens)
    keys = running_max(_key_events(tokens, time, velocity), tokens.ndim - 1)
    begin = running_max(xp.where(tokens == vocabulary.SEPARATOR, time, 0), tokens.ndim - 1)
    keys = xp.where(keys < 2 * begin[..., None] * VELOCITY_SLOTS, -1, keys)  # those of an earlier timeline
    return Keyboard(time, velocity, keys.astype(xp.int32))


def times_and_velocities(tokens: Integer[Any, "*B T"]) -> tuple[Any, Any]:
    """Time in steps after each token of sequences, and the velocity bin in force, 0 before the first."""
    xp = tokens.__array_namespace__()
    tokens = xp.asarray(tokens, dtype=xp.int32)
    time_axis = tokens.ndim - 1
    time = xp.cumsum(_steps(tokens), axis=time_axis).astype(xp.int32)
    # The latest velocity is the largest of (index, bin); at a separator, the bin is 0.
    index = xp.broadcast_to(xp.arange(tokens.shape[-1]).astype(xp.int32), tokens.shape)
    is_velocity = vocabulary.is_velocity(tokens)
    packed = index * VELOCITY_SLOTS + xp.where(is_velocity, tokens - (vocabulary.VELOCITY - 1), 0)
    sets = is_velocity | (tokens == vocabulary.SEPARATOR)
    latest = running_max(xp.where(sets, packed, 0).astype(xp.int32), time_axis)
    return time, latest % VELOCITY_SLOTS


def channels(state: Keyboard) -> Float[Any, "*B _"]:
    """Features of each key, from 0 to 1: whether it is down, how hard and how recently it was struck or released.

    Recency decays exponentially, with several time constants. Only time differences enter.
    """
    xp = state.keys.__array_namespace__()
    touched, down = state.keys >= 0, (state.keys // VELOCITY_SLOTS) % 2 == 1
    age = steps_since_event(state).astype(xp.float32)
    held, released = (touched & down).astype(xp.float32), (touched & ~down).astype(xp.float32)
    parts = [
        held,
        held * (state.keys % VELOCITY_SLOTS).astype(xp.float32) / vocabulary.VELOCITY_BINS,
        *(held * xp.exp(-age / decay) for decay in _HELD_DECAYS_STEPS),
        *(released * xp.exp(-age / decay) for decay in _RELEASED_DECAYS_STEPS),
    ]
    return xp.concatenate(parts, axis=-1)


def steps_since_event(state: Keyboard) -> Int[Any, "*B 128"]:
    """Steps since the last event of each key; since the beginning for a key that was not touched."""
    return state.time[..., None] - last_event_steps(state)


def last_event_steps(state: Keyboard) -> Int[Any, "*B 128"]:
    """Time of the last event of each key, 0 for a key that was not touched."""
    xp = state.keys.__array_namespace__()
    return xp.maximum(state.keys, 0) // (2 * VELOCITY_SLOTS)


def running_max(x: Any, axis: int) -> Any:
    """Cumulative maximum along an axis."""
    if isinstance(x, np.ndarray):
        return np.maximum.accumulate(x, axis=axis)
    from jax import lax  # much faster than jax.numpy.maximum.accumulate

    return lax.cummax(x, axis=axis)


def _steps(tokens: Any) -> Any:
    """By how much each token advances time."""
    xp = tokens.__array_namespace__()
    shift = xp.where(vocabulary.is_shift(tokens), tokens - (vocabulary.TIME_SHIFT - 1), 0)
    return xp.where(tokens == vocabulary.SEPARATOR, SEPARATOR_STEPS, shift).astype(xp.int32)


def _key_events(tokens: Any, time: Any, velocity: Any) -> Any:
    """`Keyboard.keys` as each token alone would set it, [*B, 128]; -1 where it touches no key."""
    xp = tokens.__array_namespace__()
    pitches = xp.arange(vocabulary.PITCHES).reshape((1,) * tokens.ndim + (vocabulary.PITCHES,))
    struck = (2 * time + 1) * VELOCITY_SLOTS + velocity
    number = xp.where(vocabulary.is_note_on(tokens), struck, 2 * time * VELOCITY_SLOTS)
    pitch = xp.where(vocabulary.is_note(tokens), tokens % vocabulary.PITCHES, -1)
    return xp.where(pitch[..., None] == pitches, number[..., None], -1).astype(xp.int32)
