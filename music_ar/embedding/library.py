"""`Library`: an encoder and the index that it made, ready to be searched."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from music_ar.embedding.index import PassageIndex
from music_ar.embedding.search import Match, nearest
from music_ar.midi.performance import Performance
from music_ar.model.weights import PASSAGES, SHIPPED_FOLDERS, CheckpointError, folder_of

if TYPE_CHECKING:
    from music_ar.embedding.embedder import PieceEmbedder

DEFAULT_ENCODER = "maestro-encoder"
"""The encoder that ships with the project, if one does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Library:
    """An encoder and an index of music.

    Attributes:
        encoder: embeds passages.
        index: has the embeddings of many.
    """

    encoder: "PieceEmbedder"
    index: PassageIndex

    @classmethod
    def open(
        cls, encoder: str | os.PathLike[str] | None = None, index: str | os.PathLike[str] | None = None
    ) -> "Library":
        """Load an encoder and an index, which it must have made.

        Args:
            encoder: as `PieceEmbedder.from_pretrained` takes it; default: the one that ships with the project.
            index: the file of the index; default: the one in the folder of the encoder.

        Raises:
            CheckpointError: there is no such encoder, or it is damaged.
            PassageIndexError: there is no such index, it is damaged, or another encoder made it.
        """
        loaded = load_encoder_or_shipped(encoder)
        path = index_beside(encoder) if index is None else Path(index)
        found = PassageIndex.load(path)
        found.check_encoder(loaded.digest, path)
        return cls(encoder=loaded, index=found)

    def nearest(self, piece: Performance, count: int = 5) -> list[Match]:
        """Find the pieces that have the passages most like any passage of a piece; see `search.nearest`."""
        return nearest(self.index, self.encoder, piece, count)


def shipped_encoder() -> str | None:
    """Return the name of the encoder that ships with the project; None if none does."""
    ships = any((folder / DEFAULT_ENCODER).is_dir() for folder in SHIPPED_FOLDERS)
    return DEFAULT_ENCODER if ships else None


def shipped_library() -> bool:
    """Whether an encoder ships with the project, and an index with it."""
    return any((folder / DEFAULT_ENCODER / PASSAGES).is_file() for folder in SHIPPED_FOLDERS)


def load_encoder_or_shipped(encoder: str | os.PathLike[str] | None) -> "PieceEmbedder":
    """Load an encoder; default: the one that ships with the project.

    Raises:
        CheckpointError: there is no such encoder, or it is damaged.
    """
    from music_ar.embedding.embedder import PieceEmbedder  # with JAX, which most commands do without

    return PieceEmbedder.from_pretrained(_named(encoder))


def index_beside(encoder: str | os.PathLike[str] | None) -> Path:
    """Return the path of the index in the folder of an encoder, whether or not it is there.

    Raises:
        CheckpointError: there is no such encoder.
    """
    return folder_of(_named(encoder)) / PASSAGES


def _named(encoder: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    chosen = shipped_encoder() if encoder is None else encoder
    if chosen is None:
        raise CheckpointError("no encoder ships with this version: name one with --encoder")
    return chosen
