"""n-gram retrieval: which notes followed the most recent passage that matches the current one.

Pieces return to their themes after thousands of tokens. To use that, attention has to find, in everything it can read,
the place where the last few notes were the same. Minutes of training do not teach it to (docs/results/training-log.md),
and the few notes that would benefit hardly show in the loss. But the notes determine that place exactly, so it is
looked up: at each position, `PerceiverAR` gets the notes that followed there, as from an n-gram attention head (Akyürek
et al., arXiv 2401.12973). The look-up compares integers, so it reaches much further back than attention.

The last notes are compared in several ways (`LEVELS`), since a theme may return with the notes of its chords in a
different order, or in a different key. Each level finds the nearest match or none; the first level with a match wins.

Dimension key, in addition to that of `notes`: W levels, A notes retrieved, O notes of a sequence (padded to its T
tokens).
"""

from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int, Integer, UInt32

from music_ar.features.categorical import Categorical
from music_ar.features.keyboard import VELOCITY_SLOTS, times_and_velocities
from music_ar.features.notes import NOTE_FEATURES, Notes, at, note_categories, rolling
from music_ar.tokens import vocabulary


class Level(NamedTuple):
    """A way to compare the last notes with earlier ones.

    Attributes:
        by: what must be equal: the pitches in order, the pitches in any order, or the intervals between them.
        notes: number of notes compared.
    """

    by: Literal["order", "set", "interval"]
    notes: int


LEVELS = (Level("order", 12), Level("order", 6), Level("set", 12), Level("interval", 9), Level("order", 4))
RETRIEVED_NOTES = 4
"""A: number of notes retrieved."""
LEAST_CAPACITY = max(level.notes for level in LEVELS)
"""Smallest number of notes to keep: those that are compared."""
_DISTANCE_CLASSES = 16  # of the distance to the match in notes; each is twice as wide as the one before
_HASH_BASE = 0x9E3779B1


class Retrieved(NamedTuple):
    """The match and the notes that followed it; any leading batch shape.

    Attributes:
        level: index in `LEVELS` of the match; -1 if there is none.
        distance: how many notes ago it was; -1 if there is none.
        note: the A notes that followed, pitch * 64 + velocity bin, transposed to the current key; -1 if there is no
            match or the transposed pitch is outside 0..127. If fewer than A notes have followed yet, they repeat, as in
            a trill.
        interval: steps between each of them and the note before it; -1 where `note` is -1.
    """

    level: Int[Any, "*B"]
    distance: Int[Any, "*B"]
    note: Int[Any, "*B A"]
    interval: Int[Any, "*B A"]


class Match(NamedTuple):
    """The state of retrieval in addition to `Notes`, whose slots it shares.

    Attributes:
        keys: hash of the last notes up to each slot's note, by level: equal for passages that match.
        level: index in `LEVELS` of the match of the newest note, -1 if there is none.
        number: number of the earlier note that matches the newest, -1 if there is none.
    """

    keys: UInt32[Any, "*B W C"]
    level: Int[Any, "*B"]
    number: Int[Any, "*B"]


def init(batch_shape: tuple[int, ...], capacity: int) -> Match:
    """The state before the first token.

    Args:
        batch_shape: leading axes.
        capacity: C.
    """
    none = np.full(batch_shape, -1, np.int32)
    return Match(np.zeros((*batch_shape, len(LEVELS), capacity), np.uint32), none, none)


