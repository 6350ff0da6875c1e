"""How well a model predicts what is in a gap, given what lies on both sides of it or on one.

The same middles are scored both times, and the model is told the length of the gap both times. So the difference is
what the music after the gap is worth.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32, Integer

from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.tokens import vocabulary
from music_ar.tokens.codec import event_steps
from music_ar.tokens.gaps import Parts, split
from music_ar.training.losses import token_nll


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiddleScore:
    """NLL of the middles of some gaps.

    Attributes:
        both: of each gap, in nats, given both sides.
        left: of each gap, given what comes before it alone.
        tokens: number of tokens of each middle that are scored.
    """

    both: Float[np.ndarray, " gaps"]
    left: Float[np.ndarray, " gaps"]
    tokens: Int32[np.ndarray, " gaps"]

    @property
    def gain(self) -> float:
        """What the music after the gaps is worth, in nats per token."""
        return float((self.left - self.both).sum() / self.tokens.sum())

    def nats_per_token(self) -> dict[str, float]:
        """Mean NLL of a token, given both sides and given the left one."""
        total = int(self.tokens.sum())
        return {"both": float(self.both.sum() / total), "left": float(self.left.sum() / total)}


def draw_gaps(pieces: Sequence[Integer[np.ndarray, " _"]], seconds: float, count: int, *, seed: int = 0) -> list[Parts]:
    """Gaps in random places of random pieces, at least a gap's length from either end.

    Args:
        pieces: token arrays, each from `vocabulary.START` to `vocabulary.END`.
        seconds: length of the gaps.
        count: number of gaps.
        seed: random seed of the places.

    Raises:
        ValueError: no piece is three times as long as the gap.
    """
    steps, rng = round(seconds * vocabulary.STEPS_PER_SECOND), np.random.default_rng(seed)
    long_enough = [piece for piece in pieces if event_steps(piece)[-1] >= 3 * steps]
    if not long_enough:
        raise ValueError(f"expected a piece of at least {3 * seconds:g} s, three times the gap; found none")
    gaps = []
    for _ in range(count):
        piece = long_enough[int(rng.integers(len(long_enough)))]
        begin = int(rng.integers(steps, event_steps(piece)[-1] - 2 * steps, endpoint=True))
        gaps.append(split(piece, begin, begin + steps))
    return gaps


def score_middles(model: PerceiverAR, gaps: Sequence[Parts], *, batch_size: int = 8) -> MiddleScore:
    """Score the middles of gaps, given both sides and given the left one.

    Of a middle that is longer than the model's latents, the beginning is scored. Parts that do not fit in the context
    are shortened at their far ends.

    Args:
        model: a model that can fill gaps.
        gaps: the gaps.
        batch_size: sequences per forward pass.

    Raises:
        ValueError: the model cannot fill gaps.
    """
    if not model.config.fills_gaps:
        raise ValueError("the model cannot fill gaps: it was not trained to")
    most = min(model.config.most_latents, model.config.context // 2)
    gaps = [gap._replace(middle=gap.middle[:most]) for gap in gaps]
    left = [gap._replace(after=gap.after[:0]) for gap in gaps]
    both_nll, left_nll = (_middle_nll(model, each, batch_size) for each in (gaps, left))
    counts = np.array([len(gap.middle) for gap in gaps], np.int32)
    return MiddleScore(both=both_nll, left=left_nll, tokens=counts)


def _middle_nll(model: PerceiverAR, gaps: Sequence[Parts], batch_size: int) -> Float[np.ndarray, " gaps"]:
    graph, params = nnx.split(model)
    M, N = model.config.context, model.config.most_latents
    found = []
    for first in range(0, len(gaps), batch_size):
        batch = [gaps[min(first + row, len(gaps) - 1)] for row in range(batch_size)]
        tokens_BxM1 = np.full((batch_size, M + 1), vocabulary.PAD, np.int32)
        for row, gap in zip(tokens_BxM1, batch, strict=True):
            fitting = gap.fitted(M + 1)
            assert fitting is not None  # a middle takes at most half of the context
            sequence = fitting.sequence()
            row[M + 1 - len(sequence) :] = sequence
        counts_B = np.array([len(gap.middle) for gap in batch])
        found.append(np.asarray(_last_nll(graph, params, tokens_BxM1, counts_B, N)))
    return np.concatenate(found)[: len(gaps)].astype(np.float64)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _last_nll(
    graph: nnx.GraphDef[PerceiverAR], params: nnx.State, tokens_BxM1: Array, counts_B: Array, N: int
) -> Float[Array, " B"]:
    """NLL of the last targets of each row, as many as `counts_B` says."""
    nll_BxN = token_nll(nnx.merge(graph, params)(tokens_BxM1[:, :-1], latents=N), tokens_BxM1[:, -N:])
    return (nll_BxN * (jnp.arange(N)[None] >= N - counts_B[:, None])).sum(axis=1)
