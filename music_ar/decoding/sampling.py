"""From logits to a token: steadiness (see `heard`), temperature, then top-k, top-p and min-p, in this order.

The filters cut each kind of event by itself: note-ons, note-offs, time shifts, velocities, and the control tokens. How
likely a kind is they leave alone. Cut together, rare kinds fall out where one is likely, and pieces come out slow and
sparse (docs/evaluation.md).

Dimension key: B rows, V vocabulary, C kinds, W the size of the largest.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from music_ar.tokens import vocabulary


class SamplingError(ValueError):
    """A sampling option out of its range."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token always, as steadiness leaves them.
        top_k: keep the k likeliest tokens of each kind of event; 0 keeps all.
        top_p: of those, keep the likeliest whose probabilities before them, of their kind, sum to less than p of
            that kind's (Holtzman et al., arXiv 1904.09751, who know no kinds); 1 keeps all.
        min_p: of those, keep tokens at least min_p times as likely as the likeliest of their kind (Nguyen et al.,
            arXiv 2407.01082); 0 keeps all.
        steadiness: how strongly a piece is held to the pitch classes and registers that it has had so far, and to usual
            loudness and, the longer it is, its own; 0 not at all. See `heard`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.97
    min_p: float = 0.0
    steadiness: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise SamplingError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise SamplingError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise SamplingError(f"min_p must lie in 0..1, got {self.min_p}")
        if not 0 <= self.steadiness <= 1:
            raise SamplingError(f"steadiness must lie in 0..1, got {self.steadiness}")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "SamplingOptions":
        """Those among other settings, all of which must be told."""
        return cls(**{field.name: settings[field.name] for field in dataclasses.fields(cls)})

    def filters(self) -> "Filters":
        """The options as arrays, so that changing them compiles nothing anew."""
        return Filters(*(option.reshape(()) for option in Filters.of_rows([self])))


class Filters(NamedTuple):
    """`SamplingOptions` as traced arrays: scalars for all rows, or one entry a row."""

    temperature: Float[Array, "*rows"]
    top_k: Int[Array, "*rows"]
    top_p: Float[Array, "*rows"]
    min_p: Float[Array, "*rows"]
    steadiness: Float[Array, "*rows"]

    @classmethod
    def of_rows(cls, options: Sequence[SamplingOptions]) -> "Filters":
        """One entry a row. Each array is put together in NumPy: it is one transfer, however many rows there are."""
        return cls(
            temperature=jnp.asarray(np.array([each.temperature for each in options], np.float32)),
            top_k=jnp.asarray(np.array([each.top_k or vocabulary.VOCABULARY_SIZE for each in options], np.int32)),
            top_p=jnp.asarray(np.array([each.top_p for each in options], np.float32)),
            min_p=jnp.asarray(np.array([each.min_p for each in options], np.float32)),
            steadiness=jnp.asarray(np.array([each.steadiness for each in options], np.float32)),
        )


def filter_logits(logits_BxV: Float[Array, "B V"], filters: Filters) -> Float[Array, "B V"]:
    """Logits divided by the temperature, -inf for tokens that are filtered out. A kind's likeliest always stays."""
    # [1, 1, 1], or [B, 1, 1]
    temperature, top_k, top_p, min_p, _ = (option.reshape(-1, 1, 1) for option in filters)
    # A temperature of 0 is the limit: the likeliest stays, everything else is infinitely far below it.
    kinds = jnp.split(logits_BxV, [start for start in vocabulary.KIND_STARTS if start < logits_BxV.shape[1]], axis=1)
    W = max(kind.shape[1] for kind in kinds)
    padded = [jnp.pad(kind, ((0, 0), (0, W - kind.shape[1])), constant_values=-jnp.inf) for kind in kinds]
    scaled_BxCxW = jnp.stack(padded, axis=1) / jnp.maximum(temperature, 1e-6)
    falling_BxCxW = jnp.sort(scaled_BxCxW, axis=-1, descending=True)
    highest_BxCx1 = jnp.maximum(falling_BxCxW[..., :1], jnp.finfo(jnp.float32).min)  # finite where all are ruled out
    in_top_k_BxCxW = jnp.arange(W)[None, None] < jnp.maximum(top_k, 1)
    mass_BxCxW = jnp.where(in_top_k_BxCxW, jnp.exp(falling_BxCxW - highest_BxCx1), 0)
    before_BxCxW = jnp.cumsum(mass_BxCxW, axis=-1) - mass_BxCxW
    # Float sums may pass the whole a little early: at top_p = 1 nothing is cut.
    in_top_p_BxCxW = (before_BxCxW < top_p * mass_BxCxW.sum(axis=-1, keepdims=True)) | (top_p >= 1)
    kept_BxCxW = in_top_k_BxCxW & in_top_p_BxCxW & (falling_BxCxW >= highest_BxCx1 + jnp.log(min_p))
    lowest_BxCx1 = jnp.min(jnp.where(kept_BxCxW, falling_BxCxW, jnp.inf), axis=-1, keepdims=True)
    cut_BxCxW = jnp.where(scaled_BxCxW >= jnp.minimum(lowest_BxCx1, highest_BxCx1), scaled_BxCxW, -jnp.inf)
    return jnp.concatenate([cut_BxCxW[:, index, : kind.shape[1]] for index, kind in enumerate(kinds)], axis=1)


def sample(keys_B: Array, logits_BxV: Float[Array, "B V"], filters: Filters) -> Int[Array, " B"]:
    """One token a row, each row drawn with its own key."""
    return jax.vmap(jax.random.categorical)(keys_B, filter_logits(logits_BxV, filters)).astype(jnp.int32)
