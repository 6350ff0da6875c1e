"""Wishes of training windows: measured from the music that a window predicts, and left out at random.

A model that is trained so can be asked for music with these properties, and still generates without.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int32, Integer

from music_ar.features.composers import canonical, era_of
from music_ar.features.measured import measure
from music_ar.features.wish_options import WISHES
from music_ar.features.wishes import WishTable
from music_ar.ranges import check_ranges, number
from music_ar.tokens.vocabulary import END, END_OF_GAP, EVENT_CLASSES


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
    """

    table: WishTable
    dropout: WishDropout

    def draw(
        self,
        tokens: Integer[np.ndarray, " T"],
        weights: Float[np.ndarray, " N"],
        composer: str | None,
        source: str | None,
        rng: np.random.Generator,
    ) -> Int32[np.ndarray, " W"]:
        """Ids of the wishes of a window.

        Args:
            tokens: of the window; its targets come last. What is measured begins with the first target that has a
                weight, and after the last control token but `END` and `END_OF_GAP`: of a window with a gap, the middle.
            weights: of its targets.
            composer: of the piece, in any spelling.
            source: of the piece.
            rng: decides what is left out.
        """
        first_target = len(tokens) - len(weights) + int((weights > 0).argmax())
        boundaries = np.flatnonzero((tokens >= EVENT_CLASSES) & ~np.isin(tokens, (END, END_OF_GAP)))
        start = max(first_target, int(boundaries[-1]) + 1 if len(boundaries) else 0)
        names = {"composer": canonical(composer), "era": era_of(composer), "source": source}
        ids = self.table.nearest_ids(measure(tokens, start), names)
        left_out = rng.random(len(WISHES)) < self.dropout.wish_dropout
        return np.where(left_out | (rng.random() < self.dropout.without_wishes), 0, ids).astype(np.int32)
