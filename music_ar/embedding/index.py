"""`PassageIndex`: the embeddings of all passages of many pieces, in one file.

The file is safetensors: `vectors` int8 [passages, size], `piece` uint16 or uint32 [passages], `span_s` float32
[passages, 2], `usual` float32 [3]; JSON in the metadata names the encoder, the data and the pieces. MAESTRO's training
split has 38 thousand passages, so it takes 4.0 MB with embeddings of 96 numbers.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float32, Int8, UInt

from music_ar.embedding.passages import PassageGrid
from music_ar.files import parse_json, read_file, write_atomically
from music_ar.midi.performance import Performance
from music_ar.ranges import shown

FORMAT = "music-ar passages 1"
_ABOUT = "index"
_BATCH = 512
_MAX_BYTES = 2**30
_SAMPLED = 500
_RANKS = (5, 50, 95)


class PassageIndexError(ValueError):
    """An index that cannot be used; the message names the file, what was expected and what to do."""


@runtime_checkable
class Embeds(Protocol):
    """What an index needs of an encoder.

    Attributes:
        size: numbers in an embedding.
        digest: SHA-256 of the encoder, in hexadecimal.
    """

    @property
    def size(self) -> int: ...  # noqa: D102

    @property
    def digest(self) -> str: ...  # noqa: D102

    def embed(self, pieces: Sequence[Performance]) -> Float32[np.ndarray, "n e"]:
        """Embed performances as vectors of length 1."""
        ...


@dataclass(frozen=True, kw_only=True)
class IndexedPiece:
    """A piece of an index.

    Attributes:
        name: of its file, in its data set.
        title: of the composition; the file's name if it is not known.
        composer: None if it is not known.
    """

    name: str
    title: str
    composer: str | None = None

    def __str__(self) -> str:
        return f"{self.composer}: {self.title}" if self.composer else self.title


@dataclass(frozen=True, kw_only=True, eq=False)
class PassageIndex:
    """The embeddings of the passages of many pieces.

    Attributes:
        vectors: the embeddings; each is rounded to 127 steps of its largest number, so only their directions count.
        piece: number of the piece of each passage, rising.
        span_s: beginning and end of each passage, in seconds of its piece.
        pieces: the pieces.
        passages: how pieces were cut, and how a query has to be.
        usual: similarity between a passage and the nearest one of another piece: 5th, 50th and 95th percentile.
        encoder: digest of the encoder.
        data: digest of the split that the pieces come from.
        split: its name.
    """

    vectors: Int8[np.ndarray, "p e"]
    piece: UInt[np.ndarray, " p"]
    span_s: Float32[np.ndarray, "p 2"]
    pieces: tuple[IndexedPiece, ...]
    passages: PassageGrid
    usual: Float32[np.ndarray, " 3"]
    encoder: str
    data: str
    split: str

    @classmethod
    def build(
        cls,
        encoder: Embeds,
        pieces: Iterable[tuple[IndexedPiece, Performance]],
        *,
        data: str,
        split: str,
        passages: PassageGrid | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> "PassageIndex":
        """Embed the passages of pieces.

        Args:
            encoder: makes the embeddings.
            pieces: the pieces, with their names.
            data: digest of the split that they come from.
            split: its name.
            passages: how to cut them.
            on_progress: called with the number of pieces that are done.

        Raises:
            PassageIndexError: no piece has a passage with enough notes.
        """
        cut = passages or PassageGrid()
        known: list[IndexedPiece] = []
        spans: list[np.ndarray] = []
        waiting: list[Performance] = []  # passages of many pieces fill a batch
        vectors = [np.zeros((0, encoder.size), np.int8)]
        for record, piece in pieces:
            known.append(record)
            spans.append(cut.spans(piece))
            waiting += cut.cut(piece)
            if len(waiting) >= _BATCH:
                vectors.append(rounded(embed_all(encoder, waiting)))
                waiting = []
            if on_progress is not None:
                on_progress(len(known))
        vectors.append(rounded(embed_all(encoder, waiting)))
        stored = np.concatenate(vectors)
        if not len(stored):
            raise PassageIndexError(f"the {split} split has no passage with enough notes, so there is nothing to index")
        numbers = np.arange(len(known), dtype=np.uint16 if len(known) <= 2**16 else np.uint32)
        owner = np.repeat(numbers, [len(span_s) for span_s in spans])
        return cls(
            vectors=stored,
            piece=owner,
            span_s=np.concatenate(spans).astype(np.float32),
            pieces=tuple(known),
            passages=cut,
            usual=_usual_similarity(stored, owner),
            encoder=encoder.digest,
            data=data,
            split=split,
        )

    def __len__(self) -> int:
        return len(self.vectors)

    def check_encoder(self, digest: str, where: object) -> None:
        """Refuse to search with another encoder than the one that made the index.

        Raises:
            PassageIndexError: it is another.
        """
        if digest != self.encoder:
            raise PassageIndexError(
                f"{where} was made with the encoder {self.encoder[:12]}…, and this is the encoder {digest[:12]}…: "
                "make the index again with this encoder, or name the other one"
            )

    def check_data(self, digest: str, where: object) -> None:
        """Refuse other data than that from which the index was made.

        Raises:
            PassageIndexError: they are other data.
        """
        if digest != self.data:
            raise PassageIndexError(
                f"{where} was made from other data (the {self.split} split {self.data[:12]}…, and this one is "
                f"{digest[:12]}…): make the index again from these data, or name the other ones"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index atomically.

        Raises:
            OSError: it cannot be written.
        """
        about = {
            "format": FORMAT,
            "encoder": self.encoder,
            "data": self.data,
            "split": self.split,
            "passages": dataclasses.asdict(self.passages),
            "pieces": [[piece.name, piece.title, piece.composer] for piece in self.pieces],
        }
        tensors = {"vectors": self.vectors, "piece": self.piece, "span_s": self.span_s, "usual": self.usual}
        # One text, because safetensors writes several in any order, and the same index is to be the same file.
        write_atomically(Path(path), safetensors.numpy.save(tensors, {_ABOUT: json.dumps(about)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PassageIndex":
        """Read and check an index.

        Raises:
            PassageIndexError: the file is missing, is not an index, or is damaged.
        """
        try:
            data = read_file(path, max_bytes=_MAX_BYTES)
        except FileNotFoundError as error:
            raise PassageIndexError(
                f"{path}: no such file. Make the index first: `music-ar similar --build`"
            ) from error
        except OSError as error:
            raise PassageIndexError(f"{path}: cannot be read ({error.strerror})") from error
        try:
            tensors, about = safetensors.numpy.load(data), _about(data)
        # KeyError: a type that NumPy does not have; the others: no safetensors, or shapes that cannot be.
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError, OverflowError) as error:
            raise PassageIndexError(f"{path}: expected an index of passages, found something else ({error})") from error
        if about.get("format") != FORMAT:
            raise PassageIndexError(
                f'{path}: expected an index of the format "{FORMAT}", found {shown(about.get("format"))}. '
                "Make it again with this version: `music-ar similar --build`"
            )
        try:
            return _index_of(tensors, about)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise PassageIndexError(f"{path}: damaged or edited ({error}). Make the index again") from error


def embed_all(encoder: Embeds, passages: Sequence[Performance]) -> Float32[np.ndarray, "n e"]:
    """Embed any number of passages, a batch at a time."""
    batches = [encoder.embed(passages[at : at + _BATCH]) for at in range(0, len(passages), _BATCH)]
    return np.concatenate([np.zeros((0, encoder.size), np.float32), *batches])


def rounded(vectors: Float32[np.ndarray, "n e"]) -> Int8[np.ndarray, "n e"]:
    """Round each vector to 127 steps of its largest number. Directions move by less than half a degree."""
    largest = np.abs(vectors).max(axis=1, keepdims=True, initial=1e-12)
    return np.round(vectors * (127 / largest)).astype(np.int8)


def directions(vectors: Int8[np.ndarray, "n e"]) -> Float32[np.ndarray, "n e"]:
    """Rounded vectors as vectors of length 1."""
    exact = vectors.astype(np.float32)
    return exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-12)


def _usual_similarity(vectors: Int8[np.ndarray, "p e"], piece: UInt[np.ndarray, " p"]) -> Float32[np.ndarray, " 3"]:
    """Percentiles of the similarity between a passage and the nearest one of another piece; zeros for one piece."""
    if len(vectors) == 0 or piece[0] == piece[-1]:
        return np.zeros(3, np.float32)
    sampled = np.unique(np.linspace(0, len(vectors) - 1, _SAMPLED).astype(int))
    each = directions(vectors)
    similarity = each[sampled] @ each.T
    similarity[piece[sampled][:, None] == piece] = -1
    return np.percentile(similarity.max(axis=1), _RANKS).astype(np.float32)


def _about(data: bytes) -> dict[str, Any]:
    """What an index says about itself: JSON in the header of the safetensors file, after eight bytes with its length.

    Raises:
        ValueError: it is another safetensors file.
    """
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = parse_json(header.get("__metadata__", {}).get(_ABOUT, "null"))
    if not isinstance(about, dict):
        raise ValueError("a safetensors file of another kind")
    return about


def _index_of(tensors: dict[str, np.ndarray], about: dict[str, Any]) -> PassageIndex:
    pieces = tuple(
        IndexedPiece(name=str(name), title=str(title), composer=composer) for name, title, composer in about["pieces"]
    )
    vectors, piece, span_s, usual = (tensors[name] for name in ("vectors", "piece", "span_s", "usual"))
    count = len(vectors)
    if vectors.dtype != np.int8 or vectors.ndim != 2 or not count:
        raise ValueError(f"vectors are {vectors.dtype} {vectors.shape}")
    if piece.dtype not in (np.uint16, np.uint32) or piece.shape != (count,) or piece.max() >= len(pieces):
        raise ValueError("passages belong to pieces that it does not name")
    if (np.diff(piece.astype(np.int64)) < 0).any():
        raise ValueError("its passages are not in the order of the pieces")
    if span_s.dtype != np.float32 or span_s.shape != (count, 2) or not np.isfinite(span_s).all():
        raise ValueError(f"the places of its passages are {span_s.dtype} {span_s.shape}")
    if usual.dtype != np.float32 or usual.shape != (len(_RANKS),) or not np.isfinite(usual).all():
        raise ValueError("it does not say how alike pieces usually are")
    return PassageIndex(
        vectors=vectors,
        piece=piece,
        span_s=span_s,
        pieces=pieces,
        passages=PassageGrid(**about["passages"]),
        usual=usual,
        encoder=str(about["encoder"]),
        data=str(about["data"]),
        split=str(about["split"]),
    )
