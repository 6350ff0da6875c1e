"""Whether a search finds an excerpt again that was transposed and re-timed.

Excerpts of the validation split, moved by -6 to +6 semitones and played at 0.8 to 1.25 times their speed, are searched
for among the passages of all pieces of the training and the validation split. Beside the embedding stand two
measures that nobody has to train: pitch classes, rotated to the best fit, and counts of interval n-grams.

Prints one line of JSON for each: the share of the excerpts whose piece comes first, or among the first ten, and the
same for any performance of the right composition.

    python benchmarks/retrieval.py data/maestro [--encoder runs/encoder/model]
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy import sparse

from data_pipeline.dataset import Pieces
from music_ar import Performance, decode
from music_ar.embedding.index import directions, embed_all, rounded
from music_ar.embedding.passages import PassageGrid
from music_ar.metrics.memorization import melody

N_GRAM = 3
_BUCKETS = 2**18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="prepared MAESTRO")
    parser.add_argument("--encoder", help="folder of an encoder; without it, only the two others are measured")
    parser.add_argument("--excerpts", type=int, default=500)
    parser.add_argument("--length", type=float, default=30.0, help="of excerpts and passages, in seconds")
    parser.add_argument("--hop", type=float, nargs="+", default=[15.0], help="from passage to passage, in seconds")
    parser.add_argument("--keep-time", action="store_true", help="transpose only")
    parser.add_argument("--max-pieces", type=int, help="of each split, for a quick look")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    splits = {split: Pieces.open(arguments.data, split) for split in ("validation", "train")}
    parts = {split: slice(arguments.max_pieces) for split in splits}
    music = [decode(tokens) for split, part in parts.items() for tokens in splits[split].tokens[part]]
    works = np.array(
        [record.composition for split, part in parts.items() for record in splits[split].records[part]], str
    )
    owners, queries = excerpts(music[: len(splits["validation"].tokens[parts["validation"]])], arguments)
    for hop_s in arguments.hop:
        cut = PassageGrid(length_s=arguments.length, hop_s=hop_s)
        for name, search in searches(arguments.encoder):
            began_s = time.monotonic()
            found = list(zip(search(music, queries, cut), owners, strict=True))
            ranks = np.array([rank_of(best, np.arange(len(best)) == owner) for best, owner in found])
            of_work = np.array([rank_of(best, works == works[owner]) for best, owner in found])
            print(
                json.dumps(
                    {
                        "benchmark": "retrieval",
                        "search": name,
                        "recall_at_1": float((ranks < 1).mean()),
                        "recall_at_10": float((ranks < 10).mean()),
                        "composition_at_1": float((of_work < 1).mean()),
                        "composition_at_10": float((of_work < 10).mean()),
                        "excerpts": len(ranks),
                        "pieces": len(music),
                        "passages": sum(len(cut.spans(piece)) for piece in music),
                        "length_s": cut.length_s,
                        "hop_s": cut.hop_s,
                        "re_timed": not arguments.keep_time,
                        "took_s": round(time.monotonic() - began_s, 1),
                        "machine": platform.node(),
                    }
                ),
                flush=True,
            )


Search = Callable[[Sequence[Performance], Sequence[Performance], PassageGrid], Iterator[np.ndarray]]
"""For each query, the similarity of each piece."""


def searches(encoder: str | None) -> Iterator[tuple[str, Search]]:
    """The searches to compare, by name."""
    yield "pitch classes, rotated", by_pitch_classes
    yield f"interval {N_GRAM}-grams", by_n_grams
    if encoder is not None:
        from music_ar.embedding import PieceEmbedder

        yield "embedding", by_embedding(PieceEmbedder.from_pretrained(encoder))


def excerpts(pieces: Sequence[Performance], arguments: argparse.Namespace) -> tuple[list[int], list[Performance]]:
    """Excerpts with the number of their piece, each transposed and re-timed at random."""
    random = np.random.default_rng(arguments.seed)
    cut, owners, queries = PassageGrid(length_s=arguments.length), [], []
    while len(queries) < arguments.excerpts:
        owner = int(random.integers(len(pieces)))
        piece = pieces[owner]
        begin_s = random.uniform(piece.onset_s[0], max(piece.onset_s[0] + 1e-3, piece.duration_s - cut.length_s))
        moved = changed(
            piece.crop(begin_s, begin_s + cut.length_s),
            semitones=int(random.integers(-6, 7)),
            speed=1.0 if arguments.keep_time else float(np.exp(random.uniform(np.log(0.8), np.log(1.25)))),
        )
        if len(cut.spans(moved)):
            owners.append(owner)
            queries.append(moved)
    return owners, queries


def changed(piece: Performance, *, semitones: int, speed: float) -> Performance:
    """A piece in another key and at another speed; notes that leave the keyboard come back an octave nearer."""
    pitch = piece.pitch + semitones
    pitch = pitch + 12 * (pitch < 21) - 12 * (pitch > 108)
    return Performance(
        onset_s=piece.onset_s / speed, offset_s=piece.offset_s / speed, pitch=pitch, velocity=piece.velocity
    )


def rank_of(best: np.ndarray, right: np.ndarray) -> int:
    """How many other pieces are at least as similar as the best of the right ones [pieces]."""
    return int((best[~right] >= best[right].max()).sum())


def best_of_pieces(similarity: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """The highest similarity of each piece, over its passages and those of the query [query, passages]."""
    best = np.full(owner[-1] + 1, -np.inf)
    np.maximum.at(best, owner, similarity.max(axis=0))
    return best


def owners_of(music: Sequence[Performance], cut: PassageGrid) -> np.ndarray:
    return np.repeat(np.arange(len(music)), [len(cut.spans(piece)) for piece in music])


def by_pitch_classes(
    music: Sequence[Performance], queries: Sequence[Performance], cut: PassageGrid
) -> Iterator[np.ndarray]:
    """Cosine of the counts of pitch classes, at the best of twelve rotations."""

    def counts(passage: Performance) -> np.ndarray:
        found = np.bincount(passage.pitch % 12, minlength=12).astype(np.float32)
        return found / np.linalg.norm(found)

    passages = np.stack([counts(passage) for piece in music for passage in cut.cut(piece)])
    owner = owners_of(music, cut)
    for query in queries:
        rotated = np.stack([np.roll(counts(each), by) for each in cut.cut(query) for by in range(12)])
        yield best_of_pieces(rotated @ passages.T, owner)


def by_n_grams(music: Sequence[Performance], queries: Sequence[Performance], cut: PassageGrid) -> Iterator[np.ndarray]:
    """Cosine of the counts of interval n-grams, each weighted by how few passages have it."""
    counts = n_gram_counts([passage for piece in music for passage in cut.cut(piece)])
    holders = np.maximum(np.bincount(counts.indices, minlength=_BUCKETS), 1)
    weights = np.log((counts.indptr.size - 1) / holders).astype(np.float32)
    passages, owner = weighted(counts, weights), owners_of(music, cut)
    columns = passages.T.tocsr()
    for query in queries:
        similarity = (weighted(n_gram_counts(list(cut.cut(query))), weights) @ columns).toarray()
        yield best_of_pieces(similarity, owner)


def n_gram_counts(passages: Sequence[Performance]) -> sparse.csr_array:
    """How often each passage has each n-gram of intervals, by a hash of the n-gram [passages, buckets]."""
    columns, rows = [], []
    for row, passage in enumerate(passages):
        intervals = np.diff(melody(passage)).astype(np.int64) + 127
        grams = np.lib.stride_tricks.sliding_window_view(intervals, N_GRAM) if len(intervals) >= N_GRAM else []
        codes = [int(code) % _BUCKETS for code in np.asarray(grams).reshape(-1, N_GRAM) @ (255 ** np.arange(N_GRAM))]
        columns += codes
        rows += [row] * len(codes)
    counts = sparse.csr_array((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(passages), _BUCKETS))
    counts.sum_duplicates()
    return counts


def weighted(counts: sparse.csr_array, weights: np.ndarray) -> sparse.csr_array:
    """Logarithms of counts times weights, each row of length 1."""
    found = counts.copy()
    found.data = np.log1p(found.data) * weights[found.indices]
    length = np.sqrt(np.asarray((found * found).sum(axis=1))).ravel()
    return sparse.csr_array(sparse.diags_array(1 / np.maximum(length, 1e-9)) @ found)


def by_embedding(encoder: Any) -> Search:
    """Cosine of embeddings, rounded as in an index."""

    def search(music: Sequence[Performance], queries: Sequence[Performance], cut: PassageGrid) -> Iterator[np.ndarray]:
        vectors = [rounded(embed_all(encoder, list(cut.cut(piece)))) for piece in music]
        passages, owner = directions(np.concatenate(vectors)), owners_of(music, cut)
        for query in queries:
            yield best_of_pieces(embed_all(encoder, list(cut.cut(query))) @ passages.T, owner)

    return search


if __name__ == "__main__":
    main()
