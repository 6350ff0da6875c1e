"""What the keyboard is like after each event: keys that are down, since when and how hard; the last notes struck.

Event tokens tell of changes alone. Which keys are down, how long ago each was struck, how much time lies between the
last onsets: a model that reads tokens has to add all this up in its layers, again at every place. It follows from the
tokens exactly, so `PerceiverAR` is told it at each position, as `channels` and `classes`.

The rules look at the tokens so far and at nothing else, so they are as causal as an embedding. `after_each` applies
them to whole sequences at once, `advance` from token to token; both do the same (tests/test_keyboard.py).

Dimension key, beside that of `model.py`: L onsets that are remembered, F features.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from music_ar.tokens import vocabulary

MAX_STEP = 2**23
"""The latest time that `Keyboard.keys` has room for, in steps: 23 hours."""
_DECAYS_STEPS = (8.0, 32.0, 128.0, 512.0)
_RELEASED_DECAYS_STEPS = (32.0, 256.0)
CHANNELS = vocabulary.PITCHES * (2 + len(_DECAYS_STEPS) + len(_RELEASED_DECAYS_STEPS))
"""How many numbers `channels` gives."""
_INTERVALS = 48  # classes of the time between two events: exact for the shortest, up to 8 s
_VELOCITIES = vocabulary.VELOCITY_BINS + 1
NOTE_FEATURES = vocabulary.PITCHES + _VELOCITIES + _INTERVALS
"""How many classes `note_classes` knows, for each note."""
ROOM = 64
"""For a velocity bin beside a time or a pitch in one integer."""
LONGEST_HOLD_STEPS = 800
"""What a key may be held for in what is made: 8 s, as 99.84 % of the notes of MAESTRO's train split are."""
LONGEST_PAUSE_STEPS = 300
"""How long nothing may sound in what is made: 3 s. Of the pieces of MAESTRO's train split, 3.5 % pause for longer in
their first two minutes."""
_FINGERS_STEPS = 200  # what fingers may hold on to when the pedal is released


class Keyboard(NamedTuple):
    """The keyboard after a token; any leading batch shape.

    Attributes:
        step: the time, in steps of 10 ms.
        velocity: the velocity bin in force, 0 before the first.
        keys: the last event of each key as one number that grows with time: (2 step + 1) 64 + velocity bin where it
            went down, 2 step 64 where it went up, -1 if it was not touched yet.
        onset_step: the times of the last L note-ons, newest first.
        onset_note: their pitch 64 + velocity bin, -1 where there were fewer.
    """

    step: Int[Any, "*B"]
    velocity: Int[Any, "*B"]
    keys: Int[Any, "*B 128"]
    onset_step: Int[Any, "*B L"]
    onset_note: Int[Any, "*B L"]


def untouched(batch_shape: tuple[int, ...], onsets: int, xp: Any = np) -> Keyboard:
    """The keyboard before the first token.

    Args:
        batch_shape: leading axes.
        onsets: L.
        xp: the array module, `numpy` or `jax.numpy`.
    """
    return Keyboard(
        step=xp.zeros(batch_shape, xp.int32),
        velocity=xp.zeros(batch_shape, xp.int32),
        keys=xp.full((*batch_shape, vocabulary.PITCHES), -1, xp.int32),
        onset_step=xp.zeros((*batch_shape, onsets), xp.int32),
        onset_note=xp.full((*batch_shape, onsets), -1, xp.int32),
    )


def advance(keyboard: Keyboard, token: Integer[Any, "*B"], xp: Any = np) -> Keyboard:
    """The keyboard after one more token; `PAD`, `START` and `END` change nothing."""
    token = xp.asarray(token, xp.int32)
    strikes = vocabulary.is_on(token)
    step = keyboard.step + xp.where(vocabulary.is_shift(token), token - (vocabulary.TIME_SHIFT - 1), 0).astype(xp.int32)
    velocity = xp.where(vocabulary.is_velocity(token), token - (vocabulary.VELOCITY - 1), keyboard.velocity).astype(
        xp.int32
    )
    note = xp.where(strikes, token * ROOM + velocity, -1).astype(xp.int32)[..., None]
    L = keyboard.onset_note.shape[-1]
    onset_note = xp.concatenate([note, keyboard.onset_note], axis=-1)[..., :L]
    onset_step = xp.concatenate([step[..., None], keyboard.onset_step], axis=-1)[..., :L]
    return Keyboard(
        step=step,
        velocity=velocity,
        keys=xp.maximum(keyboard.keys, _touched(token, step, velocity, xp)),
        onset_step=xp.where(strikes[..., None], onset_step, keyboard.onset_step),
        onset_note=xp.where(strikes[..., None], onset_note, keyboard.onset_note),
    )


