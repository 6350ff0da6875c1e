"""Sequences with a gap to fill: what comes after it, what comes before it, and then its middle.

    shifts END_OF_GAP after | SEPARATOR [START] before | MIDDLE middle shifts END_OF_GAP releases END

Perceiver AR reads a sequence in any order, so one model can continue a piece and fill a gap in it ("Efficient training
of language models to fill in the middle", Bavarian et al., arXiv 2207.14255, does so with text). Either part may be
empty; `START` says that the piece begins there.

- The first time shifts add up to the length of the gap, so the part after it counts its time from the gap's beginning.
  It consists of the notes that begin in it.
- The part before ends with time shifts up to the gap's beginning. It consists of what happens up to there.
- The middle consists of the notes that begin in the gap, and of the note-offs of keys that the part before left held.
  Time shifts bring it to exactly the end of the gap. What is still held there is released after it, so that no note is
  cut or left hanging.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, Integer

from music_ar.tokens.codec import event_steps, pair_notes, velocity_bins, with_time_shifts
from music_ar.tokens.vocabulary import (
    END,
    END_OF_GAP,
    MAX_SHIFT_STEPS,
    MIDDLE,
    NOTE_OFF,
    SEPARATOR,
    START,
    TIME_SHIFT,
    VELOCITY,
)


class Parts(NamedTuple):
    """The parts of a piece around a gap, in the tokens of a sequence, without separators.

    Attributes:
        before: from `START`, if the piece begins there, up to the beginning of the gap.
        middle: from there to `END`, or to the last token known if a note of it is not released in the piece.
        after: the notes that begin after the gap, timed from its end.
        steps: length of the gap.
    """

    before: Int32[np.ndarray, " _b"]
    middle: Int32[np.ndarray, " _m"]
    after: Int32[np.ndarray, " _a"]
    steps: int

    def sequence(self) -> Int32[np.ndarray, " _"]:
        """The whole sequence, in the order in which a model learns it."""
        return np.concatenate([self.prompt(), self.middle])

    def prompt(self) -> Int32[np.ndarray, " _"]:
        """What a model is given: everything up to `MIDDLE`."""
        parts = [shifts(self.steps), [END_OF_GAP], self.after, [SEPARATOR], self.before, [MIDDLE]]
        return np.concatenate(parts).astype(np.int32)

    def fitted(self, size: int) -> "Parts | None":
        """Shorten both parts around the gap at their far ends, so that the sequence has at most `size` tokens.

        Each part gets half of the room, and what the other leaves. None if there is no room for the middle.
        """
        room = size - (len(shifts(self.steps)) + 3) - len(self.middle)
        if room < 0:
            return None
        before, after = len(self.before), len(self.after)
        kept = min(before, max(room // 2, room - after))
        return self._replace(before=self.before[before - kept :], after=self.after[: room - kept])


def before_part(tokens: Integer[np.ndarray, " T"]) -> Integer[np.ndarray, " _"]:
    """The part before the gap, of a prompt; the prompt itself if it has no gap."""
    if not len(tokens) or tokens[-1] != MIDDLE:
        return tokens
    return tokens[np.flatnonzero(tokens == SEPARATOR)[-1] + 1 : -1]


def split(tokens: Integer[np.ndarray, " T"], begin_step: int, end_step: int, *, with_before: bool = True) -> Parts:
    """Divide a piece, or a passage of one, at a gap.

    Args:
        tokens: of the piece; its `END` does not count. Note-offs of notes that begin before the passage are dropped.
        begin_step: beginning of the gap, in steps from the beginning of the tokens.
        end_step: end of the gap, later than its beginning.
        with_before: whether there is a part before the gap; otherwise the notes that begin there are left out.
    """
    notes = _Events.of(tokens)
    first = begin_step if not with_before else 0
    kept = notes.select(notes.onset >= first)
    is_before = (kept.onset < begin_step) & (kept.step <= begin_step)
    is_after = kept.onset >= end_step
    rest = kept.select(~is_before & ~is_after)
    before, after = kept.select(is_before), kept.select(is_after)
    starts = with_before and len(tokens) > 0 and int(tokens[0]) == START
    zero = 0 if starts or not len(before.step) else int(before.step[0])
    written = [before.write(zero), shifts(begin_step - int(before.step[-1] if len(before.step) else zero))]
    if not starts and not len(before.step):
        written = []
    gap, releases = rest.select(rest.step < end_step), rest.select(rest.step >= end_step)
    middle = [
        gap.write(begin_step, before.last_bin()),
        shifts(end_step - int(gap.step[-1] if len(gap.step) else begin_step)),
        np.array([END_OF_GAP]),
        releases.write(end_step),
        np.array([END] if kept.released[~is_after].all() else [], np.int64),
    ]
    return Parts(
        before=np.concatenate([[START] * starts, *written]).astype(np.int32),
        middle=np.concatenate(middle).astype(np.int32),
        after=after.write(end_step).astype(np.int32),
        steps=end_step - begin_step,
    )


def shifts(steps: int) -> Int64[np.ndarray, " _"]:
    """Time shifts that add up to a number of steps: full ones first."""
    full, rest = divmod(steps, MAX_SHIFT_STEPS)
    return np.array([TIME_SHIFT + MAX_SHIFT_STEPS - 1] * full + [TIME_SHIFT + rest - 1] * (rest > 0), np.int64)


class _Events(NamedTuple):
    """Note-ons and note-offs, in the order of their tokens.

    Attributes:
        token: each event.
        step: its time.
        onset: the time at which its note begins.
        bin: the velocity bin in force.
        released: whether its note has a note-off.
    """

    token: Int64[np.ndarray, " e"]
    step: Int64[np.ndarray, " e"]
    onset: Int64[np.ndarray, " e"]
    bin: Int64[np.ndarray, " e"]
    released: np.ndarray

    @classmethod
    def of(cls, tokens: Integer[np.ndarray, " T"]) -> "_Events":
        """The note events of tokens, without stray note-offs."""
        tokens = np.asarray(tokens, np.int64)
        step, pairs = event_steps(tokens), pair_notes(tokens)
        ended = pairs.off >= 0
        place = np.concatenate([pairs.on, pairs.off[ended]])
        onset = step[np.concatenate([pairs.on, pairs.on[ended]])]
        released = np.concatenate([ended, ended[ended]])
        order = np.argsort(place)
        place = place[order]
        return cls(tokens[place], step[place], onset[order], velocity_bins(tokens)[place], released[order])

    def select(self, kept: np.ndarray) -> "_Events":
        return _Events(*(column[kept] for column in self))

    def last_bin(self) -> int:
        """The velocity bin in force after the last note-on; 0 if there is none."""
        bins = self.bin[self.token < NOTE_OFF]
        return int(bins[-1]) if len(bins) else 0

    def write(self, zero: int, last_bin: int = 0) -> Int64[np.ndarray, " _"]:
        """Tokens of the events.

        Args:
            zero: the step that their time counts from.
            last_bin: the velocity bin in force before them; 0 if none is.
        """
        ons = np.flatnonzero(self.token < NOTE_OFF)
        changes = np.diff(self.bin[ons], prepend=last_bin) != 0
        places = ons[changes]
        tokens = np.insert(self.token, places, VELOCITY - 1 + self.bin[places])
        return with_time_shifts(tokens, np.insert(self.step, places, self.step[places]) - zero)[0]