def step(state: Match, notes: Notes, token: Int[Any, " B"]) -> Match:
    """The state after one more token of each row, in JAX; only a note-on changes it.

    Args:
        state: before the token.
        notes: after the token.
        token: the token.
    """
    xp = token.__array_namespace__()
    capacity = notes.note.shape[-1]
    row, is_on, newest = xp.arange(token.shape[0]), vocabulary.is_note_on(token), notes.count - 1
    slot = newest % capacity
    back = newest[:, None] - xp.arange(LEAST_CAPACITY)[None]
    new_BxW = _hash(at(notes.note, back) // VELOCITY_SLOTS)
    keys = state.keys.at[row, :, slot].set(xp.where(is_on[:, None], new_BxW, state.keys[row, :, slot]))
    number = newest[:, None] - (newest[:, None] - xp.arange(capacity)[None]) % capacity
    earlier = (number >= 0) & (number < newest[:, None])
    matching = earlier[:, None] & (keys == new_BxW[..., None])
    nearest = xp.where(matching, number[:, None], -1).max(axis=-1)
    usable = _usable(nearest[..., None], newest[:, None, None], capacity)[..., 0]
    level, match = _best(xp.where(usable, nearest, -1))
    return Match(keys, xp.where(is_on, level, state.level), xp.where(is_on, match, state.number))


def scan(tokens: Integer[np.ndarray, " T"], capacity: int) -> Match:
    """The state after a whole sequence, in NumPy."""
    return Index.of(tokens, capacity).state(capacity)


def scan_each(tokens: Integer[Any, "*B T"], capacity: int, last: int | None = None) -> Retrieved:
    """What is retrieved after each of the last tokens of sequences.

    Args:
        tokens: the sequences, from their beginnings or from any later point.
        capacity: C; matches are sought among this many notes, including the newest.
        last: number of tokens; default: all.
    """
    return Index.of(tokens, capacity).retrieved(last)


def retrieved(notes: Notes, state: Match) -> Retrieved:
    """What the state retrieves."""
    return _following(notes.note, notes.time, state.level, state.number, notes.count - 1)


class Index(NamedTuple):
    """All notes of sequences, each with its match: the part that `scan` and `scan_each` share.

    Attributes:
        count_BxT: note-ons up to each token.
        note, time: of each note, [*B, O].
        keys: of each note, [*B, W, O].
        level, number: the match of each note, [*B, O].
    """

    count_BxT: Any
    note: Any
    time: Any
    keys: Any
    level: Any
    number: Any

    @classmethod
    def of(cls, tokens: Integer[Any, "*B T"], capacity: int) -> "Index":
        """Index sequences; matches are sought among the last `capacity` notes."""
        xp = tokens.__array_namespace__()
        tokens = xp.asarray(tokens, dtype=xp.int32)
        is_on = vocabulary.is_note_on(tokens)
        time, velocity = times_and_velocities(tokens)
        places = xp.argsort(~is_on, axis=-1, stable=True)  # note-ons first, in order
        pitch = xp.where(is_on, tokens, 0)
        pitch, time, velocity = (xp.take_along_axis(values, places, axis=-1) for values in (pitch, time, velocity))
        earlier = [pitch]
        for _ in range(LEAST_CAPACITY - 1):
            earlier.append(xp.concatenate([xp.zeros_like(pitch[..., :1]), earlier[-1][..., :-1]], axis=-1))
        keys = xp.moveaxis(_hash(xp.stack(earlier, axis=-1)), -1, -2)
        newest = xp.arange(tokens.shape[-1]).astype(xp.int32).reshape((1,) * tokens.ndim + (-1,))
        nearest = _nearest_with_same_key(keys)
        level, number = _best(xp.moveaxis(xp.where(_usable(nearest, newest, capacity), nearest, -1), -2, -1))
        count_BxT = xp.cumsum(is_on, axis=-1).astype(xp.int32)
        return cls(count_BxT, pitch * VELOCITY_SLOTS + velocity, time, keys, level, number)

    def state(self, capacity: int) -> Match:
        """The state after one sequence, in NumPy."""
        count = int(self.count_BxT[-1]) if len(self.count_BxT) else 0
        if count == 0:
            return init((), capacity)
        return Match(rolling(self.keys, count, capacity), self.level[count - 1], self.number[count - 1])

    def retrieved(self, last: int | None) -> Retrieved:
        """What is retrieved after each of the `last` tokens; by default after each token."""
        xp = self.note.__array_namespace__()
        newest = (self.count_BxT - 1)[..., -(last or self.count_BxT.shape[-1]) :]
        level, number = (xp.where(newest >= 0, at(each, newest), -1) for each in (self.level, self.number))
        return _following(self.note, self.time, level, number, newest)


def feature_count() -> int:
    """Number of one-hot features that `categories` gives."""
    return len(LEVELS) + _DISTANCE_CLASSES + RETRIEVED_NOTES * NOTE_FEATURES


def categories(retrieved: Retrieved) -> list[Categorical]:
    """Features: the level, the class of the distance, and each note that followed."""
    xp = retrieved.level.__array_namespace__()
    # The epsilon puts 4,094 and 4,095 into the class of 4,096; the pretrained models were trained that way.
    halvings = xp.floor(xp.log2(xp.maximum(retrieved.distance, 1).astype(xp.float32)) + 1e-3).astype(xp.int32)
    distance = xp.where(retrieved.level >= 0, xp.minimum(halvings, _DISTANCE_CLASSES - 1), -1)
    return [
        Categorical(retrieved.level[..., None], len(LEVELS)),
        Categorical(distance[..., None], _DISTANCE_CLASSES),
        *note_categories(retrieved.note, retrieved.interval, retrieved.note >= 0),
    ]


def nothing(batch_shape: tuple[int, ...]) -> Retrieved:
    """`Retrieved` without a match, in NumPy."""
    none = np.full(batch_shape, -1, np.int32)
    notes = np.full((*batch_shape, RETRIEVED_NOTES), -1, np.int32)
    return Retrieved(none, none, notes, notes)


def _nearest_with_same_key(keys: Any) -> Any:
    """Nearest earlier note with the same key as each note, -1 if there is none; both [*B, W, O]."""
    xp = keys.__array_namespace__()
    # It comes right before the note in a stable sort by key.
    order = xp.argsort(keys, axis=-1, stable=True).astype(xp.int32)
    ordered = xp.take_along_axis(keys, order, axis=-1)
    before = xp.where(ordered[..., 1:] == ordered[..., :-1], order[..., :-1], -1)
    before = xp.concatenate([xp.full_like(order[..., :1], -1), before], axis=-1)
    return xp.take_along_axis(before, xp.argsort(order, axis=-1, stable=True), axis=-1)


def _hash(pitches: Int[Any, "*B N"]) -> UInt32[Any, "*B W"]:
    """Hash for each level: equal where the last notes match, otherwise equal by chance once in 2**32.

    Args:
        pitches: of the last `LEAST_CAPACITY` notes, newest first.
    """
    xp = pitches.__array_namespace__()
    powers = [pow(_HASH_BASE, power, 2**32) for power in range(LEAST_CAPACITY)]
    pitches = pitches.astype(xp.uint32)
    mixed = (pitches + 1) * np.uint32(_HASH_BASE)
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x85EBCA77)
    mixed = mixed ^ (mixed >> np.uint32(13))
    between = pitches[..., :-1] - pitches[..., 1:] + 128

    def weighted(values: Any, count: int) -> Any:
        factors = np.array(powers[:count], np.uint32).reshape((1,) * (values.ndim - 1) + (count,))
        return (values[..., :count] * factors).sum(axis=-1, dtype=xp.uint32)

    by_level = {
        "order": lambda notes: weighted(pitches + 1, notes),
        "set": lambda notes: mixed[..., :notes].sum(axis=-1, dtype=xp.uint32),
        "interval": lambda notes: weighted(between, notes - 1),
    }
    return xp.stack([by_level[level.by](level.notes) for level in LEVELS], axis=-1)