def overdue(keyboard: Keyboard, held: Int[Any, "*B 128"], xp: Any = np) -> Bool[Any, "*B 128"]:
    """Which keys have to be released before anything else; none, unless one was held for `LONGEST_HOLD_STEPS`.

    What holds a key for so long is the pedal, and whoever lets go of it releases all but what the fingers have just
    struck: the keys that have been down for `_FINGERS_STEPS`. Those that were held for too long come last, so that
    until then there is one. (Performances are written in the other order, by onset; that would need a memory.)

    Args:
        keyboard: the keyboard.
        held: how often each key can be released, as `grammar.GrammarState` counts.
        xp: the array module.
    """
    # Of a key that was struck twice and released once, from its release on.
    age = xp.where(held > 0, _since_touched(keyboard, xp), -1)
    too_long = age >= LONGEST_HOLD_STEPS
    others = (age >= _FINGERS_STEPS) & ~too_long & too_long.any(axis=-1, keepdims=True)
    return xp.where(others.any(axis=-1, keepdims=True), others, too_long)


def paused(keyboard: Keyboard, held: Int[Any, "*B 128"], xp: Any = np) -> Bool[Any, "*B"]:
    """Whether nothing has sounded for `LONGEST_PAUSE_STEPS`, or since the beginning.

    Args:
        keyboard: the keyboard.
        held: how often each key can be released, as `grammar.GrammarState` counts.
        xp: the array module.
    """
    last_step = xp.maximum(keyboard.keys, 0).max(axis=-1) // (2 * ROOM)
    return (held.sum(axis=-1) == 0) & (keyboard.step - last_step >= LONGEST_PAUSE_STEPS)


def after_each(tokens: Integer[Any, "*B T"], onsets: int, xp: Any = np) -> Keyboard:
    """The keyboard after each token of sequences, [*B, T], as `advance` from `untouched` gives it.

    Args:
        tokens: of each sequence, from its beginning or from anywhere; what was before it is not known.
        onsets: L.
        xp: the array module.
    """
    tokens = xp.asarray(tokens, xp.int32)
    time_axis = tokens.ndim - 1
    index = xp.broadcast_to(xp.arange(tokens.shape[-1]).astype(xp.int32), tokens.shape)
    step, velocity = times_and_velocities(tokens, xp)
    note = tokens * ROOM + velocity
    # The newest note-on up to each token; from there, the newest before that one, and so on.
    newest = _running_max(xp.where(vocabulary.is_on(tokens), index, -1).astype(xp.int32), time_axis, xp)
    before = xp.concatenate([xp.full_like(newest[..., :1], -1), newest[..., :-1]], axis=-1)
    nothing = xp.zeros((*tokens.shape, 0), xp.int32)
    onset_step, onset_note = [nothing], [nothing]
    for _ in range(onsets):
        found, place = newest >= 0, xp.maximum(newest, 0)
        onset_step.append(xp.where(found, xp.take_along_axis(step, place, axis=-1), 0)[..., None])
        onset_note.append(xp.where(found, xp.take_along_axis(note, place, axis=-1), -1)[..., None])
        newest = xp.where(found, xp.take_along_axis(before, place, axis=-1), -1)
    return Keyboard(
        step=step,
        velocity=velocity,
        keys=_running_max(_touched(tokens, step, velocity, xp), time_axis, xp),
        onset_step=xp.concatenate(onset_step, axis=-1).astype(xp.int32),
        onset_note=xp.concatenate(onset_note, axis=-1).astype(xp.int32),
    )


def feature_count(onsets: int) -> int:
    """F: how many numbers `channels` and, one-hot, `classes` give."""
    return CHANNELS + _INTERVALS + onsets * NOTE_FEATURES


