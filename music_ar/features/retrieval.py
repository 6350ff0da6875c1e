"""What followed where the music was before as it is now.

Pieces return to their themes after thousands of tokens. To use that, attention has to find, among all it may read, the
place whose last notes were the present ones; training for minutes does not teach it (docs/training-log.md), and the few
notes that it would help are hardly seen in the loss. But the place follows from the notes exactly. So it is looked up:
`PerceiverAR` is told at each position which notes followed there, as if a head that matches n-grams had found them
(Akyurek et al., arXiv 2401.12973, who build such heads into language models). It costs some comparisons of integers, so
it can reach much further back than attention reads.

The last notes are compared in several ways (`LEVELS`), since a theme returns with its chords struck in another order,
or in another key. Each way finds the nearest place, or none; of those that find one, the first in the list counts.

`after_each` does it for whole sequences, `advance` from token to token; both find the same (tests/test_recall.py).

Dimension key, beside that of `model.py`: W levels (ways), C notes that are remembered, A notes told, O notes of a
sequence.
"""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer, UInt32

from music_ar.features import keyboard
from music_ar.features.keyboard import Classes
from music_ar.tokens import vocabulary


class Level(NamedTuple):
    """A way to compare the last notes with earlier ones.

    Attributes:
        by: what has to be equal: the pitches in order, the pitches in any order, or the intervals between them.
        notes: how many.
    """

    by: Literal["order", "set", "interval"]
    notes: int


LEVELS = (Level("order", 12), Level("order", 6), Level("set", 12), Level("interval", 9), Level("order", 4))
TOLD = 4
"""A: how many notes that followed are told."""
LEAST_REACH = max(level.notes for level in LEVELS)
"""The least C: the notes that are compared have to be remembered."""
_DISTANCES = 16  # classes of how many notes ago, each twice as wide as the one before
_BASE = 0x9E3779B1


class Recalled(NamedTuple):
    """What followed at the place that is like the last notes; any leading batch shape.

    Attributes:
        level: index in `LEVELS` of what was alike; -1 where nothing was.
        distance: how many notes ago it was.
        note: the A notes that followed, pitch 64 + velocity bin; -1 where nothing was alike, or where the note, moved
            to the key of now, is none of 128. Where fewer than A have followed yet they begin again, as in a trill.
        wait: the steps between each of them and the note before it; -1 where `note` is.
    """

    level: Int[Any, "*B"]
    distance: Int[Any, "*B"]
    note: Int[Any, "*B A"]
    wait: Int[Any, "*B A"]


class Memory(NamedTuple):
    """The last C notes, in a ring: note number i is in slot i mod C. Of a sequence of T = C tokens, all notes in order.

    Attributes:
        count: notes so far.
        keys: of each note, what by each level is equal for places that are alike.
        note: pitch 64 + velocity bin.
        step: their times, in steps of 10 ms.
        level: of the place that is like the last notes, -1 where there is none.
        match: the number of the note there that is like the newest.
    """

    count: Int[Any, "*B"]
    keys: UInt32[Any, "*B W C"]
    note: Int[Any, "*B C"]
    step: Int[Any, "*B C"]
    level: Int[Any, "*B"]
    match: Int[Any, "*B"]


def after_each(tokens: Integer[Any, "*B T"], reach: int, xp: Any = np, *, last: int | None = None) -> Recalled:
    """What is recalled after each of the `last` tokens of sequences; by default of all.

    Args:
        tokens: of each sequence, from its beginning or from anywhere.
        reach: C; places are looked for among so many notes, the newest included.
        xp: the array module.
        last: of how many tokens.
    """
    return _recall_after_each(tokens, _read(tokens, reach, xp), last, xp)


def prefill(tokens: Integer[np.ndarray, " T"], reach: int, *, last: int) -> tuple[Recalled, Memory]:
    """What `after_each` gives for a sequence, and the memory after it, in NumPy."""
    whole, *each = _read(tokens, reach, np)
    count = int(whole.count)
    kept = np.arange(max(0, count - reach), count)

    def ring(values: np.ndarray) -> np.ndarray:
        slots = np.zeros((*values.shape[:-1], reach), values.dtype)
        slots[..., kept % reach] = values[..., kept]
        return slots

    memory = whole._replace(keys=ring(whole.keys), note=ring(whole.note), step=ring(whole.step))
    return _recall_after_each(tokens, (whole, *each), last, np), memory


