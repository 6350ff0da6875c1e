"""The gap that a sequence fills: how long it is, how much of it is left, and where its parts are in time.

The sequence tells all of it (see `music_ar.tokens.gaps`). A model that knows how much time is left can lead its music
to the next part. Where there is no gap, nothing is told, and a model computes what it would without these features.

Dimension key, in addition to that of `music_ar.model.config`: B any batch shape.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Integer

from music_ar.features.categorical import Categorical
from music_ar.features.keyboard import running_max
from music_ar.tokens import vocabulary

_TIME_CLASSES = 72  # of the time left: exact at first, then widening, up to two minutes
_AFTER = _TIME_CLASSES  # the class of what follows the end of the gap: only releases are left
CLASSES = _TIME_CLASSES + 1
"""Number of one-hot features that `categories` gives."""


class Gap(NamedTuple):
    """The state after a token; any leading batch shape. Times are in steps of 10 ms.

    Attributes:
        begin: time at which the timeline began (see `keyboard`).
        length: of the gap; -1 if the sequence has told none.
        end: time at which the gap ends; -1 before the middle.
        over: whether its end has been passed.
    """

    begin: Int[Any, "*B"]
    length: Int[Any, "*B"]
    end: Int[Any, "*B"]
    over: Bool[Any, "*B"]


class Place(NamedTuple):
    """What the model reads after each token; any leading batch shape.

    Attributes:
        left: class of the time left in the gap; -1 outside of its middle.
        time: in steps, for rotary positions: that of the part after the gap is as it will be heard, behind the gap.
    """

    left: Int[Any, "*B"]
    time: Int[Any, "*B"]


def init(batch_shape: tuple[int, ...] = ()) -> Gap:
    """The state before the first token (NumPy)."""
    none = np.full(batch_shape, -1, np.int32)
    return Gap(np.zeros(batch_shape, np.int32), none, none, np.zeros(batch_shape, bool))


def step(state: Gap, token: Integer[Any, "*B"], time: Int[Any, "*B"]) -> Gap:
    """The state after one more token.

    Args:
        state: before the token.
        token: the token.
        time: after it (`Keyboard.time`).
    """
    xp = state.end.__array_namespace__()
    is_mark, in_middle = token == vocabulary.END_OF_GAP, state.end >= 0
    tells = is_mark & ~in_middle & (state.length < 0)
    enters = (token == vocabulary.MIDDLE) & ~in_middle
    return Gap(
        begin=xp.where(token == vocabulary.SEPARATOR, time, state.begin).astype(xp.int32),
        length=xp.where(tells, time, state.length).astype(xp.int32),
        end=xp.where(enters, time + xp.maximum(state.length, 0), state.end).astype(xp.int32),
        over=state.over | (is_mark & in_middle),
    )


def scan(tokens: Integer[np.ndarray, " T"], time: Int[np.ndarray, " T"]) -> Gap:
    """The state after a whole sequence, in NumPy; `time` is that after each token."""
    if not len(tokens):
        return init()
    return Gap(*(leaf[-1] for leaf in _states(tokens, time)))


def scan_each(tokens: Integer[Any, "*B T"], time: Int[Any, "*B T"]) -> Place:
    """What the model reads after each token of sequences, [*B, T]; `time` is that after each token."""
    xp = time.__array_namespace__()
    state, is_first = _states(tokens, time), xp.cumsum(tokens == vocabulary.SEPARATOR, axis=-1) == 0
    # The part after the gap counts from the gap's beginning, which is where the middle begins.
    middle = xp.where(state.end >= 0, state.end - xp.maximum(state.length, 0), 0).max(axis=-1)[..., None]
    return Place(_left(state, time), xp.where(is_first & (state.end < 0), time + middle, time).astype(xp.int32))


def place(state: Gap, time: Int[Any, "*B"]) -> Place:
    """What the model reads, in the part before the gap or in its middle."""
    return Place(_left(state, time), time)


def categories(place: Place) -> list[Categorical]:
    """Features: the class of the time left."""
    return [Categorical(place.left[..., None], CLASSES)]


def steps_left(state: Gap, time: Int[Any, "*B"]) -> tuple[Int[Any, "*B"], Bool[Any, "*B"]]:
    """Steps up to the end of the gap, and whether they count: in the middle, before the end."""
    return state.end - time, (state.end >= 0) & ~state.over


def _left(state: Gap, time: Int[Any, "*B"]) -> Int[Any, "*B"]:
    xp = time.__array_namespace__()
    steps = xp.maximum(state.end - time, 0).astype(xp.float32)
    rising = 6 * xp.log2(1 + steps / 3) + 1e-3  # keeps whole numbers whole in float32
    left = xp.clip(xp.floor(rising), 0, _TIME_CLASSES - 1)
    return xp.where(state.end < 0, -1, xp.where(state.over, _AFTER, left)).astype(xp.int32)


def _states(tokens: Integer[Any, "*B T"], time: Int[Any, "*B T"]) -> Gap:
    """The state after each token of sequences."""
    xp = time.__array_namespace__()
    axis = time.ndim - 1

    def first(marks: Any) -> Any:
        return marks & (xp.cumsum(marks, axis=axis) == 1)

    enters = first(tokens == vocabulary.MIDDLE)
    in_middle = running_max(enters.astype(xp.int32), axis) > 0
    is_mark = tokens == vocabulary.END_OF_GAP
    length = running_max(xp.where(first(is_mark & ~in_middle), time, -1).astype(xp.int32), axis)
    ends = xp.where(enters, time + xp.maximum(length, 0), -1).astype(xp.int32)
    return Gap(
        begin=running_max(xp.where(tokens == vocabulary.SEPARATOR, time, 0).astype(xp.int32), axis),
        length=length,
        end=running_max(ends, axis),
        over=running_max((is_mark & in_middle).astype(xp.int32), axis) > 0,
    )
