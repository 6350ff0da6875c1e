"""Pieces that come back to how they began: each phrase is made several times, and one of them is kept.

A model that draws one event after another seldom returns to a theme. So from each phrase of 8 seconds, several are made
from the same point. The one is kept of whose notes the largest share lies in runs of the theme, in any key and rhythm
(`music_ar.metrics.form`); the theme is what the piece begins with. Each is still a sample of the model.

`ChoosingDecoder` is a decoder whose rows are such pieces, each of which takes as many rows of another decoder as
phrases are made. This module does not import JAX.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Integer

from music_ar.decoding.interface import AnyState, Options, repeat_options, repeat_rows, row_wishes
from music_ar.decoding.request import limits
from music_ar.features.wish_options import Wishes
from music_ar.metrics.form import RUN_NOTES, returning_share
from music_ar.midi.performance import Performance
from music_ar.ranges import MAX_SEED
from music_ar.tokens import vocabulary
from music_ar.tokens.codec import decode, event_steps, length_steps

PHRASE_S = 8.0
THEME_S = 30.0
_PHRASE_STEPS, _MOST_TOKENS = limits(PHRASE_S)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Piece:
    """One row: what has been chosen, and the phrases that are being made.

    Attributes:
        seed: of the piece.
        limit_steps: music to make after the prompt, in steps.
        theme: the tokens of its first `THEME_S` seconds, as far as there are.
        last: tokens with the last notes, after which a phrase begins.
        steps: music made after the prompt, in steps.
        phrases: number of phrases chosen.
        making: the tokens of each phrase in the making, with their NLL; empty between two phrases.
        ended: whether it has ended on its own, or is idle.
    """

    seed: int
    limit_steps: int
    theme: Int[np.ndarray, " _"]
    last: Int[np.ndarray, " _"]
    steps: int = 0
    phrases: int = 0
    making: tuple[tuple[Int[np.ndarray, " _"], Any], ...] = ()
    ended: bool = False

    @property
    def done(self) -> bool:
        return self.ended or self.steps >= self.limit_steps

    def seed_of(self, number: int) -> int:
        """The seed of one of the phrases in the making."""
        (drawn,) = np.random.SeedSequence([self.seed, self.phrases, number]).generate_state(1)
        return int(drawn) % (MAX_SEED + 1)

    def ends(self, number: int) -> bool:
        """Whether one of the phrases in the making ends the piece."""
        return bool(self.making) and vocabulary.END in self.making[number][0]

    def choice(self) -> int:
        """The number of the phrase to keep. If the first one ends the piece, it ends, as often as without a choice."""
        if self.ends(0):
            return 0
        theme = decode(self.theme)
        going_on = [number for number in range(len(self.making)) if not self.ends(number)]
        return max(going_on, key=lambda number: self._returning(theme, self.making[number][0]))

    def _returning(self, theme: Performance, phrase: Int[np.ndarray, " _"]) -> float:
        """The share of the notes of a phrase that lies in runs of the theme."""
        if len(phrase) >= _MOST_TOKENS:  # time stands still
            return -1.0
        return returning_share(theme, decode(np.concatenate([self.last, phrase])))

    def with_phrase(self, phrase: Int[np.ndarray, " _"]) -> "_Piece":
        """The piece with the phrase that was kept."""
        return dataclasses.replace(
            self,
            theme=_beginning(np.concatenate([self.theme, phrase])),
            last=_ending(np.concatenate([self.last, phrase])),
            steps=self.steps + length_steps(phrase),
            phrases=self.phrases + 1,
            making=(),
            ended=vocabulary.END in phrase,
        )


def _beginning(tokens: Int[np.ndarray, " _"]) -> Int[np.ndarray, " _"]:
    """The tokens of the theme."""
    return tokens[event_steps(tokens) <= THEME_S * vocabulary.STEPS_PER_SECOND]


def _ending(tokens: Int[np.ndarray, " _"]) -> Int[np.ndarray, " _"]:
    """The tokens from the note on with which a run may begin that goes on in the next phrase."""
    begins = np.flatnonzero(vocabulary.is_note_on(tokens))[-(RUN_NOTES - 1) :]
    return tokens[begins[0] :] if len(begins) else tokens[:0]


@dataclasses.dataclass(frozen=True, eq=False)
class ChoosingState:
    """`AnyState` of pieces: row i stands for as many rows of `made` as there are choices, side by side."""

    made: AnyState
    pieces: tuple[_Piece, ...]
    choices: int

    @property
    def done_B(self) -> Bool[np.ndarray, " B"]:
        """See `AnyState.done_B`."""
        return np.array([piece.done for piece in self.pieces])

    @property
    def layers_run_B(self) -> Any:
        """See `AnyState.layers_run_B`: those of the first of the rows."""
        run_B = self.made.layers_run_B
        return None if run_B is None else run_B[:: self.choices]

    def with_limit(self, limit_steps: int) -> "ChoosingState":
        """See `AnyState.with_limit`."""
        return self._with("limit_steps", [limit_steps] * len(self.pieces))

    def with_seeds(self, seeds: Sequence[int]) -> "ChoosingState":
        """See `AnyState.with_seeds`."""
        return self._with("seed", seeds)

    def with_ended(self, ended_B: Bool[np.ndarray, " B"]) -> "ChoosingState":
        """See `AnyState.with_ended`."""
        pieces = self._with("ended", ended_B.tolist()).pieces
        # Of a piece that goes on, some phrases may have ended it already.
        ended = [piece.ended or piece.ends(number) for piece in pieces for number in range(self.choices)]
        return dataclasses.replace(self, made=self.made.with_ended(np.array(ended)), pieces=pieces)

    def rows(self, rows: Sequence[int]) -> "ChoosingState":
        """See `AnyState.rows`."""
        made = self.made.rows([number for row in rows for number in self.rows_of(row)])
        return dataclasses.replace(self, made=made, pieces=tuple(self.pieces[row] for row in rows))

    def replaced(self, row: int, newcomer: "ChoosingState") -> "ChoosingState":
        """See `AnyState.replaced`."""
        made = self.made
        for number, of_newcomer in zip(self.rows_of(row), newcomer.rows_of(0), strict=True):
            made = made.replaced(number, newcomer.made.rows([of_newcomer]))
        return self._with_piece(made, row, newcomer.pieces[0])

    def begun(self, row: int) -> "ChoosingState":
        """With the phrases of a piece begun, all from the state of its first row."""
        piece, made = self.pieces[row], self.made
        first = made.rows([self.rows_of(row)[0]]).with_limit(min(piece.steps + _PHRASE_STEPS, piece.limit_steps))
        for number, of_row in enumerate(self.rows_of(row)):
            made = made.replaced(of_row, first.with_seeds([piece.seed_of(number)]))
        nothing = (np.zeros(0, np.int32), np.zeros(0, np.float32))
        return self._with_piece(made, row, dataclasses.replace(piece, making=(nothing,) * self.choices))

    def chosen(self, row: int, number: int) -> "ChoosingState":
        """With one of the phrases of a piece kept, and its state in the first row."""
        piece = self.pieces[row]
        first, kept = self.rows_of(row)[0], self.rows_of(row)[number]
        made = self.made.replaced(first, self.made.rows([kept]))
        return self._with_piece(made, row, piece.with_phrase(piece.making[number][0]))

    def rows_of(self, row: int) -> range:
        """The rows of `made` that belong to a piece."""
        return range(row * self.choices, (row + 1) * self.choices)

    def _with_piece(self, made: AnyState, row: int, piece: _Piece) -> "ChoosingState":
        return dataclasses.replace(self, made=made, pieces=(*self.pieces[:row], piece, *self.pieces[row + 1 :]))

    def _with(self, name: str, values: Sequence[Any]) -> "ChoosingState":
        """With other values of an attribute of the pieces, one for each."""
        pairs = zip(self.pieces, values, strict=True)
        return dataclasses.replace(
            self, pieces=tuple(dataclasses.replace(piece, **{name: value}) for piece, value in pairs)
        )


class ChoosingDecoder:
    """Decodes pieces of which each phrase is chosen from several, made side by side by another decoder.

    Args:
        decoder: the model.
        choices: number of phrases to choose from.
    """

    def __init__(self, decoder: Any, choices: int):
        self._decoder, self.choices = decoder, choices
        self.config, self.backend = decoder.config, decoder.backend

    def start(
        self,
        prompts: Sequence[Integer[np.ndarray, " _P"]],
        *,
        seeds: Sequence[int],
        limit_steps: int,
        wishes: Sequence[Wishes] | None = None,
        **options: Any,
    ) -> ChoosingState:
        """See `AnyDecoder.start`."""
        made = self._decoder.start(
            repeat_rows(prompts, self.choices),
            seeds=repeat_rows(seeds, self.choices),
            limit_steps=limit_steps,
            wishes=repeat_rows(row_wishes(wishes, len(prompts)), self.choices),
            **options,
        )
        pieces = [
            _Piece(seed=seed, limit_steps=limit_steps, theme=_beginning(prompt[1:]), last=_ending(prompt[1:]))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return ChoosingState(made, tuple(pieces), self.choices)

    def decode(self, state: ChoosingState, options: Options, *, length: int) -> tuple[ChoosingState, Any]:
        """See `AnyDecoder.decode`."""
        return self.decode_scored(state, options, length=length)[:2]

    def decode_scored(self, state: ChoosingState, options: Options, *, length: int) -> tuple[ChoosingState, Any, Any]:
        """See `AnyDecoder.decode_scored`. Decodes until a phrase of a piece can be chosen, whatever `length` is.

        Returns:
            The state, the tokens of the phrases that were chosen, `vocabulary.PAD` after them and in all other rows,
            and their NLL.
        """
        for row, piece in enumerate(state.pieces):
            if not piece.done and not piece.making:
                state = state.begun(row)
        repeated = repeat_options(options, self.choices)
        while not (ready := _ready(state)) and not state.done_B.all():
            made, tokens, nats = self._decoder.decode_scored(state.made, repeated, length=length)
            pieces = _with_tokens(state, np.asarray(tokens), np.asarray(nats))
            state = dataclasses.replace(state, made=made, pieces=pieces)
        found: list[tuple[Any, Any]] = [(np.zeros(0, np.int32), np.zeros(0, np.float32))] * len(state.pieces)
        for row in ready:
            number = state.pieces[row].choice()
            found[row] = state.pieces[row].making[number]
            state = state.chosen(row, number)
        longest = max(len(tokens) for tokens, _ in found)
        tokens_BxT, nats_BxT = (
            np.stack([np.pad(each[of], (0, longest - len(each[of])), constant_values=fill) for each in found])
            for of, fill in ((0, vocabulary.PAD), (1, 0))
        )
        return state, tokens_BxT, nats_BxT

    def batch_rows(self, latents: int) -> int:
        """See `AnyDecoder.batch_rows`: the decoder's, divided by the choices."""
        return max(1, self._decoder.batch_rows(latents) // self.choices)


def _ready(state: ChoosingState) -> list[int]:
    """The pieces all of whose phrases have been made."""
    made_B = np.asarray(state.made.done_B)
    return [
        row
        for row, piece in enumerate(state.pieces)
        if piece.making
        and all(
            made_B[number] or len(tokens) >= _MOST_TOKENS
            for number, (tokens, _) in zip(state.rows_of(row), piece.making, strict=True)
        )
    ]


def _with_tokens(state: ChoosingState, tokens_BxT: Int[np.ndarray, "B T"], nats_BxT: Any) -> tuple[_Piece, ...]:
    """The pieces with more tokens of the phrases that are being made."""

    def longer(row: int, piece: _Piece) -> _Piece:
        rows = state.rows_of(row)
        real = [tokens_BxT[number] != vocabulary.PAD for number in rows]
        making = tuple(
            (np.concatenate([tokens, tokens_BxT[number][kept]]), np.concatenate([nats, nats_BxT[number][kept]]))
            for (tokens, nats), number, kept in zip(piece.making, rows, real, strict=True)
        )
        return dataclasses.replace(piece, making=making)

    return tuple(longer(row, piece) if piece.making else piece for row, piece in enumerate(state.pieces))
