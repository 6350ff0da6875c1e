"""Probes of in-context copying: pieces that repeat themselves, and motifs planted in other music."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int64, Integer

from music_ar.evaluation.likelihood import ScoringConfig, score_tokens
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.tokens import codec, vocabulary

MATCH_PITCHES = 6
"""A note's context matches an earlier one if this many pitches before it are the same, in the same order."""


class Repeats(NamedTuple):
    """The notes of a piece, and where the context of each one occurred before.

    Attributes:
        token: index of each note-on in the piece.
        distance: tokens back to the note that followed the last matching context; 0 if there is none.
        copies: whether that note has the same pitch.
    """

    token: Int64[np.ndarray, " n"]
    distance: Int64[np.ndarray, " n"]
    copies: Bool[np.ndarray, " n"]


def find_repeats(piece: Integer[np.ndarray, " _"]) -> Repeats:
    """Find the last earlier occurrence of the `MATCH_PITCHES` pitches before each note, in the order of the tokens."""
    token = np.flatnonzero(piece < vocabulary.NOTE_OFF)
    pitch = piece[token].astype(np.int64)
    distance, copies = np.zeros(len(token), np.int64), np.zeros(len(token), bool)
    if len(token) > MATCH_PITCHES:
        contexts = np.lib.stride_tricks.sliding_window_view(pitch[:-1], MATCH_PITCHES)
        key = contexts @ (vocabulary.PITCHES ** np.arange(MATCH_PITCHES))
        order = np.argsort(key, kind="stable")
        same = key[order[1:]] == key[order[:-1]]
        later, earlier = order[1:][same] + MATCH_PITCHES, order[:-1][same] + MATCH_PITCHES
        distance[later] = token[later] - token[earlier]
        copies[later] = pitch[later] == pitch[earlier]
    return Repeats(token, distance, copies)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NaturalCopying:
    """Notes whose context last occurred `above` to `up_to` tokens ago.

    Attributes:
        above: least distance, exclusive; None for notes whose context never occurred before.
        up_to: greatest distance, inclusive; None for no limit.
        notes: number of these notes.
        share: fraction of all notes.
        copying: fraction of these notes with the pitch that followed the earlier context; None without notes.
        note_nll: context length -> NLL in nats per note-on; None without notes.
    """

    above: int | None
    up_to: int | None
    notes: int
    share: float
    copying: float | None
    note_nll: dict[int, float | None]

    def gain(self, short: int, long: int) -> float | None:
        """Return the nats per note that a context of `long` inputs saves over one of `short`."""
        less, more = self.note_nll[short], self.note_nll[long]
        return None if less is None or more is None else less - more


def natural_copying(
    pieces: Sequence[Integer[np.ndarray, " _"]], nll: Mapping[int, Sequence[Float[np.ndarray, " _"]]]
) -> list[NaturalCopying]:
    """Group the NLL of notes by how far back their context last occurred.

    A longer context should gain most on notes whose earlier context is within it but not within a shorter one.

    Args:
        pieces: token arrays.
        nll: context length -> NLL of every token of each piece but its first, as `score_tokens` returns it for one
            temperature; with the same latents for all.

    Returns:
        The notes whose context never occurred before, then a group for each range between two context lengths, nearest
        first.
    """
    repeats = [find_repeats(piece) for piece in pieces]
    distance = np.concatenate([of_piece.distance for of_piece in repeats])
    copies = np.concatenate([of_piece.copies for of_piece in repeats])
    note_nll = {
        context: np.concatenate([of_piece[found.token - 1] for of_piece, found in zip(of_pieces, repeats, strict=True)])
        for context, of_pieces in nll.items()
    }
    edges = sorted(nll)
    ranges: list[tuple[int | None, int | None]] = [(None, None), *zip([0, *edges], [*edges, None], strict=True)]
    groups = []
    for above, up_to in ranges:
        if above is None:
            chosen = distance == 0
        else:
            chosen = (distance > above) & (distance <= (np.inf if up_to is None else up_to))
        groups.append(
            NaturalCopying(
                above=above,
                up_to=up_to,
                notes=int(chosen.sum()),
                share=float(chosen.mean()),
                copying=_mean(copies[chosen]),
                note_nll={context: _mean(nats[chosen]) for context, nats in note_nll.items()},
            )
        )
    return groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlantedCopying:
    """A motif, `distance` tokens of other music, and the motif again; compared with the motif after other music only.

    Attributes:
        distance: tokens between the two occurrences.
        motifs: number of motifs tried.
        repeated: NLL of the second occurrence, in nats per token.
        new: NLL of the same tokens where the motif did not occur before, in nats per token.
    """

    distance: int
    motifs: int
    repeated: float
    new: float

    @property
    def gain(self) -> float:
        """Nats per token saved because the motif occurred before."""
        return self.new - self.repeated


