"""The vectors of a model's wishes; see `music_ar.features.wishes`."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from music_ar.features.wishes import WishTable, part_ends


class WishEmbedding(nnx.Module):
    """The sum of the vectors of the wishes that are given; zero in a new model.

    Args:
        table: the wishes.
        width: D.
    """

    def __init__(self, table: WishTable, width: int):
        self.table = table
        self.kernel = nnx.Param(jnp.zeros((table.rows, width)))

    def __call__(
        self, ids_BxPxW: Int[Array, "B P W"], latent_BxS: Int[Array, "B S"], latents: int
    ) -> Float[Array, "B S D"]:
        """What is added to the embeddings of some rows.

        Args:
            ids_BxPxW: ids of the wishes of P equal parts of the latents.
            latent_BxS: number of the latent of each row; negative before the first, where those of its part are in
                force.
            latents: number of latents.
        """
        P = ids_BxPxW.shape[1]
        part_BxS = jnp.searchsorted(jnp.asarray(part_ends(latents, P)[:-1]), latent_BxS, side="right")
        return jnp.einsum("bsp,bpd->bsd", jax.nn.one_hot(part_BxS, P), self.table.hot(ids_BxPxW) @ self.kernel[...])