def advance(memory: Memory, token: Int[Array, " B"], step: Int[Array, " B"], velocity: Int[Array, " B"]) -> Memory:
    """The memory after one more token, in JAX; only a note-on changes it.

    Args:
        memory: before it.
        token: the token.
        step: the time of it.
        velocity: the velocity bin in force.
    """
    C = memory.note.shape[-1]
    row, is_on, newest = jnp.arange(token.shape[0]), vocabulary.is_on(token), memory.count
    slot = newest % C

    def written(values: Array, new: Array) -> Array:
        return values.at[row, slot].set(jnp.where(is_on, new, values[row, slot]))

    note = written(memory.note, token * keyboard.ROOM + velocity)
    back = newest[:, None] - jnp.arange(LEAST_REACH)[None]
    pitches = jnp.take_along_axis(note, back % C, axis=1) // keyboard.ROOM
    new_BxW = _keys(pitches, jnp)
    keys = memory.keys.at[row, :, slot].set(jnp.where(is_on[:, None], new_BxW, memory.keys[row, :, slot]))
    number = newest[:, None] - (newest[:, None] - jnp.arange(C)[None]) % C
    earlier = (number >= 0) & (number < newest[:, None])
    alike = earlier[:, None] & (keys == new_BxW[..., None])
    nearest = jnp.where(alike, number[:, None], -1).max(axis=-1)
    comparable = _comparable(nearest[..., None], newest[:, None, None], C, jnp)[..., 0]
    level, match = _best(jnp.where(comparable, nearest, -1), jnp)
    return Memory(
        count=newest + is_on,
        keys=keys,
        note=note,
        step=written(memory.step, step),
        level=jnp.where(is_on, level, memory.level),
        match=jnp.where(is_on, match, memory.match),
    )


def recalled(memory: Memory) -> Recalled:
    """What the memory recalls, in JAX."""
    return _followed(memory, memory.level, memory.match, memory.count - 1, jnp)


def feature_count() -> int:
    """F: how many numbers `classes` are, one-hot."""
    return len(LEVELS) + _DISTANCES + TOLD * keyboard.NOTE_FEATURES


def classes(recalled: Recalled, xp: Any = np) -> list[Classes]:
    """The level, the class of the distance, and each note that followed."""
    # The summand puts 4,094 and 4,095 into the class of 4,096; models were trained so.
    halvings = xp.floor(xp.log2(xp.maximum(recalled.distance, 1).astype(xp.float32)) + 1e-3).astype(xp.int32)
    distance = xp.where(recalled.level >= 0, xp.minimum(halvings, _DISTANCES - 1), -1)
    return [
        Classes(recalled.level[..., None], len(LEVELS)),
        Classes(distance[..., None], _DISTANCES),
        *keyboard.note_classes(recalled.note, recalled.wait, recalled.note >= 0, xp),
    ]


def nothing(batch_shape: tuple[int, ...]) -> Recalled:
    """What is recalled where nothing is, in NumPy."""
    none = np.full(batch_shape, -1, np.int32)
    notes = np.full((*batch_shape, TOLD), -1, np.int32)
    return Recalled(none, none, notes, notes)


def _recall_after_each(tokens: Any, read: tuple[Memory, Any, Any], last: int | None, xp: Any) -> Recalled:
    memory, *places = read
    count = xp.cumsum(vocabulary.is_on(tokens), axis=-1).astype(xp.int32)
    newest = (count - 1)[..., -(last or tokens.shape[-1]) :]
    level, match = (xp.where(newest >= 0, _at(each, newest, xp), -1) for each in places)
    return _followed(memory, level, match, newest, xp)


def _read(tokens: Any, reach: int, xp: Any) -> tuple[Memory, Any, Any]:
    """The notes of sequences in order, and of each the level and the match, both [*B, T]."""
    tokens = xp.asarray(tokens, xp.int32)
    is_on = vocabulary.is_on(tokens)
    step, velocity = keyboard.times_and_velocities(tokens, xp)
    places = xp.argsort(~is_on, axis=-1, stable=True)  # those of the note-ons first, in order
    pitch = xp.where(is_on, tokens, 0)
    pitch, step, velocity = (xp.take_along_axis(values, places, axis=-1) for values in (pitch, step, velocity))
    earlier = [pitch]
    for _ in range(LEAST_REACH - 1):
        earlier.append(xp.concatenate([xp.zeros_like(pitch[..., :1]), earlier[-1][..., :-1]], axis=-1))
    keys = xp.moveaxis(_keys(xp.stack(earlier, axis=-1), xp), -1, -2)
    # The nearest earlier note with the same key is the one before it in the order of the keys.
    order = xp.argsort(keys, axis=-1, stable=True).astype(xp.int32)
    ordered = xp.take_along_axis(keys, order, axis=-1)
    before = xp.where(ordered[..., 1:] == ordered[..., :-1], order[..., :-1], -1)
    before = xp.concatenate([xp.full_like(order[..., :1], -1), before], axis=-1)
    nearest = xp.take_along_axis(before, xp.argsort(order, axis=-1, stable=True), axis=-1)
    newest = xp.arange(tokens.shape[-1]).astype(xp.int32).reshape((1,) * tokens.ndim + (-1,))
    near = xp.moveaxis(xp.where(_comparable(nearest, newest, reach, xp), nearest, -1), -2, -1)
    level, match = _best(near, xp)
    count = is_on.sum(axis=-1).astype(xp.int32)
    newest_level, newest_match = (
        xp.where(count > 0, _at(each, count[..., None] - 1, xp)[..., 0], -1) for each in (level, match)
    )
    memory = Memory(count, keys, pitch * keyboard.ROOM + velocity, step, newest_level, newest_match)
    return memory, level, match


