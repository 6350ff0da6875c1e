"""`GapRequest`: the gap that a `Request` asks to fill, as tokens for a model and as notes around the result.

This module does not import JAX.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float64, Int32

from music_ar.midi.performance import Performance
from music_ar.tokens.codec import encode, length_steps
from music_ar.tokens.gaps import Parts, split
from music_ar.tokens.vocabulary import START, STEPS_PER_SECOND

SHORTEST_S, LONGEST_S = 0.1, 60.0
"""Lengths of a gap: from a short note to the longest that models are trained to fill."""
RELEASE_S = 10.0
"""Time after the end of a gap in which keys may still be released; none is held for so long."""
_RESERVED_TOKENS_PER_S = 100  # of the context, for the middle; twice what MAESTRO has on average
_MOST_RESERVED = 0.5  # of the context


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GapRequest:
    """A gap to fill.

    Attributes:
        tokens: what the model is given.
        begin_step: where the gap begins in the piece, in steps of 10 ms.
        end_s: where the gap ends in the piece, in seconds.
        after: the notes after the gap, at their times in the piece.
        cut: how much of the piece the model is given, in a sentence; None if that is all of it.
    """

    tokens: Int32[np.ndarray, " P"]
    begin_step: int
    end_s: float
    after: Performance
    cut: str | None

    @classmethod
    def of(
        cls, before: Performance | None, after: Performance, seconds: float, begin_s: float | None, context: int
    ) -> "GapRequest | None":
        """The gap between two passages; None if it does not fit in the context.

        Args:
            before: what comes before the gap; what it has after the gap's beginning does not count, except that keys
                still held there are released in the gap.
            after: what comes after it, timed from its end.
            seconds: length of the gap.
            begin_s: where it begins; default: where the notes before it end.
            context: number of inputs that the model reads.
        """
        tokens = np.concatenate([[START], encode(Performance.empty() if before is None else before)])
        begin_step = length_steps(tokens) if begin_s is None else round(begin_s * STEPS_PER_SECOND)
        steps = round(seconds * STEPS_PER_SECOND)
        whole = split(tokens, begin_step, begin_step + steps)
        whole = whole._replace(after=encode(after), middle=whole.middle[:0])
        reserved = math.ceil(min(_MOST_RESERVED * context, _RESERVED_TOKENS_PER_S * seconds))
        parts = whole.fitted(context - reserved)
        if parts is None:
            return None
        end_s = (begin_step / STEPS_PER_SECOND if begin_s is None else begin_s) + seconds
        return cls(
            tokens=parts.prompt(),
            begin_step=begin_step,
            end_s=end_s,
            after=after.shift(end_s),
            cut=_cut(whole, parts),
        )

    def filled(self, piece: Performance) -> Performance:
        """The piece with what comes after the gap. What sounds in the gap ends where its key is struck again.

        Args:
            piece: what comes before the gap, and what fills it.
        """
        onset_s, offset_s, pitch, velocity = (
            np.concatenate([ours, theirs])
            for ours, theirs in (
                (piece.onset_s, self.after.onset_s),
                (piece.offset_s, self.after.offset_s),
                (piece.pitch, self.after.pitch),
                (piece.velocity, self.after.velocity),
            )
        )
        in_gap = (np.arange(len(pitch)) < len(piece)) & (offset_s > self.begin_step / STEPS_PER_SECOND)
        cut_s = np.where(in_gap, np.minimum(offset_s, _struck_again_s(onset_s, pitch)), offset_s)
        return Performance(
            onset_s=onset_s, offset_s=cut_s, pitch=pitch, velocity=velocity, prompt_file=piece.prompt_file
        )


def _struck_again_s(onset_s: Float64[np.ndarray, " n"], pitch: Int32[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """When the key of each note is struck the next time, later than the note; infinity if it is not."""
    order = np.lexsort((onset_s, pitch))
    onset, key = onset_s[order], pitch[order]
    following = np.append(np.where(key[1:] == key[:-1], onset[1:], np.inf), np.inf)
    following[following <= onset] = np.inf
    again_s = np.empty(len(order))
    again_s[order] = following
    return again_s


def _cut(whole: Parts, given: Parts) -> str | None:
    """A sentence about what does not fit in the model's context."""
    read = [
        f"{length_steps(part) / STEPS_PER_SECOND:.0f} s {side} it"
        for part, entire, side in ((given.before, whole.before, "before"), (given.after, whole.after, "after"))
        if len(part) < len(entire)
    ]
    return f"the model reads only {' and '.join(read)}: more does not fit in its context" if read else None
