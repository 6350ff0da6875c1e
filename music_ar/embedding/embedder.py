"""`PieceEmbedder`: pieces in, vectors of unit length out."""

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int32

from music_ar.embedding.encoder import PieceEncoder
from music_ar.embedding.notes import EmbeddingError, notes_of
from music_ar.embedding.pretrained import encoder_bytes, load_encoder
from music_ar.midi.performance import Performance
from music_ar.model.config import Compute

_SHORTEST = 128  # notes that every row has room for
_NOTES_AT_ONCE = 2**14  # notes that a batch has room for, unless one piece has more


class PieceEmbedder:
    """Embeds whole pieces or passages. The more alike the music, the nearer; keys and tempi matter little.

    Args:
        encoder: a trained encoder.
        digest: identifies its weights; default: the SHA-256 of its checkpoint.
    """

    def __init__(self, encoder: PieceEncoder, *, digest: str | None = None):
        self._graph, self._params = nnx.split(encoder, nnx.Param)
        self._config = encoder.config
        self._digest = digest or hashlib.sha256(encoder_bytes(encoder)).hexdigest()

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, compute: Compute = Compute()) -> "PieceEmbedder":
        """Load a pretrained encoder.

        Args:
            source: name of an encoder that ships with the project, a folder, or the id of a Hugging Face hub
                repository ("owner/name").
            compute: how it computes.

        Raises:
            CheckpointError: there is no such encoder, a file is missing or damaged, or the folder holds something else.
        """
        encoder, digest = load_encoder(source, compute=compute)
        return cls(encoder, digest=digest)

    @property
    def size(self) -> int:
        """E, dimensions of an embedding."""
        return self._config.size

    @property
    def digest(self) -> str:
        """Identifies the weights: embeddings of different ones cannot be compared."""
        return self._digest

    def embed(self, pieces: Sequence[Performance]) -> Float32[np.ndarray, "n E"]:
        """Embed pieces; each row has unit length.

        Long pieces are read whole. The same pieces give the same embeddings, bit for bit, on the same device.

        Args:
            pieces: each with at least one note and at most `notes.MAX_NOTES`.

        Raises:
            EmbeddingError: a piece has no notes, or too many; the message says which.
        """
        return self.embed_notes([self._notes(number, piece, len(pieces)) for number, piece in enumerate(pieces, 1)])

    def embed_notes(self, tables: Sequence[Int32[np.ndarray, "_ 4"]]) -> Float32[np.ndarray, "n E"]:
        """Embed tables of notes, as `notes.notes_of` gives them; see `embed`."""
        embeddings = np.zeros((len(tables), self.size), np.float32)
        for rows, notes_BxMx4, counts_B in _batches(tables):
            embeddings[rows] = np.asarray(_embed(self._graph, self._params, notes_BxMx4, counts_B))
        return embeddings

    @staticmethod
    def _notes(number: int, piece: Performance, count: int) -> Int32[np.ndarray, "_ 4"]:
        try:
            return notes_of(piece)
        except EmbeddingError as error:
            raise error if count == 1 else EmbeddingError(f"piece {number} of {count}: {error}") from error


@functools.partial(jax.jit, static_argnums=0)
def _embed(graph: nnx.GraphDef[PieceEncoder], params: nnx.State, notes_BxMx4: Array, counts_B: Array) -> Array:
    encoder = nnx.merge(graph, params)
    return encoder.embed(encoder.read(notes_BxMx4, counts_B))


def _batches(tables: Sequence[np.ndarray]) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yield batches of tables of about equal length: which they are, the notes, padded, and their numbers.

    Lengths are powers of two, and of each there are batches of one size; what is left over comes one by one. So
    programs are few.
    """
    by_length: dict[int, list[int]] = {}
    for number, table in enumerate(tables):
        by_length.setdefault(max(_SHORTEST, 1 << (len(table) - 1).bit_length()), []).append(number)
    for length, members in sorted(by_length.items()):
        rows = max(1, _NOTES_AT_ONCE // length)
        full = len(members) - len(members) % rows
        batches = [members[first : first + rows] for first in range(0, full, rows)]
        for batch in batches + [[number] for number in members[full:]]:
            notes_BxMx4 = np.zeros((len(batch), length, 4), np.int32)
            for row, number in enumerate(batch):
                notes_BxMx4[row, : len(tables[number])] = tables[number]
            yield batch, notes_BxMx4, np.array([len(tables[number]) for number in batch], np.int32)
