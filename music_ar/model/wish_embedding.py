"""The vectors of a model's wishes; see `music_ar.features.wishes`."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from music_ar.features.wishes import WishTable


class WishEmbedding(nnx.Module):
    """The sum of the vectors of the wishes that are given; zero in a new model.

    Args:
        table: the wishes.
        width: D.
    """

    def __init__(self, table: WishTable, width: int):
        self.table = table
        self.kernel = nnx.Param(jnp.zeros((table.rows, width)))

    def __call__(self, ids_BxW: Int[Array, "B W"]) -> Float[Array, "B D"]:
        """What is added to the embedding of every token of each row."""
        return self.table.hot(ids_BxW) @ self.kernel[...]
