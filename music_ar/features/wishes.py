"""Wishes: how the music should be, given to the model beside the tokens, or left out.

A wish is a number that can be measured (`measured`), or a name that the training data has. For each wish a model has a
table of vectors: one for each bucket of a number's range, one for each name. The vectors of all wishes that are given
are summed and added to the embedding of every token. Nothing is added for a wish that is left out, which training does
at random. This module does not import JAX.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from music_ar.features.composers import canonical
from music_ar.features.measured import Measured
from music_ar.features.wish_options import NAMES, NUMBERS, WISHES, WishError, Wishes, wish_help
from music_ar.ranges import shown

GAIN = 4.0
"""By which the vectors of wishes are multiplied. AdamW changes a weight by no more than the learning rate a step, and
the rates of fine-tuning are low; so a new wish is learned in a quarter of the steps."""

_NAMED_IN_ERRORS = 12
_UNKNOWN = Measured()
_FIELDS = {field.name: field for field in dataclasses.fields(Wishes)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WishControl:
    """What a form needs to ask for a wish.

    Attributes:
        name: the field of `Wishes`.
        label: what it is called.
        help: what it means.
        least, most, step: range of a number; None for a name.
        choices: the possible names; empty for a number.
        default: the prompt's own value within the range, or None if it is unknown.
    """

    name: str
    label: str
    help: str
    least: float | None = None
    most: float | None = None
    step: int | float | None = None
    choices: tuple[str, ...] = ()
    default: float | str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WishTable:
    """The wishes that a model takes; part of its config.

    Ids are whole numbers, one for each of `WISHES`: 0 is not given, then come a number's buckets, or the names.

    Attributes:
        edges: for each of `NUMBERS`, the edges of its buckets, rising; the first and the last are the range that was
            heard in training.
        composers, eras, sources: the names.

    Raises:
        ValueError: edges that do not rise, names that are not different texts, or not as many as there are wishes.
    """

    edges: tuple[tuple[float, ...], ...]
    composers: tuple[str, ...] = ()
    eras: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.edges) != len(NUMBERS):
            raise ValueError(f"wishes need edges for each of {', '.join(NUMBERS)}, got {len(self.edges)}")
        for name, edges in zip(NUMBERS, self.edges, strict=True):
            if len(edges) < 2 or not all(np.isfinite(edges)) or not all(np.diff(edges) > 0):
                raise ValueError(f"the edges of {name} must be two or more rising numbers")
        for names in (self.composers, self.eras, self.sources):
            if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
                raise ValueError("the names of wishes must be different texts")

    @classmethod
    def of_json(cls, record: Mapping[str, Any]) -> "WishTable":
        """The table that `dataclasses.asdict` and JSON have made a record of.

        Raises:
            ValueError, TypeError, KeyError: it is no such record.
        """
        edges = tuple(tuple(float(edge) for edge in edges) for edges in record["edges"])
        return cls(edges=edges, **{name: tuple(record[name]) for name in ("composers", "eras", "sources")})

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of buckets or names of each wish."""
        return (*(len(edges) - 1 for edges in self.edges), *(len(names) for names in self._names().values()))

    @property
    def rows(self) -> int:
        """Number of vectors."""
        return sum(self.sizes)

    def ids(self, wishes: Wishes) -> Int32[np.ndarray, " W"]:
        """Ids of wishes.

        Raises:
            WishError: a number is outside what was heard in training, or a name is unknown.
        """
        numbers = [self._checked(name, getattr(wishes, name)) for name in NUMBERS]
        names = [self._found(name, getattr(wishes, name)) for name in NAMES]
        return self._ids(Measured(*numbers), dict(zip(NAMES, names, strict=True)))

    def nearest_ids(self, measured: Measured, names: Mapping[str, str | None]) -> Int32[np.ndarray, " W"]:
        """Ids of music: of a number beyond the range its end, and 0 for a name that the table lacks.

        Args:
            measured: its numbers.
            names: its composer, era and source, as far as they are known.
        """
        return self._ids(measured, names)

    def hot(self, ids: Int32[Any, "*B W"]) -> Float32[Any, "*B R"]:
        """The sum of the one-hot vectors of ids over all R = `rows` vectors, times `GAIN`; of NumPy or JAX arrays."""
        xp = ids.__array_namespace__()
        first = np.cumsum([0, *self.sizes[:-1]]).astype(np.int32)
        rows = ids + xp.asarray(first - 1).reshape((1,) * (ids.ndim - 1) + (-1,))
        rows = xp.where(ids > 0, rows, -1)[..., None]
        every = xp.arange(self.rows).reshape((1,) * ids.ndim + (-1,))
        return GAIN * (rows == every).astype(xp.float32).sum(axis=-2)

    def controls(self, measured: Measured = _UNKNOWN) -> list[WishControl]:
        """What a form needs for each wish that the model takes.

        Args:
            measured: the prompt's own numbers, for the defaults.
        """
        helps = wish_help()
        numbers = [
            WishControl(
                name=name,
                label=_FIELDS[name].metadata["label"],
                help=helps[name],
                least=edges[0],
                most=edges[-1],
                step=_FIELDS[name].metadata["step"],
                default=None if value is None else min(max(value, edges[0]), edges[-1]),
            )
            for name, edges, value in zip(NUMBERS, self.edges, measured, strict=True)
        ]
        names = [
            WishControl(name=name, label=name.capitalize(), help=helps[name], choices=choices)
            for name, choices in self._names().items()
            if choices
        ]
        return [*numbers, *names]

    def _names(self) -> dict[str, tuple[str, ...]]:
        return dict(zip(NAMES, (self.composers, self.eras, self.sources), strict=True))

    def _ids(self, measured: Measured, names: Mapping[str, str | None]) -> Int32[np.ndarray, " W"]:
        # A value on an edge belongs to the bucket above; the last edge, and all beyond, to the last bucket.
        numbers = [
            0 if value is None else 1 + int(np.searchsorted(edges[1:-1], value, side="right"))
            for value, edges in zip(measured, self.edges, strict=True)
        ]
        found = [
            choices.index(name) + 1 if (name := names.get(kind)) in choices else 0
            for kind, choices in self._names().items()
        ]
        return np.array([*numbers, *found], np.int32)

    def _checked(self, name: str, value: float | None) -> float | None:
        edges = self.edges[NUMBERS.index(name)]
        if value is not None and not edges[0] <= value <= edges[-1]:
            unit = _FIELDS[name].metadata["unit"]
            raise WishError(
                f"{name} must be from {edges[0]:g} to {edges[-1]:g} {unit}, which is what this model has heard in "
                f"training; got {shown(value)}"
            )
        return value

    def _found(self, kind: str, name: str | None) -> str | None:
        """The name as the table has it.

        Raises:
            WishError: it is unknown.
        """
        choices = self._names()[kind]
        wanted = canonical(name) if kind == "composer" else None
        by_plain = {choice.casefold(): choice for choice in choices}
        found = by_plain.get((wanted or name or "").casefold())
        if name is None or found is not None:
            return found
        if not choices:
            raise WishError(f"this model was trained without a {kind}; leave it out, got {shown(name)}")
        raise WishError(f"this model knows no {kind} {shown(name)}; {_suggestion(name, choices)}")


