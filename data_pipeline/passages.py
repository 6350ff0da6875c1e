"""Passages of pieces, each in two views, to train a piece encoder on (`music_ar.training.piece_encoding`).

A batch draws B pieces, longer ones more often, and a few passages of each. The two views of a passage are two excerpts
that overlap by at least half of the shorter one, each transposed, re-timed and made louder or softer on its own, and
each with some of its notes hidden. Neither key nor tempo nor place tells the two from the others of the batch, so an
encoder must go by what is left: the music.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32, Int64

from data_pipeline.augmentation.note_tables import transform_notes
from data_pipeline.augmentation.transforms import Augmentation
from data_pipeline.dataset import Pieces
from data_pipeline.manifest import DatasetError
from music_ar.embedding.notes import DURATION, ONSET, notes_of_tokens
from music_ar.ranges import check_ranges, number, whole
from music_ar.tokens.vocabulary import STEPS_PER_SECOND, is_note_on

_LEAST_NOTES = 8  # of a view, hidden ones included
_SECONDS_PER_DRAW = 120.0  # of a piece: each gives as many examples in an epoch as it has of these
_TRIES = 20


@dataclass(frozen=True, kw_only=True)
class PassageConfig:
    """How passages are drawn.

    Attributes:
        passages: number of passages of a piece in an example. More than one makes the encoder tell them apart.
        notes: largest number of notes of a view that is read; longer ones are cut.
        min_passage: length of the shortest view, in seconds.
        max_passage: length of the longest view, in seconds; all lengths between are drawn, on a logarithmic scale.
        hidden: share of the notes of each view that is hidden, to be predicted.
    """

    passages: int = whole(2, 1, 64)
    notes: int = whole(1024, 2 * _LEAST_NOTES, 2**16)
    min_passage: float = number(10.0, least=1, most=3600)
    max_passage: float = number(90.0, least=1, most=3600)
    hidden: float = number(0.15, above=0, most=0.9)

    def __post_init__(self) -> None:
        check_ranges(self, ValueError)
        if self.max_passage < self.min_passage:
            raise ValueError(f"max_passage must be at least min_passage = {self.min_passage}, got {self.max_passage}")

    @property
    def most_hidden(self) -> int:
        """Largest number of notes that is hidden of a view."""
        return max(1, math.ceil(self.notes * self.hidden / (1 - self.hidden)))


AUGMENTATION = Augmentation(min_semitones=-6, max_semitones=6, min_stretch=0.8, max_stretch=1.25, velocity_bins=3)
"""The augmentation of each view: wider than that of training windows, since music is to be found in any key."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Passages:
    """All examples of all epochs, by index; an example is one piece with P passages of two views each.

    Attributes:
        notes: the notes of each piece.
        compositions: number of the composition of each piece.
        config: how passages are drawn.
        augmentation: what to draw for each view.
        seed: of all draws.
    """

    notes: Sequence[Int32[np.ndarray, "_ 4"]]
    compositions: Sequence[int]
    config: PassageConfig
    augmentation: Augmentation
    seed: int
    _of_epoch: Int64[np.ndarray, " X"] = field(init=False)

    def __post_init__(self) -> None:
        seconds = [_end(table) / STEPS_PER_SECOND for table in self.notes]
        draws = [max(1, round(length / _SECONDS_PER_DRAW)) for length in seconds]
        object.__setattr__(self, "_of_epoch", np.repeat(np.arange(len(draws)), draws))

    @classmethod
    def of(cls, pieces: Pieces, *, config: PassageConfig, augmentation: Augmentation, seed: int) -> Passages:
        """Passages of the pieces of a split; pieces with too few notes to hide any are left out.

        Raises:
            DatasetError: there are no others.
        """
        counts = [np.count_nonzero(is_note_on(tokens)) for tokens in pieces.tokens]
        kept = [index for index, count in enumerate(counts) if count >= 2 * _LEAST_NOTES]
        if not kept:
            raise DatasetError(f"expected pieces of at least {2 * _LEAST_NOTES} notes to take passages from, got none.")
        # A piece whose composition is unknown is one of its own.
        names = [pieces.records[index].composition or index for index in kept]
        numbers = {name: place for place, name in enumerate(dict.fromkeys(names))}
        return cls(
            notes=[notes_of_tokens(pieces.tokens[index]) for index in kept],
            compositions=[numbers[name] for name in names],
            config=config,
            augmentation=augmentation,
            seed=seed,
        )

    def __len__(self) -> int:
        """Number of examples in an epoch."""
        return len(self._of_epoch)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The example at `index`, which may be in any epoch.

        Returns:
            "notes" int32 [P, 2, M, 4] and "counts" [P, 2]; "hidden" [P, 2, Q, 4] and "hidden_counts" [P, 2]; "piece",
            "composition", "start" and "end" int32 [P], the time of what both views span; "weights", 1.
        """
        epoch, place = divmod(index, len(self))
        shuffled = np.random.default_rng((self.seed, epoch)).permutation(len(self))
        piece = int(self._of_epoch[shuffled[place]])
        rng = np.random.default_rng((self.seed, index, 1))
        drawn = [self._passage(piece, rng) for _ in range(self.config.passages)]
        stacked = {name: np.stack([each[name] for each in drawn]) for name in drawn[0]}
        return {**stacked, "weights": np.ones((), np.float32)}

    def _passage(self, piece: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One passage in two views."""
        notes, config = self.notes[piece], self.config
        spans = self._spans(notes, rng)
        views = [self._view(notes[_inside(notes, *span)], span[1], rng) for span in spans]
        start, end = min(span[0] for span in spans), max(span[1] for span in spans)
        whence = {"piece": piece, "composition": self.compositions[piece], "start": start, "end": end}
        padded = {
            "notes": [_padded(visible, config.notes) for visible, _ in views],
            "counts": [min(len(visible), config.notes) for visible, _ in views],
            "hidden": [_padded(hidden, config.most_hidden) for _, hidden in views],
            "hidden_counts": [min(len(hidden), config.most_hidden) for _, hidden in views],
        }
        return {name: np.array(value, np.int32) for name, value in (padded | whence).items()}

    def _spans(self, notes: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Start and end, in steps, of two overlapping excerpts with enough notes; the whole piece if none are found."""
        length = _end(notes)
        shortest, longest = (
            min(length, round(seconds * STEPS_PER_SECOND))
            for seconds in (self.config.min_passage, self.config.max_passage)
        )
        for _ in range(_TRIES):
            sizes = np.exp(rng.uniform(math.log(shortest), math.log(longest), 2)).astype(int)
            first = int(rng.integers(0, length - sizes[0], endpoint=True))
            shared = int(sizes.min()) // 2
            second = int(rng.integers(first + shared - sizes[1], first + sizes[0] - shared, endpoint=True))
            second = min(max(second, 0), length - int(sizes[1]))
            spans = [(first, first + int(sizes[0])), (second, second + int(sizes[1]))]
            if all(_inside(notes, *span).sum() >= _LEAST_NOTES for span in spans):
                return spans
        return [(0, length)] * 2

    def _view(self, notes: np.ndarray, end: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The notes of an excerpt, cut at its end and augmented: those that are seen, and those that are hidden."""
        notes = notes.copy()
        notes[:, DURATION] = np.maximum(np.minimum(notes[:, DURATION], end - notes[:, ONSET]), 1)
        notes[:, ONSET] -= notes[0, ONSET]
        notes = transform_notes(notes, *self.augmentation.draw(rng))
        notes = notes[: self.config.notes + self.config.most_hidden]
        count = min(max(1, round(len(notes) * self.config.hidden)), self.config.most_hidden)
        is_hidden = np.zeros(len(notes), bool)
        is_hidden[rng.choice(len(notes), count, replace=False)] = True
        return notes[~is_hidden], notes[is_hidden]


def _inside(notes: np.ndarray, start: int, end: int) -> np.ndarray:
    """Which notes begin in a span."""
    return (notes[:, ONSET] >= start) & (notes[:, ONSET] < end)


def _end(notes: np.ndarray) -> int:
    """A step after the last onset, at least 1."""
    return int(notes[-1, ONSET]) + 1


def _padded(notes: np.ndarray, length: int) -> np.ndarray:
    """The first `length` notes, with zeros after them."""
    padded = np.zeros((length, 4), np.int32)
    padded[: len(notes)] = notes[:length]
    return padded
