"""Categorical features: class indices, and their one-hot encoding."""

from typing import Any, NamedTuple

from jaxtyping import Float, Int


class Categorical(NamedTuple):
    """Class indices, each of one of `size` classes.

    Attributes:
        index: each class, from 0; -1 if it is unknown.
        size: number of classes.
    """

    index: Int[Any, "*B _"]
    size: int


def one_hot(features: list[Categorical]) -> Float[Any, "*B _"]:
    """One-hot vectors of length `size`, one after another; all 0 where the class is unknown."""
    xp = features[0].index.__array_namespace__()
    parts = []
    for index, size in features:
        is_class = index[..., None] == xp.arange(size).reshape((1,) * index.ndim + (size,))
        parts.append(is_class.astype(xp.float32).reshape(*index.shape[:-1], -1))
    return xp.concatenate(parts, axis=-1)


def hot_indices(features: list[Categorical]) -> Int[Any, "*B _"]:
    """Positions of the ones in `one_hot`, -1 for unknown classes."""
    xp = features[0].index.__array_namespace__()
    parts, first = [], 0
    for index, size in features:
        offset = first + size * xp.arange(index.shape[-1]).astype(xp.int32)
        parts.append(xp.where(index >= 0, index + offset.reshape((1,) * (index.ndim - 1) + (-1,)), -1))
        first += size * index.shape[-1]
    return xp.concatenate(parts, axis=-1)