def channels(keyboard: Keyboard, xp: Any = np) -> Float[Any, "*B _"]:
    """Of each key: whether it is down, how hard and how recently (by several decays) it went down, how recently up.

    All from 0 to 1. Times depend on differences alone, here and in `classes`.
    """
    keys = keyboard.keys
    touched, down = keys >= 0, (keys // ROOM) % 2 == 1
    age = _since_touched(keyboard, xp).astype(xp.float32)
    held, released = (touched & down).astype(xp.float32), (touched & ~down).astype(xp.float32)
    parts = [
        held,
        held * (keys % ROOM).astype(xp.float32) / vocabulary.VELOCITY_BINS,
        *(held * xp.exp(-age / decay) for decay in _DECAYS_STEPS),
        *(released * xp.exp(-age / decay) for decay in _RELEASED_DECAYS_STEPS),
    ]
    return xp.concatenate(parts, axis=-1)


class Classes(NamedTuple):
    """Some numbers, each of them one of `size` classes.

    Attributes:
        number: from 0 on, -1 where it is not known.
        size: how many classes there are.
    """

    number: Int[Any, "*B _"]
    size: int


def classes(keyboard: Keyboard, xp: Any = np) -> list[Classes]:
    """The class of the time since the last onset; of each remembered onset, `note_classes`."""
    known = keyboard.onset_note >= 0
    # The oldest remembered onset has none before it.
    since = keyboard.step[..., None] - keyboard.onset_step
    earlier = xp.concatenate([since[..., 1:], since[..., -1:]], axis=-1)
    both = known & xp.concatenate([known[..., 1:], xp.zeros_like(known[..., -1:])], axis=-1)
    last = xp.where(known[..., :1], _interval_class(since[..., :1], xp), -1)
    return [Classes(last, _INTERVALS), *note_classes(keyboard.onset_note, earlier - since, both, xp)]


def note_classes(note: Any, wait: Any, timed: Any, xp: Any) -> list[Classes]:
    """The pitches of notes, their velocities, and the classes of the times before them.

    Args:
        note: pitch 64 + velocity bin of each; -1 where there is none.
        wait: steps between each and the note before it.
        timed: whether that is known.
        xp: the array module.
    """
    return [
        Classes(xp.where(note >= 0, note // ROOM, -1), vocabulary.PITCHES),
        Classes(xp.where(note >= 0, note % ROOM, -1), _VELOCITIES),
        Classes(xp.where(timed, _interval_class(wait, xp), -1), _INTERVALS),
    ]


def one_hot(all_classes: list[Classes], xp: Any = np) -> Float[Any, "*B _"]:
    """Each number in turn as `size` numbers, 1 at its class and 0 elsewhere."""
    parts = []
    for number, size in all_classes:
        is_class = number[..., None] == xp.arange(size).reshape((1,) * number.ndim + (size,))
        parts.append(is_class.astype(xp.float32).reshape(*number.shape[:-1], -1))
    return xp.concatenate(parts, axis=-1)


def hot_places(all_classes: list[Classes], xp: Any = np) -> Int[Any, "*B _"]:
    """Where in `one_hot` the ones are, -1 for those that are not known."""
    parts, first = [], 0
    for number, size in all_classes:
        of_each = first + size * xp.arange(number.shape[-1]).astype(xp.int32)
        parts.append(xp.where(number >= 0, number + of_each.reshape((1,) * (number.ndim - 1) + (-1,)), -1))
        first += size * number.shape[-1]
    return xp.concatenate(parts, axis=-1)


def times_and_velocities(tokens: Integer[Any, "*B T"], xp: Any = np) -> tuple[Any, Any]:
    """The time after each token of sequences, in steps, and the velocity bin in force, 0 before the first."""
    tokens = xp.asarray(tokens, xp.int32)
    time_axis = tokens.ndim - 1
    step = xp.cumsum(
        xp.where(vocabulary.is_shift(tokens), tokens - (vocabulary.TIME_SHIFT - 1), 0), axis=time_axis
    ).astype(xp.int32)
    # The newest velocity is the largest of (index, bin).
    index = xp.broadcast_to(xp.arange(tokens.shape[-1]).astype(xp.int32), tokens.shape)
    told = xp.where(vocabulary.is_velocity(tokens), index * ROOM + (tokens - (vocabulary.VELOCITY - 1)), 0).astype(
        xp.int32
    )
    return step, _running_max(told, time_axis, xp) % ROOM


def _since_touched(keyboard: Keyboard, xp: Any) -> Any:
    """Steps since the last event of each key; of one without, since the beginning."""
    return keyboard.step[..., None] - xp.maximum(keyboard.keys, 0) // (2 * ROOM)


def _touched(tokens: Any, step: Any, velocity: Any, xp: Any) -> Any:
    """What a token makes of each key, [*B, 128]; -1 where it does not touch it."""
    pitches = xp.arange(vocabulary.PITCHES).reshape((1,) * tokens.ndim + (vocabulary.PITCHES,))
    is_note = (tokens >= vocabulary.NOTE_ON) & (tokens < vocabulary.TIME_SHIFT)
    number = xp.where(vocabulary.is_on(tokens), (2 * step + 1) * ROOM + velocity, 2 * step * ROOM)
    pitch = xp.where(is_note, tokens % vocabulary.PITCHES, -1)
    return xp.where(pitch[..., None] == pitches, number[..., None], -1).astype(xp.int32)


def _running_max(x: Any, axis: int, xp: Any) -> Any:
    return np.maximum.accumulate(x, axis=axis) if xp is np else jax.lax.cummax(x, axis=axis)


def _interval_class(steps: Any, xp: Any) -> Any:
    """0 for no time, a class for each of the first steps, then classes that widen with the time."""
    rising = 6 * xp.log2(1 + steps.astype(xp.float32) / 3) + 1e-3  # so that whole numbers stay whole in float32
    return xp.clip(xp.floor(rising), 0, _INTERVALS - 1).astype(xp.int32)
