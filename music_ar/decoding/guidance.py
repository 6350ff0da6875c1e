"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): following the wishes more strictly than in training.

A guided piece takes a pair of neighboring rows with the same prompt and seed: the first with its wishes, the second
without. At each step, the logits of both are `without + guidance * (with - without)`, and both rows go on with the
token drawn from those. So a piece costs as much as two rows: up to twice the time, and twice the memory of the caches.
A token leaves early (see `step`) if both rows may: logits of different depths would not compare.

`GuidedDecoder` is a decoder whose rows are such pairs. Both engines decode pairs if "guidance" is among the options.
This module does not import JAX.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from music_ar.decoding.interface import AnyDecoder, AnyState, Options, repeat_options, repeat_rows, row_wishes
from music_ar.features.wish_options import Wishes


def guided_logits(logits_BxV: Float[Any, "B V"], options: Options) -> Float[Any, "B V"]:
    """Logits to draw from, the same in both rows of a pair; those given, if the rows are no pairs."""
    if "guidance" not in options:
        return logits_BxV
    xp = logits_BxV.__array_namespace__()
    with_wishes, without = logits_BxV[0::2], logits_BxV[1::2]
    guidance = xp.broadcast_to(options["guidance"], logits_BxV.shape[:1])[0::2, None]
    return xp.repeat(without + guidance * (with_wishes - without), 2, axis=0)


def with_partners(token_B: Int[Any, " B"], options: Options) -> Int[Any, " B"]:
    """The token of each row: in pairs, that of the row with the wishes."""
    return token_B.__array_namespace__().repeat(token_B[0::2], 2) if "guidance" in options else token_B


@dataclasses.dataclass(frozen=True, eq=False)
class GuidedState:
    """`AnyState` of pairs: row i stands for the rows 2 i and 2 i + 1 of `pairs`."""

    pairs: AnyState

    @property
    def done_B(self) -> Any:
        """See `AnyState.done_B`."""
        return self.pairs.done_B[0::2]

    @property
    def layers_run_B(self) -> Any:
        """See `AnyState.layers_run_B`: those of each of the two rows."""
        run_B = self.pairs.layers_run_B
        return None if run_B is None else run_B[0::2]

    def with_limit(self, limit_steps: int) -> "GuidedState":
        """See `AnyState.with_limit`."""
        return GuidedState(self.pairs.with_limit(limit_steps))

    def with_seeds(self, seeds: Sequence[int]) -> "GuidedState":
        """See `AnyState.with_seeds`."""
        return GuidedState(self.pairs.with_seeds(repeat_rows(seeds, 2)))

    def with_ended(self, ended_B: Bool[np.ndarray, " B"]) -> "GuidedState":
        """See `AnyState.with_ended`."""
        return GuidedState(self.pairs.with_ended(np.repeat(ended_B, 2)))

    def rows(self, rows: Sequence[int]) -> "GuidedState":
        """See `AnyState.rows`."""
        return GuidedState(self.pairs.rows([2 * row + of_pair for row in rows for of_pair in range(2)]))

    def replaced(self, row: int, newcomer: "GuidedState") -> "GuidedState":
        """See `AnyState.replaced`."""
        pairs = self.pairs
        for of_pair in range(2):
            pairs = pairs.replaced(2 * row + of_pair, newcomer.pairs.rows([of_pair]))
        return GuidedState(pairs)


class GuidedDecoder:
    """Decodes pieces with guidance, each as a pair of rows of another decoder.

    Options must have "guidance", a scalar or one number per piece.

    Args:
        decoder: the model.
    """

    def __init__(self, decoder: AnyDecoder):
        self._decoder = decoder
        self.config, self.backend = decoder.config, decoder.backend

    def start(
        self,
        prompts: Sequence[Integer[np.ndarray, " _P"]],
        *,
        seeds: Sequence[int],
        wishes: Sequence[Wishes] | None = None,
        **options: Any,
    ) -> GuidedState:
        """See `AnyDecoder.start`."""
        of_pairs = [each for row in row_wishes(wishes, len(prompts)) for each in (row, Wishes())]
        pairs = self._decoder.start(repeat_rows(prompts, 2), seeds=repeat_rows(seeds, 2), wishes=of_pairs, **options)
        return GuidedState(pairs)

    def decode(self, state: GuidedState, options: Options, *, length: int) -> tuple[GuidedState, Any]:
        """See `AnyDecoder.decode`."""
        return self.decode_scored(state, options, length=length)[:2]

    def decode_scored(self, state: GuidedState, options: Options, *, length: int) -> tuple[GuidedState, Any, Any]:
        """See `AnyDecoder.decode_scored`; the NLL is that of the model with the wishes, without guidance."""
        of_pairs = repeat_options(options, 2)
        pairs, tokens, nats = self._decoder.decode_scored(state.pairs, of_pairs, length=length)
        return GuidedState(pairs), tokens[0::2], nats[0::2]

    def batch_rows(self, latents: int) -> int:
        """See `AnyDecoder.batch_rows`: half of the decoder's."""
        return max(1, self._decoder.batch_rows(latents) // 2)
