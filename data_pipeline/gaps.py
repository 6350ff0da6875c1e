"""Training windows with a gap to fill: passages re-ordered as `music_ar.tokens.gaps` says.

A share of the windows is re-ordered. The gap's length is log-uniform, since a second and a minute are both worth
filling; its place is uniform within the window. Now and then, one of the parts around it is left out, so that the same
model fills a gap from one side, or from neither. And now and then the gap is the beginning of a piece.

What lies at the boundaries depends on where the gap was put and not on the music: its length, the separators, and the
wait before it. A model is not trained to predict that, so these targets have no weight.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32

from music_ar.tokens.codec import event_steps, length_steps
from music_ar.tokens.gaps import Parts, shifts, split
from music_ar.tokens.vocabulary import START, STEPS_PER_SECOND, is_shift, is_velocity

SHORTEST_S, LONGEST_S = 1.0, 60.0
"""Lengths of gaps that are trained."""
_WITHOUT_AFTER, _WITHOUT_BEFORE = 0.2, 0.1  # shares of the gaps that are filled from one side
_AT_START = 0.2  # share of those in the first window of a piece that begin with the piece
_MOST_MIDDLE = 0.75  # of the targets


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """How windows are re-ordered.

    Attributes:
        share: fraction of the windows that are, 0..1.
        context: number of inputs that attention reads; a re-ordered window has at most one token more.

    Raises:
        ValueError: a value is out of range.
    """

    share: float
    context: int

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"expected a share of 0..1, got {self.share}")
        if self.context < 1:
            raise ValueError(f"expected a context of at least 1, got {self.context}")

    def draw(
        self, tokens: Int32[np.ndarray, " T"], latents: int, rng: np.random.Generator
    ) -> tuple[Int32[np.ndarray, " _"], Float32[np.ndarray, " _"]] | None:
        """Re-order a window, or leave it: for one in `share`, and where there is no room for a gap.

        Args:
            tokens: a passage of a piece.
            latents: N, number of targets of a window.
            rng: draws whether there is a gap, where, and how long.

        Returns:
            The tokens and their weights as targets, at most `context` + 1; None if the window stays as it is.
        """
        if rng.random() >= self.share:
            return None
        tokens = _from_first_velocity(tokens)
        steps = length_steps(tokens)
        longest = min(steps, round(LONGEST_S * STEPS_PER_SECOND))
        shortest = round(SHORTEST_S * STEPS_PER_SECOND)
        if longest < shortest:
            return None
        length = round(math.exp(rng.uniform(math.log(shortest), math.log(longest))))
        begin = int(rng.integers(0, steps - length, endpoint=True))
        without_after, without_before, at_start = rng.random(3) < (_WITHOUT_AFTER, _WITHOUT_BEFORE, _AT_START)
        if at_start and tokens[0] == START:
            begin = 0
        end = _end_that_fits(tokens, begin, begin + length, int(_MOST_MIDDLE * latents))
        if end <= begin:
            return None
        parts = split(tokens, begin, end, with_before=not without_before)
        parts = (parts._replace(after=parts.after[:0]) if without_after else parts).fitted(self.context + 1)
        return None if parts is None else (parts.sequence(), target_weights(parts))


def target_weights(parts: Parts) -> Float32[np.ndarray, " _"]:
    """Weight of each token of a sequence as a target: 0 where it tells where the gap is, otherwise 1."""
    before = np.ones(len(parts.before), np.float32)
    if len(before) and parts.before[0] == START:
        before[0] = 0
    waits = is_shift(parts.before)
    before[len(waits) - int(np.argmin(np.append(waits[::-1], False))) :] = 0
    nothing = np.zeros(1, np.float32)
    told = np.zeros(len(shifts(parts.steps)) + 1, np.float32)
    after, middle = (np.ones(len(part), np.float32) for part in (parts.after, parts.middle))
    return np.concatenate([told, after, nothing, before, nothing, middle])


def _from_first_velocity(tokens: Int32[np.ndarray, " T"]) -> Int32[np.ndarray, " _"]:
    """The tokens from the first velocity: those before it have one that is not known."""
    if not len(tokens) or tokens[0] == START:
        return tokens
    return tokens[int(np.argmax(np.append(is_velocity(tokens), True))) :]


def _end_that_fits(tokens: Int32[np.ndarray, " T"], begin: int, end: int, most: int) -> int:
    """An end of the gap, not after `end`, such that at most so many tokens are in it."""
    steps = event_steps(tokens)
    first = int(np.searchsorted(steps, begin))
    return min(end, int(steps[first + most])) if first + most < len(steps) else end
