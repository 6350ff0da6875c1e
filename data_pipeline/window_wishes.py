"""Wishes of training windows: measured from the music that a window predicts, and left out at random.

A model that is trained so can be asked for music with these properties, and still generates without. They are measured
part by part, in about seven seconds of music each: what has sounded so far tells less about the next part than about
the mean of a minute, so a wish has more to say.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int32, Integer

from music_ar.features.composers import canonical, era_of
from music_ar.features.measured import measure
from music_ar.features.wish_options import WISHES
from music_ar.features.wishes import WishTable, part_ends
from music_ar.ranges import check_ranges, number
from music_ar.tokens.vocabulary import END, END_OF_GAP, EVENT_CLASSES

PART = 256
"""Targets of a part of a window: what wishes are measured in."""
BEFORE = 256
"""Tokens before a part that are read to know which velocity is in force."""


@dataclass(frozen=True, kw_only=True)
class WishDropout:
    """How often training windows come without wishes (for models that take wishes).

    Attributes:
        wish_dropout: chance that a wish is left out, each by itself. Higher learns more of single wishes, lower of all
            of them together.
        without_wishes: share of the windows without any wish. It keeps generation without wishes as good as it was.
    """

    wish_dropout: float = number(0.5, least=0, most=1)
    without_wishes: float = number(0.2, least=0, most=1)

    def __post_init__(self) -> None:
        check_ranges(self, ValueError)


@dataclass(frozen=True, kw_only=True)
class WindowWishes:
    """Gives windows their wishes.

    Attributes:
        table: the wishes that the model takes.
        dropout: how often they are left out.
        part: targets of a part of a window; a window of fewer is one part.
    """

    table: WishTable
    dropout: WishDropout
    part: int = PART

    def draw(
        self,
        tokens: Integer[np.ndarray, " T"],
        weights: Float[np.ndarray, " N"],
        composer: str | None,
        source: str | None,
        rng: np.random.Generator,
    ) -> Int32[np.ndarray, "P W"]:
        """Ids of the wishes of the P equal parts of a window's targets.

        Args:
            tokens: of the window; its targets come last. What is measured begins with the first target that has a
                weight, and after the last control token but `END` and `END_OF_GAP`: of a window with a gap, the middle.
                Parts before it, or with too little of it, have the ids of the next.
            weights: of its targets.
            composer: of the piece, in any spelling.
            source: of the piece.
            rng: decides what is left out.
        """
        first_target = len(tokens) - len(weights) + int((weights > 0).argmax())
        boundaries = np.flatnonzero((tokens >= EVENT_CLASSES) & ~np.isin(tokens, (END, END_OF_GAP)))
        start = max(first_target, int(boundaries[-1]) + 1 if len(boundaries) else 0)
        names = {"composer": canonical(composer), "era": era_of(composer), "source": source}
        parts = max(1, len(weights) // self.part)
        ends = len(tokens) - len(weights) + part_ends(len(weights), parts)
        ids, measured = np.zeros((parts, len(WISHES)), np.int32), 0
        for last, end in enumerate(ends.tolist()):
            if last == parts - 1 or end - start >= self.part // 2:
                before = max(0, start - BEFORE)
                ids[measured : last + 1] = self.table.nearest_ids(measure(tokens[before:end], start - before), names)
                start, measured = end, last + 1
        left_out = rng.random(len(WISHES)) < self.dropout.wish_dropout
        return np.where(left_out | (rng.random() < self.dropout.without_wishes), 0, ids).astype(np.int32)
