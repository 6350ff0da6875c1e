"""`LiveState`: a decoder's state that follows a piece while it is being played, by people and by the model in turns.

What is added to the piece is read at the cost of its own tokens. What is taken back, because nobody heard it, costs the
tokens since the last copy of the state, which takes about as long as decoding one token.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

from music_ar.decoding.interface import AnyDecoder, AnyState
from music_ar.tokens import vocabulary
from music_ar.tokens.codec import event_steps, length_steps, velocity_bins

_PIECES = (16, 1)  # tokens read by one call: few lengths, since JAX compiles a program for each
_BETWEEN_COPIES = 64  # tokens: about 2 s of music
_MOST_COPIES = 6  # of 3 to 10 MB each with the shipped model
_LEAST_PREFILL = 128  # tokens
_PREFILL_GAIN = 6  # times as fast as token by token, at least


class LiveState:
    """The state after some tokens, which may change at any place.

    Args:
        decoder: the model.
        latents: number of latents.

    Attributes:
        tokens: the tokens that the state has read; the last one is pending. Empty before `follow`.
    """

    def __init__(self, decoder: AnyDecoder, *, latents: int):
        self.tokens = np.zeros(0, np.int32)
        self._decoder, self._latents = decoder, latents
        self._state: AnyState | None = None
        self._prompt_step = 0
        self._copies: list[tuple[int, AnyState]] = []

    def follow(self, tokens: Int[np.ndarray, " T"]) -> int:
        """Bring the state to where a piece is now.

        Args:
            tokens: all of its tokens, beginning with `vocabulary.START`.

        Returns:
            How many of them had to be read.
        """
        tokens = np.asarray(tokens, np.int32)
        vocabulary.check_tokens(tokens)
        self._take_back(_common(self.tokens, tokens))
        rest = tokens[len(self.tokens) :]
        visible = min(len(tokens), self._decoder.config.reach + self._latents)
        if self._state is None or len(rest) > max(_LEAST_PREFILL, visible // _PREFILL_GAIN):
            return self._start(tokens)
        self._append(rest)
        return len(rest)

    def mark(self) -> None:
        """Keep a copy of the state here, and forget earlier ones: what follows may be taken back."""
        assert self._state is not None
        self._copies = [(len(self.tokens), self._state.rows([0]))]

    def sample(self, options: Mapping[str, Any], *, length: int, until_step: int, seed: int) -> Int32[np.ndarray, " T"]:
        """Decode on.

        Args:
            options: how to sample; see `interface.shared_options`.
            length: most tokens.
            until_step: time at which to stop, in steps of 10 ms from the start of the piece.
            seed: of the random draws, which also depend on the place in the piece.

        Returns:
            The new tokens: none if the piece has reached that time, fewer than `length` if it does or ends.
        """
        assert self._state is not None
        if self._copies and len(self.tokens) - self._copies[-1][0] >= _BETWEEN_COPIES:
            self._copies.append((len(self.tokens), self._state.rows([0])))
            if len(self._copies) > _MOST_COPIES:
                del self._copies[1]  # the first is the one from `mark`
        state = self._state.with_limit(until_step - self._prompt_step).with_seeds([seed])
        self._state, tokens_1xT = self._decoder.decode(state, dict(options), length=length)
        tokens = np.asarray(tokens_1xT)[0].astype(np.int32)
        tokens = tokens[tokens != vocabulary.PAD]
        self.tokens = np.concatenate([self.tokens, tokens])
        return tokens

    def free(self) -> None:
        """Free the caches; `follow` then reads the piece anew."""
        self._state, self._copies, self.tokens = None, [], np.zeros(0, np.int32)

    def _take_back(self, length: int) -> None:
        """Go back to a state that has read no more than the first `length` tokens."""
        if length == len(self.tokens):
            return
        self._copies = [(position, state) for position, state in self._copies if position <= length]
        if not self._copies:
            self.free()
            return
        position, state = self._copies[-1]
        self._state, self.tokens = state.rows([0]), self.tokens[:position]

    def _start(self, tokens: Int32[np.ndarray, " T"]) -> int:
        self._copies = []
        self._state = self._decoder.start([tokens], latents=self._latents, seeds=[0], limit_steps=0)
        self._prompt_step, self.tokens = length_steps(tokens), tokens
        return len(tokens)

    def _append(self, tokens: Int32[np.ndarray, " T"]) -> None:
        first = 0
        for piece in _PIECES:
            while len(tokens) - first >= piece:
                assert self._state is not None
                # In one line: the state that is passed must not be used again.
                self._state = self._decoder.teacher_force(self._state, tokens[None, first : first + piece])[0]
                first += piece
        self.tokens = np.concatenate([self.tokens, tokens])


def aligned(read: Int32[np.ndarray, " R"], tokens: Int32[np.ndarray, " T"]) -> Int32[np.ndarray, " T2"]:
    """A piece in the words that a state has read, as long as they say the same, so that less must be read again.

    The model chooses the order of events within a time step, and may write shifts in parts, and velocities that stay.

    Args:
        read: what was read.
        tokens: the piece; it ends with a note-on or note-off, or has none.
    """
    (read_codes, read_steps, read_places), (codes, steps, places) = _events(read), _events(tokens)
    same = _common(read_codes, codes)
    differs = [int(each[same]) >> 16 for each in (read_codes, codes) if same < len(each)]  # at this time step
    end_step = min(differs, default=np.iinfo(np.int64).max)
    read_count, count = (int(np.searchsorted(each, end_step)) for each in (read_steps, steps))
    if read_count == 0 or count == 0:
        return tokens
    kept, rest = read[: read_places[read_count - 1] + 1], tokens[places[count - 1] + 1 :]
    strikes, changes = (np.flatnonzero(mask) for mask in (vocabulary.is_note_on(rest), vocabulary.is_velocity(rest)))
    if len(strikes) and not (len(changes) and changes[0] < strikes[0]):
        velocities = [velocity_bins(each.astype(np.int64))[-1] for each in (kept, tokens[: places[count - 1] + 1])]
        if velocities[0] != velocities[1]:
            rest = np.insert(rest, strikes[0], vocabulary.VELOCITY - 1 + velocities[1])
    return np.concatenate([kept, rest]).astype(np.int32)


def _events(
    tokens: Int32[np.ndarray, " T"],
) -> tuple[Int[np.ndarray, " E"], Int[np.ndarray, " E"], Int[np.ndarray, " E"]]:
    """Note-ons and note-offs: a number for each that says all of it, sorted; their time steps; their places."""
    tokens = tokens.astype(np.int64)
    places = np.flatnonzero(vocabulary.is_note(tokens))
    steps, events = event_steps(tokens)[places], tokens[places]
    velocities = np.where(vocabulary.is_note_on(events), velocity_bins(tokens)[places], 0)
    return np.sort(steps << 16 | events << 6 | velocities), steps, places


def _common(a: Int[np.ndarray, " A"], b: Int[np.ndarray, " B"]) -> int:
    """Length of the common beginning."""
    shorter = min(len(a), len(b))
    differ = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differ[0]) if len(differ) else shorter