class PlantedMotif(NamedTuple):
    """Two token arrays of about the same length, both ending with a motif of `targets` tokens.

    Attributes:
        repeated: the motif, other music, and the motif.
        new: other music, and the motif.
        targets: tokens of the motif.
    """

    repeated: Int[np.ndarray, " _"]
    new: Int[np.ndarray, " _"]
    targets: int


def plant_motifs(
    pieces: Sequence[Integer[np.ndarray, " _"]], *, distance: int, motif_tokens: int, count: int, seed: int = 0
) -> Iterator[PlantedMotif]:
    """Yield `count` probes, with the same motifs and the same other music for every distance.

    The motif is cut from the middle of a piece, the other music from other pieces. Notes that a cut would leave
    incomplete are dropped or ended, so lengths differ from the requested ones by a few tokens.

    Raises:
        ValueError: no piece is as long as two motifs, or the other pieces hold too little music.
    """
    long_enough = [number for number, piece in enumerate(pieces) if len(piece) >= 2 * motif_tokens]
    if not long_enough:
        raise ValueError(f"expected a piece of at least {2 * motif_tokens} tokens, twice the length of a motif")
    random = np.random.default_rng(seed)
    for _ in range(count):
        number = int(random.choice(long_enough))
        start = int(random.integers(1, len(pieces[number]) - motif_tokens))
        motif = _complete(pieces[number][start : start + motif_tokens])
        other = [pieces[index] for index in random.permutation(len(pieces)) if index != number]
        backwards = np.concatenate([np.zeros(0, np.int64), *(piece[::-1] for piece in other)])  # nearest first
        if len(backwards) < distance + motif_tokens:
            raise ValueError(
                f"expected {distance + motif_tokens} tokens of music outside the motif's piece, got {len(backwards)}"
            )
        between, longer = (_complete(backwards[:size][::-1]) for size in (distance, distance + motif_tokens))
        start_token = np.array([vocabulary.START], np.int32)
        yield PlantedMotif(
            repeated=np.concatenate([start_token, motif, between, motif]),
            new=np.concatenate([start_token, longer, motif]),
            targets=len(motif),
        )


def planted_copying(
    model: PerceiverAR,
    pieces: Sequence[Integer[np.ndarray, " _"]],
    *,
    distance: int,
    context: int,
    latents: int,
    motif_tokens: int = 256,
    count: int = 32,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: Callable[[float], None] | None = None,
) -> PlantedCopying:
    """Measure the NLL of a motif that occurred before, `distance` tokens of other music ago.

    Args:
        model: the model.
        pieces: token arrays to cut motifs and other music from.
        distance: in tokens; the context must hold it and two motifs, or the model cannot attend to the first one.
        context: M, inputs per window.
        latents: N; somewhat more than the tokens of a motif.
        motif_tokens: length of a motif; 256 tokens are about 63 notes.
        count: number of motifs.
        batch_size: windows per forward pass.
        seed: selects the motifs and the other music.
        on_progress: called with the fraction that is done.

    Raises:
        ValueError: as `plant_motifs` and `score_tokens`.
    """
    planted = list(plant_motifs(pieces, distance=distance, motif_tokens=motif_tokens, count=count, seed=seed))
    nll = score_tokens(
        model,
        [probe.repeated for probe in planted] + [probe.new for probe in planted],
        ScoringConfig(context=context, latents=latents, stride=latents, batch_size=batch_size),
        last=[probe.targets for probe in planted] * 2,
        on_progress=on_progress,
    )
    repeated, new = (float(np.concatenate(half, axis=1).mean(dtype=np.float64)) for half in (nll[:count], nll[count:]))
    return PlantedCopying(distance=distance, motifs=count, repeated=repeated, new=new)


def _complete(tokens: Integer[np.ndarray, " _"]) -> Int[np.ndarray, " _"]:
    """Return a passage without the loose ends of a cut: note-offs of earlier notes, unended notes, piece boundaries."""
    return codec.encode(codec.decode(tokens))


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean(dtype=np.float64)) if len(values) else None