def _usable(number: Any, newest: Any, capacity: int) -> Any:
    """Whether `number` [*B, W, _], the nearest note with the same key, counts as a match of the `newest`.

    There must be enough notes up to it, and it must still be in the buffer. Sets must not overlap, since in a repeated
    figure the set of the last notes is the same at every note. If the nearest one does not count, none further back is
    tried.
    """
    column = (1,) * (number.ndim - 2) + (len(LEVELS), 1)
    needed = np.array([level.notes for level in LEVELS], np.int32).reshape(column)
    least = np.array([level.notes if level.by == "set" else 1 for level in LEVELS], np.int32).reshape(column)
    distance = newest - number
    return (number >= needed - 1) & (distance >= least) & (distance < capacity)


def _best(nearest: Int[Any, "*B W"]) -> tuple[Any, Any]:
    """The first level with a match, and the match; -1 if there is none."""
    xp = nearest.__array_namespace__()
    found = nearest >= 0
    level = xp.argmax(found, axis=-1).astype(xp.int32)
    match = xp.take_along_axis(nearest, level[..., None], axis=-1)[..., 0]
    return xp.where(found.any(axis=-1), level, -1).astype(xp.int32), match.astype(xp.int32)


def _following(note: Any, time: Any, level: Any, match: Any, newest: Any) -> Retrieved:
    """The notes that followed `match`, the note that matches the `newest`."""
    xp = level.__array_namespace__()
    distance = newest - match
    found = (level >= 0)[..., None]
    ahead = xp.arange(RETRIEVED_NOTES).astype(xp.int32).reshape((1,) * level.ndim + (RETRIEVED_NOTES,))
    number = xp.where(found, match[..., None] + 1 + ahead % xp.maximum(distance, 1)[..., None], 0)
    followed, when, before = at(note, number), at(time, number), at(time, number - 1)
    here, there = (at(note, each[..., None]) // VELOCITY_SLOTS for each in (newest, match))
    by_interval = xp.asarray(np.array([each.by == "interval" for each in LEVELS]))
    moved = xp.where(by_interval[xp.maximum(level, 0)][..., None], here - there, 0)
    pitch = followed // VELOCITY_SLOTS + moved
    found = found & (pitch >= 0) & (pitch < vocabulary.PITCHES)
    return Retrieved(
        level=level,
        distance=xp.where(level >= 0, distance, -1).astype(xp.int32),
        note=xp.where(found, followed + moved * VELOCITY_SLOTS, -1).astype(xp.int32),
        interval=xp.where(found, when - before, -1).astype(xp.int32),
    )