def wish_ids(table: WishTable | None, wishes: Wishes) -> Int32[np.ndarray, " W"]:
    """Ids of wishes for a model, whose table is None if it takes none.

    Raises:
        WishError: the model cannot take them.
    """
    if table is not None:
        return table.ids(wishes)
    if wishes.given:
        raise WishError(
            f"this model takes no wishes, got {', '.join(wishes.given)}; leave them out, or use a model that was "
            "trained with `music-ar train --wishes`"
        )
    return np.zeros(len(WISHES), np.int32)


def wish_vectors(
    table: WishTable | None, kernel_RxD: Float32[np.ndarray, "R D"] | None, wishes: Sequence[Wishes]
) -> Float32[np.ndarray, "B D"]:
    """What a model adds to the embedding of each token of each row; without channels if it takes no wishes.

    Args:
        table: the model's wishes; None if it takes none.
        kernel_RxD: its vectors, or None.
        wishes: those of each row.

    Raises:
        WishError: the model cannot take them.
    """
    ids_BxW = np.stack([wish_ids(table, each) for each in wishes])
    if table is None or kernel_RxD is None:
        return np.zeros((len(ids_BxW), 0), np.float32)
    return table.hot(ids_BxW) @ kernel_RxD


def part_ends(latents: int, parts: int) -> Int32[np.ndarray, " P"]:
    """Where the parts of a window end that have wishes of their own, in latents."""
    return (np.arange(1, parts + 1) * latents // parts).astype(np.int32)


def _suggestion(name: str, choices: Sequence[str]) -> str:
    """The names that resemble a wrong one, or all of them, if there are not many."""
    words = {word.casefold(): choice for choice in choices for word in (choice, choice.split()[-1])}
    close = difflib.get_close_matches(name.casefold(), words, n=3, cutoff=0.6)
    nearest = list(dict.fromkeys(words[word] for word in close))
    if nearest:
        return f"did you mean {' or '.join(nearest)}?"
    more = f" and {len(choices) - _NAMED_IN_ERRORS} more" if len(choices) > _NAMED_IN_ERRORS else ""
    return f"it knows {', '.join(choices[:_NAMED_IN_ERRORS])}{more}"