def _keys(pitches: Int[Any, "*B N"], xp: Any) -> UInt32[Any, "*B W"]:
    """A number for each level that is equal where the last notes are alike; of others by chance one in 2**32.

    Args:
        pitches: of the last `LEAST_REACH` notes, the newest first.
        xp: the array module.
    """
    powers = [pow(_BASE, power, 2**32) for power in range(LEAST_REACH)]
    pitches = pitches.astype(xp.uint32)
    mixed = (pitches + 1) * np.uint32(_BASE)
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x85EBCA77)
    mixed = mixed ^ (mixed >> np.uint32(13))
    between = pitches[..., :-1] - pitches[..., 1:] + 128

    def weighted(values: Any, count: int) -> Any:
        factors = np.array(powers[:count], np.uint32)
        return (values[..., :count] * factors.reshape((1,) * (values.ndim - 1) + (count,))).sum(
            axis=-1, dtype=xp.uint32
        )

    by_level = {
        "order": lambda notes: weighted(pitches + 1, notes),
        "set": lambda notes: mixed[..., :notes].sum(axis=-1, dtype=xp.uint32),
        "interval": lambda notes: weighted(between, notes - 1),
    }
    return xp.stack([by_level[level.by](level.notes) for level in LEVELS], axis=-1)


def _comparable(number: Any, newest: Any, reach: int, xp: Any) -> Any:
    """Whether `number` [*B, W, _], the nearest note with the same key, is a place that counts for the `newest`.

    There must be enough notes up to it, and it must be remembered. A set has to be another one altogether: in a figure
    that repeats, the last notes are the same with every note; where the nearest is none, those further back are not
    looked for.
    """
    column = (len(LEVELS), 1)
    needed = np.array([level.notes for level in LEVELS], np.int32).reshape(column)
    least = np.array([level.notes if level.by == "set" else 1 for level in LEVELS], np.int32).reshape(column)
    leading = (1,) * (number.ndim - 2)
    needed, least = needed.reshape(leading + column), least.reshape(leading + column)
    distance = newest - number
    return (number >= needed - 1) & (distance >= least) & (distance < reach)


def _best(nearest: Int[Any, "*B W"], xp: Any) -> tuple[Any, Any]:
    """The first level that found a place, and the place; -1 where none did."""
    found = nearest >= 0
    level = xp.argmax(found, axis=-1).astype(xp.int32)
    match = xp.take_along_axis(nearest, level[..., None], axis=-1)[..., 0]
    return xp.where(found.any(axis=-1), level, -1).astype(xp.int32), match.astype(xp.int32)


def _at(values: Any, number: Any, xp: Any) -> Any:
    """What a ring [*B, C] has of the notes of these numbers [*B, ...]."""
    flat = number.reshape(*values.shape[:-1], -1) % values.shape[-1]
    return xp.take_along_axis(values, flat, axis=-1).reshape(number.shape)


def _followed(memory: Memory, level: Any, match: Any, newest: Any, xp: Any) -> Recalled:
    """What followed `match`, the note that is like the `newest`."""
    distance = newest - match
    found = (level >= 0)[..., None]
    ahead = xp.arange(TOLD).astype(xp.int32).reshape((1,) * level.ndim + (TOLD,)) % xp.maximum(distance, 1)[..., None]
    number = xp.where(found, match[..., None] + 1 + ahead, 0)
    note, step, step_before = (
        _at(values, at, xp) for values, at in ((memory.note, number), (memory.step, number), (memory.step, number - 1))
    )
    here, there = (_at(memory.note, each[..., None], xp) // keyboard.ROOM for each in (newest, match))
    by_interval = np.array([each.by == "interval" for each in LEVELS])
    moved = xp.where(xp.asarray(by_interval)[xp.maximum(level, 0)][..., None], here - there, 0)
    pitch = note // keyboard.ROOM + moved
    found = found & (pitch >= 0) & (pitch < vocabulary.PITCHES)
    return Recalled(
        level=level,
        distance=xp.where(level >= 0, distance, -1).astype(xp.int32),
        note=xp.where(found, note + moved * keyboard.ROOM, -1).astype(xp.int32),
        wait=xp.where(found, step - step_before, -1).astype(xp.int32),
    )
