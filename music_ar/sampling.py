"""From logits to a token: temperature, then top-k, top-p and min-p, in this order."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from music_ar.events import VOCABULARY_SIZE


class SamplingError(ValueError):
    """A sampling option out of its range."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token always.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: of those, keep the likeliest whose probabilities before them sum to less than p (Holtzman et al.,
            arXiv 1904.09751); 1 keeps all.
        min_p: of those, keep tokens at least min_p times as likely as the likeliest (Nguyen et al.,
            arXiv 2407.01082); 0 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise SamplingError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise SamplingError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise SamplingError(f"min_p must lie in 0..1, got {self.min_p}")

    def filters(self) -> "Filters":
        """The options as arrays, so that changing them compiles nothing anew."""
        return Filters(*(option.reshape(()) for option in Filters.of_rows([self])))


class Filters(NamedTuple):
    """`SamplingOptions` as traced arrays: scalars for all rows, or one entry a row."""

    temperature: Float[Array, "*rows"]
    top_k: Int[Array, "*rows"]
    top_p: Float[Array, "*rows"]
    min_p: Float[Array, "*rows"]

    @classmethod
    def of_rows(cls, options: Sequence[SamplingOptions]) -> "Filters":
        """One entry a row. Each array is put together in NumPy: it is one transfer, however many rows there are."""
        return cls(
            temperature=jnp.asarray(np.array([each.temperature for each in options], np.float32)),
            top_k=jnp.asarray(np.array([each.top_k or VOCABULARY_SIZE for each in options], np.int32)),
            top_p=jnp.asarray(np.array([each.top_p for each in options], np.float32)),
            min_p=jnp.asarray(np.array([each.min_p for each in options], np.float32)),
        )


def filter_logits(logits_BxV: Float[Array, "B V"], filters: Filters) -> Float[Array, "B V"]:
    """Logits divided by the temperature, with -inf for tokens that are filtered out. The likeliest always stays."""
    temperature, top_k, top_p, min_p = (option.reshape(-1, 1) for option in filters)  # [1, 1], or [B, 1]
    # A temperature of 0 is the limit: the likeliest stays, everything else is infinitely far below it.
    scaled_BxV = logits_BxV / jnp.maximum(temperature, 1e-6)
    B, V = logits_BxV.shape
    falling_BxV = jnp.sort(scaled_BxV, axis=-1, descending=True)
    last_Bx1 = jnp.broadcast_to(jnp.clip(top_k, 1, V) - 1, (B, 1))
    kth_Bx1 = jnp.take_along_axis(falling_BxV, last_Bx1, axis=1)
    falling_BxV = jnp.where(falling_BxV >= kth_Bx1, falling_BxV, -jnp.inf)
    chance_BxV = jax.nn.softmax(falling_BxV, axis=-1)
    before_BxV = jnp.cumsum(chance_BxV, axis=-1) - chance_BxV
    # Float sums may pass 1 a little early: at top_p = 1 nothing is cut.
    kept_BxV = (before_BxV < top_p) | (top_p >= 1)
    nucleus_Bx1 = jnp.min(jnp.where(kept_BxV, falling_BxV, jnp.inf), axis=-1, keepdims=True)
    near_Bx1 = falling_BxV[:, :1] + jnp.log(min_p)
    lowest_Bx1 = jnp.minimum(jnp.maximum(jnp.maximum(kth_Bx1, nucleus_Bx1), near_Bx1), falling_BxV[:, :1])
    return jnp.where(scaled_BxV >= lowest_Bx1, scaled_BxV, -jnp.inf)


def sample(keys_B: Array, logits_BxV: Float[Array, "B V"], filters: Filters) -> Int[Array, " B"]:
    """One token a row, each row drawn with its own key."""
    return jax.vmap(jax.random.categorical)(keys_B, filter_logits(logits_BxV, filters)).astype(jnp.int32)
