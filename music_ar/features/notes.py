"""The last notes: a rolling buffer of note-ons, and their features.

Dimension key, in addition to that of `music_ar.model.config`: B any batch shape, C notes kept, L notes shown to the
model.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from music_ar.features.categorical import Categorical
from music_ar.features.keyboard import VELOCITY_SLOTS, running_max, times_and_velocities
from music_ar.tokens import vocabulary

_INTERVAL_CLASSES = 48  # of the time between two events, up to 8 s; the shortest times are exact
_VELOCITY_CLASSES = vocabulary.VELOCITY_BINS + 1
NOTE_FEATURES = vocabulary.PITCHES + _VELOCITY_CLASSES + _INTERVAL_CLASSES
"""Number of one-hot features of one note."""


class Notes(NamedTuple):
    """The last C note-ons in a rolling buffer: note number i is in slot i mod C. Any leading batch shape.

    Attributes:
        count: note-ons so far.
        first: number of the first note of this timeline (see `keyboard`): how many there were before.
        note: of each slot, pitch * 64 + velocity bin.
        time: of each slot, in steps of 10 ms.
    """

    count: Int[Any, "*B"]
    first: Int[Any, "*B"]
    note: Int[Any, "*B C"]
    time: Int[Any, "*B C"]


class Onsets(NamedTuple):
    """The last L note-ons of this timeline, newest first; any leading batch shape.

    Attributes:
        time: in steps of 10 ms; 0 if there were fewer notes.
        note: pitch * 64 + velocity bin; -1 if there were fewer notes.
    """

    time: Int[Any, "*B L"]
    note: Int[Any, "*B L"]


def init(batch_shape: tuple[int, ...], capacity: int) -> Notes:
    """The state before the first token.

    Args:
        batch_shape: leading axes.
        capacity: C.
    """
    empty = np.zeros((*batch_shape, capacity), np.int32)
    none = np.zeros(batch_shape, np.int32)
    return Notes(none, none, empty, empty)


def step(state: Notes, token: Any, time: Any, velocity: Any) -> Notes:
    """The state after one more token of each row of a batch [B], in JAX; only a note-on or a separator changes it.

    Args:
        state: before the token.
        token: the token.
        time: its time in steps.
        velocity: the velocity bin in force.
    """
    xp = state.note.__array_namespace__()
    capacity = state.note.shape[-1]
    if capacity == 0:
        return state
    row, slot, is_on = xp.arange(token.shape[0]), state.count % capacity, vocabulary.is_note_on(token)

    def written(values: Any, new: Any) -> Any:
        return values.at[row, slot].set(xp.where(is_on, new, values[row, slot]))

    return Notes(
        count=state.count + is_on,
        first=xp.where(token == vocabulary.SEPARATOR, state.count, state.first),
        note=written(state.note, token * VELOCITY_SLOTS + velocity),
        time=written(state.time, time),
    )


def scan(tokens: Integer[np.ndarray, " T"], capacity: int) -> Notes:
    """The state after a whole sequence, in NumPy."""
    tokens = np.asarray(tokens, np.int32)
    is_on = vocabulary.is_note_on(tokens)
    time, velocity = (values[is_on] for values in times_and_velocities(tokens))
    note = tokens[is_on] * VELOCITY_SLOTS + velocity
    separators = np.flatnonzero(tokens == vocabulary.SEPARATOR)
    first = is_on[: separators[-1]].sum() if capacity and len(separators) else 0
    return Notes(
        np.int32(len(note)), np.int32(first), rolling(note, len(note), capacity), rolling(time, len(note), capacity)
    )


def rolling(values: np.ndarray, count: int, capacity: int) -> np.ndarray:
    """The last `capacity` of the first `count` values along the last axis, each in its slot of a rolling buffer."""
    slots = np.zeros((*values.shape[:-1], capacity), values.dtype)
    kept = np.arange(max(0, count - capacity), count)
    if capacity:
        slots[..., kept % capacity] = values[..., kept]
    return slots


def latest(state: Notes, onsets: int) -> Onsets:
    """The last L = `onsets` notes, at most C."""
    xp = state.note.__array_namespace__()
    number = state.count[..., None] - 1 - xp.arange(onsets).astype(xp.int32).reshape((1,) * state.count.ndim + (-1,))
    known = number >= state.first[..., None]
    return Onsets(
        time=xp.where(known, at(state.time, number), 0),
        note=xp.where(known, at(state.note, number), -1),
    )


def scan_each(tokens: Integer[Any, "*B T"], onsets: int) -> Onsets:
    """The last L = `onsets` notes after each token of sequences, [*B, T, L]."""
    xp = tokens.__array_namespace__()
    tokens = xp.asarray(tokens, dtype=xp.int32)
    index = xp.broadcast_to(xp.arange(tokens.shape[-1]).astype(xp.int32), tokens.shape)
    time, velocity = times_and_velocities(tokens)
    note = tokens * VELOCITY_SLOTS + velocity
    # The index of the newest note-on up to each token; from there, the newest before that one, and so on.
    newest = running_max(xp.where(vocabulary.is_note_on(tokens), index, -1).astype(xp.int32), tokens.ndim - 1)
    begin = running_max(xp.where(tokens == vocabulary.SEPARATOR, index, -1).astype(xp.int32), tokens.ndim - 1)
    newest = xp.where(newest < begin, -1, newest)
    before = xp.concatenate([xp.full_like(newest[..., :1], -1), newest[..., :-1]], axis=-1)
    nothing = xp.zeros((*tokens.shape, 0), dtype=xp.int32)
    times, notes = [nothing], [nothing]
    for _ in range(onsets):
        found, place = newest >= 0, xp.maximum(newest, 0)
        times.append(xp.where(found, xp.take_along_axis(time, place, axis=-1), 0)[..., None])
        notes.append(xp.where(found, xp.take_along_axis(note, place, axis=-1), -1)[..., None])
        newest = xp.where(found, xp.take_along_axis(before, place, axis=-1), -1)
    return Onsets(
        time=xp.concatenate(times, axis=-1).astype(xp.int32), note=xp.concatenate(notes, axis=-1).astype(xp.int32)
    )


def at(values: Any, number: Any) -> Any:
    """Look up notes by number [*B, ...] in a rolling buffer [*B, C]."""
    xp = values.__array_namespace__()
    flat = number.reshape(*values.shape[:-1], -1) % values.shape[-1]
    return xp.take_along_axis(values, flat, axis=-1).reshape(number.shape)


def categories(onsets: Onsets, now: Int[Any, "*B"]) -> list[Categorical]:
    """Features of the last notes: the time since the newest, and `note_categories` of each.

    Args:
        onsets: the notes.
        now: the current time in steps.
    """
    xp = onsets.note.__array_namespace__()
    known = onsets.note >= 0
    since = now[..., None] - onsets.time
    # The oldest note has no predecessor.
    earlier = xp.concatenate([since[..., 1:], since[..., -1:]], axis=-1)
    both = known & xp.concatenate([known[..., 1:], xp.zeros_like(known[..., -1:])], axis=-1)
    newest = xp.where(known[..., :1], _interval_class(since[..., :1]), -1)
    return [Categorical(newest, _INTERVAL_CLASSES), *note_categories(onsets.note, earlier - since, both)]


def note_categories(note: Any, interval: Any, timed: Any) -> list[Categorical]:
    """Pitches, velocities and classes of the times before notes.

    Args:
        note: pitch * 64 + velocity bin of each; -1 if there is none.
        interval: steps between each note and the one before it.
        timed: whether the interval is known.
    """
    xp = note.__array_namespace__()
    return [
        Categorical(xp.where(note >= 0, note // VELOCITY_SLOTS, -1), vocabulary.PITCHES),
        Categorical(xp.where(note >= 0, note % VELOCITY_SLOTS, -1), _VELOCITY_CLASSES),
        Categorical(xp.where(timed, _interval_class(interval), -1), _INTERVAL_CLASSES),
    ]


def feature_count(onsets: int) -> int:
    """Number of one-hot features that `categories` gives for L = `onsets` notes."""
    return _INTERVAL_CLASSES + onsets * NOTE_FEATURES


def _interval_class(steps: Any) -> Any:
    """Class 0 for no time, one class for each of the first few steps, then classes that widen with the time."""
    xp = steps.__array_namespace__()
    rising = 6 * xp.log2(1 + steps.astype(xp.float32) / 3) + 1e-3  # keeps whole numbers whole in float32
    return xp.clip(xp.floor(rising), 0, _INTERVAL_CLASSES - 1).astype(xp.int32)
