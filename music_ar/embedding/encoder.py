"""`PieceEncoder`: a Perceiver IO that reads the notes of a whole piece or passage.

Its latents answer two kinds of queries: one for the embedding of the piece, and one at the time of each hidden note,
for its pitch, velocity and duration. Both are trained together (`music_ar.training.piece_encoding`).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from music_ar.embedding.config import ATTRIBUTES, PieceEncoderConfig
from music_ar.embedding.note_features import channels, note_features, places, span
from music_ar.model.attention import linear
from music_ar.model.config import Compute
from music_ar.model.perceiver_io import PerceiverIO


class PieceEncoder(nnx.Module):
    """A piece encoder; see the module.

    Args:
        config: the sizes.
        rngs: draws the initial weights.
        compute: how it computes.
    """

    def __init__(self, config: PieceEncoderConfig, *, rngs: nnx.Rngs, compute: Compute = Compute()):
        self.config, self.compute = config, compute
        self.notes = linear(
            channels(config.earlier, config.time_bands),
            config.channels,
            kernel_init=nnx.initializers.lecun_normal(),
            dtype=jnp.dtype(compute.dtype),
            rngs=rngs,
        )
        self.io = PerceiverIO(config.io, rngs=rngs, compute=compute)
        self.embedding_query = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (config.io.queries,)))

    def read(
        self, notes_BxMx4: Int[Array, "B M 4"], counts_B: Int[Array, " B"], dropout: nnx.Dropout | None = None
    ) -> Float[Array, "B N D"]:
        """Read pieces into latents.

        Args:
            notes_BxMx4: notes as `notes.notes_of` gives them, then anything.
            counts_B: number of notes of each piece, at least 1.
            dropout: of the blocks' outputs; default: none.
        """
        mask_BxM = jnp.arange(notes_BxMx4.shape[1])[None] < counts_B[:, None]
        features_BxMxC = note_features(notes_BxMx4, mask_BxM, self.config.earlier, self.config.time_bands)
        hidden_BxMxC = jnp.square(jax.nn.relu(self.notes(features_BxMxC)))
        return self.io.encode(hidden_BxMxC, mask_BxM, dropout)

    def embed(self, latents_BxNxD: Float[Array, "B N D"]) -> Float[Array, "B E"]:
        """Embeddings of unit length, float32."""
        query_Bx1xR = jnp.broadcast_to(self.embedding_query[...], (len(latents_BxNxD), 1, self.config.io.queries))
        embedding_BxE = self.io.decode(latents_BxNxD, query_Bx1xR)[:, 0, sum(ATTRIBUTES.values()) :]
        return embedding_BxE / jnp.maximum(jnp.linalg.norm(embedding_BxE, axis=-1, keepdims=True), 1e-6)

    def predict(
        self,
        latents_BxNxD: Float[Array, "B N D"],
        onset_BxQ: Int[Array, "B Q"],
        notes_BxMx4: Int[Array, "B M 4"],
        counts_B: Int[Array, " B"],
    ) -> dict[str, Array]:
        """Logits [B, Q, classes] of each of the `ATTRIBUTES` of the notes at these times.

        Args:
            latents_BxNxD: what was read.
            onset_BxQ: times in steps, on the timeline of the notes.
            notes_BxMx4: the notes that were read; only their first and last onset count.
            counts_B: number of them.
        """
        mask_BxM = jnp.arange(notes_BxMx4.shape[1])[None] < counts_B[:, None]
        queries_BxQxR = places(onset_BxQ, *span(notes_BxMx4, mask_BxM), self.config.time_bands)
        outputs_BxQxO = self.io.decode(latents_BxNxD, queries_BxQxR)
        logits, start = {}, 0
        for name, classes in ATTRIBUTES.items():
            logits[name] = outputs_BxQxO[..., start : start + classes]
            start += classes
        return logits
