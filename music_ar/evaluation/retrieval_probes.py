"""What a model recalls from far back: where pieces return to themselves, and themes planted in other music."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int64, Integer

from music_ar.evaluation.likelihood import score_tokens
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.tokens import codec, vocabulary

RECALL_PITCHES = 6
"""Pitches in a row that tell a place in a piece: those before a note, its own not included."""


class Returns(NamedTuple):
    """The notes of a piece, and where each one's place in the music occurred before.

    Attributes:
        token: index of each note-on in the piece.
        distance: how many tokens ago the same `RECALL_PITCHES` pitches in a row were last followed by a note; 0 where
            they never were.
        repeats: whether it was a note of the same pitch.
    """

    token: Int64[np.ndarray, " n"]
    distance: Int64[np.ndarray, " n"]
    repeats: np.ndarray


def find_returns(piece: Integer[np.ndarray, " _"]) -> Returns:
    """Looks up the last `RECALL_PITCHES` pitches before each note, in the order of the tokens, earlier in the piece."""
    token = np.flatnonzero(piece < vocabulary.NOTE_OFF)
    pitch = piece[token].astype(np.int64)
    distance, repeats = np.zeros(len(token), np.int64), np.zeros(len(token), bool)
    if len(token) > RECALL_PITCHES:
        places = np.lib.stride_tricks.sliding_window_view(pitch[:-1], RECALL_PITCHES)
        key = places @ (vocabulary.PITCHES ** np.arange(RECALL_PITCHES))
        order = np.argsort(key, kind="stable")
        same = key[order[1:]] == key[order[:-1]]
        later, earlier = order[1:][same] + RECALL_PITCHES, order[:-1][same] + RECALL_PITCHES
        distance[later] = token[later] - token[earlier]
        repeats[later] = pitch[later] == pitch[earlier]
    return Returns(token, distance, repeats)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
    """Notes whose place in the music last occurred `above` to `up_to` tokens ago.

    Attributes:
        above: of the distance, not included; None if their place never occurred before.
        up_to: of the distance, included; None is no limit.
        notes: how many.
        share: of all notes.
        repeating: share of them that have the pitch that followed there; None without notes.
        pitch_nats: context -> nats a note-on; None without notes.
    """

    above: int | None
    up_to: int | None
    notes: int
    share: float
    repeating: float | None
    pitch_nats: dict[int, float | None]

    def saved(self, short: int, long: int) -> float | None:
        """Nats a note that reading `long` inputs saves over reading `short`."""
        less, more = self.pitch_nats[short], self.pitch_nats[long]
        return None if less is None or more is None else less - more


def natural_recall(
    pieces: Sequence[Integer[np.ndarray, " _"]], nats: Mapping[int, Sequence[Float[np.ndarray, " _"]]]
) -> list[Recall]:
    """What notes cost by how far back their place in the music last occurred.

    A longer context should be worth most on the notes whose place lies in it and not in a shorter one.

    Args:
        pieces: token arrays.
        nats: context -> the nats of every token of each piece but its first, as `evaluation.score_tokens` gives them
            for one temperature; with the same latents for all contexts.

    Returns:
        The notes whose place never occurred before, then one entry from each context to the next, from the nearest on.
    """
    returns = [find_returns(piece) for piece in pieces]
    distance = np.concatenate([each.distance for each in returns])
    repeats = np.concatenate([each.repeats for each in returns])
    cost = {
        context: np.concatenate([of[found.token - 1] for of, found in zip(of_pieces, returns, strict=True)])
        for context, of_pieces in nats.items()
    }
    edges = sorted(nats)
    ranges: list[tuple[int | None, int | None]] = [(None, None), *zip([0, *edges], [*edges, None], strict=True)]
    rows = []
    for above, up_to in ranges:
        if above is None:
            chosen = distance == 0
        else:
            chosen = (distance > above) & (distance <= (np.inf if up_to is None else up_to))
        rows.append(
            Recall(
                above=above,
                up_to=up_to,
                notes=int(chosen.sum()),
                share=float(chosen.mean()),
                repeating=_mean(repeats[chosen]),
                pitch_nats={context: _mean(of[chosen]) for context, of in cost.items()},
            )
        )
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlantedRecall:
    """A theme, `distance` tokens of other music, and the theme again, against the same with more other music at first.

    Attributes:
        distance: tokens between the two hearings.
        themes: how many were tried.
        heard: nats a token of the second hearing.
        unheard: nats a token of the same tokens where they were not heard before.
    """

    distance: int
    themes: int
    heard: float
    unheard: float

    @property
    def saved(self) -> float:
        """Nats a token saved by having heard the theme."""
        return self.unheard - self.heard


class Planted(NamedTuple):
    """Two token arrays of about one length that end alike, with a theme of `targets` tokens, heard before or not."""

    heard: Int[np.ndarray, " _"]
    unheard: Int[np.ndarray, " _"]
    targets: int


def plant(
    pieces: Sequence[Integer[np.ndarray, " _"]], *, distance: int, theme_tokens: int, count: int, seed: int = 0
) -> Iterator[Planted]:
    """Builds `count` probes; the same themes and the same other music for every distance.

    The theme is cut from the middle of one piece, the other music from other pieces. Notes are completed where they
    are cut, so lengths differ from those asked for by a few tokens.

    Raises:
        ValueError: no piece is longer than two themes, or the other pieces hold too little music.
    """
    long_enough = [number for number, piece in enumerate(pieces) if len(piece) >= 2 * theme_tokens]
    if not long_enough:
        raise ValueError(f"no piece has the {2 * theme_tokens} tokens that a theme of {theme_tokens} is cut from")
    random = np.random.default_rng(seed)
    for _ in range(count):
        number = int(random.choice(long_enough))
        start = int(random.integers(1, len(pieces[number]) - theme_tokens))
        theme = _whole(pieces[number][start : start + theme_tokens])
        other = [pieces[each] for each in random.permutation(len(pieces)) if each != number]
        backwards = np.concatenate([np.zeros(0, np.int64), *(piece[::-1] for piece in other)])  # nearest first
        if len(backwards) < distance + theme_tokens:
            raise ValueError(
                f"{distance + theme_tokens} tokens of other music are wanted, and beside the theme's piece there are "
                f"{len(backwards)}"
            )
        between, longer = (_whole(backwards[:size][::-1]) for size in (distance, distance + theme_tokens))
        start_token = np.array([vocabulary.START], np.int32)
        yield Planted(
            heard=np.concatenate([start_token, theme, between, theme]),
            unheard=np.concatenate([start_token, longer, theme]),
            targets=len(theme),
        )


def planted_recall(
    model: PerceiverAR,
    pieces: Sequence[Integer[np.ndarray, " _"]],
    *,
    distance: int,
    context: int,
    latents: int,
    theme_tokens: int = 256,
    count: int = 32,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: Callable[[float], None] | None = None,
) -> PlantedRecall:
    """What a theme costs at its second hearing, `distance` tokens of other music after the first.

    Args:
        model: the model.
        pieces: token arrays to cut themes and other music from.
        distance: in tokens; the context must hold it and two themes, or the model cannot have heard the first one.
        context: M.
        latents: N; more than a theme by some tokens.
        theme_tokens: length of a theme; 256 tokens are about 63 notes.
        count: themes.
        batch_size: windows at once.
        seed: other themes, other music.
        on_progress: called with the share that is done.

    Raises:
        ValueError: as `plant` and `evaluation.score_tokens` do.
    """
    planted = list(plant(pieces, distance=distance, theme_tokens=theme_tokens, count=count, seed=seed))
    nats = score_tokens(
        model,
        [each.heard for each in planted] + [each.unheard for each in planted],
        context=context,
        latents=latents,
        stride=latents,
        batch_size=batch_size,
        last=[each.targets for each in planted] * 2,
        on_progress=on_progress,
    )
    heard, unheard = (
        float(np.concatenate(half, axis=1).mean(dtype=np.float64)) for half in (nats[:count], nats[count:])
    )
    return PlantedRecall(distance=distance, themes=count, heard=heard, unheard=unheard)


def _whole(tokens: Integer[np.ndarray, " _"]) -> Int[np.ndarray, " _"]:
    """A passage without what a cut leaves: note-offs of notes before it, notes without an end, boundaries of pieces."""
    return codec.encode(codec.decode(tokens))


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean(dtype=np.float64)) if len(values) else None
