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
    highest_Bx1 = scaled_BxV.max(axis=-1, keepdims=True)
    mass_BxV = jnp.exp(scaled_BxV - highest_Bx1)
    rank_BxV, before_BxV = jax.lax.platform_dependent(scaled_BxV, mass_BxV, cpu=_above_by_product, default=_above)
    in_top_k_BxV = rank_BxV < top_k
    allowance_Bx1 = top_p * jnp.where(in_top_k_BxV, mass_BxV, 0).sum(axis=-1, keepdims=True)
    # Float sums may pass the whole a little early: at top_p = 1 nothing is cut.
    in_top_p_BxV = (before_BxV < allowance_Bx1) | (top_p >= 1)
    near_BxV = scaled_BxV >= highest_Bx1 + jnp.log(min_p)
    return jnp.where(in_top_k_BxV & in_top_p_BxV & near_BxV | (rank_BxV == 0), scaled_BxV, -jnp.inf)


def _above(scaled_BxV: Array, mass_BxV: Array) -> tuple[Float[Array, "B V"], Float[Array, "B V"]]:
    """How many tokens are likelier than each, and their mass.

    All pairs are compared: for some hundred tokens that takes less time than to sort them.
    """
    above_BxVxV = (scaled_BxV[:, None, :] > scaled_BxV[:, :, None]).astype(jnp.float32)
    pair = above_BxVxV, above_BxVxV * mass_BxV[:, None, :]
    zero = jnp.float32(0)
    # XLA would make two kernels of two sums.
    return jax.lax.reduce(pair, (zero, zero), lambda sums, pair: (sums[0] + pair[0], sums[1] + pair[1]), (2,))


def _above_by_product(scaled_BxV: Array, mass_BxV: Array) -> tuple[Float[Array, "B V"], Float[Array, "B V"]]:
    """The same as a matrix product, which XLA is faster at on a CPU."""
    above_BxVxV = (scaled_BxV[:, None, :] > scaled_BxV[:, :, None]).astype(jnp.float32)
    both_BxVx2 = jnp.stack([jnp.ones_like(mass_BxV), mass_BxV], axis=-1)
    sums_BxVx2 = above_BxVxV @ both_BxVx2
    return sums_BxVx2[..., 0], sums_BxVx2[..., 1]


def sample(keys_B: Array, logits_BxV: Float[Array, "B V"], filters: Filters) -> Int[Array, " B"]:
    """One token a row, each row drawn with its own key."""
    return jax.vmap(jax.random.categorical)(keys_B, filter_logits(logits_BxV, filters)).astype(jnp.int32)
