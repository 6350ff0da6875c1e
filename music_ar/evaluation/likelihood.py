"""How well a model predicts real music: negative log-likelihood a token, a note and a second."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Integer

from music_ar.decoding import decoder as decoding
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.tokens import codec, vocabulary
from music_ar.training.losses import token_nats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Negative log-likelihood of pieces, each predicted by itself from its own start.

    Attributes:
        nats: in all.
        tokens: targets scored, each once: the events and the end of each piece.
        notes: note-on events among them.
        seconds: of music.
    """

    nats: float
    tokens: int
    notes: int
    seconds: float

    @classmethod
    def of(cls, nats: float, pieces: Sequence[Integer[np.ndarray, " _"]]) -> "Score":
        """The score of whole pieces, each from its first token on, that cost `nats` in all."""
        return cls(
            nats=nats,
            tokens=sum(len(piece) - 1 for piece in pieces),
            notes=sum(int((piece < vocabulary.NOTE_OFF).sum()) for piece in pieces),
            seconds=sum(float(codec.event_steps(piece)[-1]) for piece in pieces) / vocabulary.STEPS_PER_SECOND,
        )

    @property
    def nats_per_token(self) -> float:
        """The figure that papers quote; it depends on the vocabulary."""
        return self.nats / self.tokens

    def report(self) -> dict[str, float | int]:
        """The figures that `metrics.json` holds."""
        return {
            "nats_per_token": self.nats_per_token,
            "nats_per_note": self.nats / max(self.notes, 1),
            "nats_per_second": self.nats / max(self.seconds, 1e-9),
            "tokens": self.tokens,
            "notes": self.notes,
            "seconds": self.seconds,
        }


KINDS = ("note-on", "note-off", "time shift", "velocity", "end")
_KIND_OF = np.searchsorted(
    vocabulary.KIND_STARTS, np.arange(vocabulary.VOCABULARY_SIZE), side="right"
)  # "end": control tokens


# Tokens a call of the compiled loop of `score_decoding`; pieces are padded to a multiple of it.
_FORCED_LENGTH = 256


class _Window(NamedTuple):
    piece: int
    end: int  # index of the last target in its piece
    targets: int  # how many targets before and including it are scored


def score(
    model: PerceiverAR,
    pieces: Sequence[Integer[np.ndarray, " _"]],
    *,
    context: int | None = None,
    latents: int | None = None,
    stride: int = 512,
    batch_size: int = 32,
    on_progress: Callable[[float], None] | None = None,
) -> Score:
    """Scores every token of every piece once.

    Args:
        model, pieces, context, latents, stride, batch_size, on_progress: as in `score_tokens`.

    Raises:
        ValueError: as `score_tokens` does.
    """
    nats = score_tokens(
        model,
        pieces,
        context=context,
        latents=latents,
        stride=stride,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    return Score.of(math.fsum(float(each.sum(dtype=np.float64)) for each in nats), pieces)


def score_tokens(
    model: PerceiverAR,
    pieces: Sequence[Integer[np.ndarray, " _"]],
    *,
    context: int | None = None,
    latents: int | None = None,
    stride: int = 512,
    batch_size: int = 32,
    last: Sequence[int] | None = None,
    temperatures: Sequence[float] = (1.0,),
    on_progress: Callable[[float], None] | None = None,
) -> list[Float[np.ndarray, "C _"]]:
    """The nats that each token of each piece costs.

    A window of `context` inputs ends every `stride` targets; of its `latents` predictions the last `stride`
    count, so each is made with at least context - stride inputs (as far as the piece has them) and
    latents - stride latents before it. Of the inputs a model that recalls attends to the last `ModelConfig.context`.

    Args:
        model: the model.
        pieces: token arrays, each from `vocabulary.START` to `vocabulary.END`.
        context: M; default the model's `window`. Any number that memory allows.
        latents: N; default the model's. At least `stride`.
        stride: targets between windows.
        batch_size: windows at once.
        last: score only so many tokens of each piece, the last ones; default: all but its first.
        temperatures: C numbers above 0 that the logits are divided by, each in turn.
        on_progress: called with the share that is done.

    Returns:
        For each piece a row a temperature, a column a scored token.

    Raises:
        ValueError: sizes that do not fit together, no pieces, or one that is shorter than its start and end.
    """
    M = model.config.window if context is None else context
    most = model.config.read(M)
    N = min(model.config.latents, most) if latents is None else latents
    if not 1 <= stride <= N <= most:
        raise ValueError(
            "expected 1 <= stride <= latents <= inputs that attention reads, of a context of "
            f"{M}; got {stride}, {N}, {most}"
        )
    _check(pieces)
    counts = [len(piece) - 1 for piece in pieces] if last is None else last
    nats = [np.zeros((len(temperatures), count), np.float32) for count in counts]
    windows = list(_windows(pieces, counts, stride))
    batch_size = min(batch_size, len(windows))
    graph, params = nnx.split(model)
    temperatures_C = np.asarray(temperatures, np.float32)
    waiting: list[tuple[list[_Window], Array]] = []

    def take() -> None:
        batch, found_CxBxS = waiting.pop(0)
        for column, window in enumerate(batch):
            stop = window.end - (len(pieces[window.piece]) - 1) + counts[window.piece]
            nats[window.piece][:, stop - window.targets : stop] = found_CxBxS[:, column, stride - window.targets :]

    for done, (batch, tokens) in enumerate(_batches(pieces, windows, M, batch_size)):
        waiting.append((batch, _window_nats(graph, params, tokens, temperatures_C, N, stride)))
        if len(waiting) > 2:  # the device works on the next while we wait for this one
            take()
            if on_progress is not None:
                on_progress((done - 1) * batch_size / len(windows))
    while waiting:
        take()
    if on_progress is not None:
        on_progress(1.0)
    return nats


def score_kinds(
    nats: Sequence[Float[np.ndarray, " _"]], pieces: Sequence[Integer[np.ndarray, " _"]]
) -> dict[str, dict[str, float | int]]:
    """What each kind of event that occurs costs: its tokens, nats a token and share of all nats.

    Args:
        nats: of every token of each piece but its first, as `score_tokens` gives them for one temperature.
        pieces: token arrays.
    """
    targets = np.concatenate([piece[1:] for piece in pieces])
    cost = np.concatenate(nats).astype(np.float64)
    kind = _KIND_OF[targets]
    return {
        name: {
            "tokens": int(of_kind.sum()),
            "nats_per_token": float(cost[of_kind].mean()),
            "share": float(cost[of_kind].sum() / cost.sum()),
        }
        for number, name in enumerate(KINDS)
        if (of_kind := kind == number).any()
    }


def score_decoding(
    decoder: decoding.Decoder,
    pieces: Sequence[Integer[np.ndarray, " _"]],
    *,
    latents: int,
    mode: decoding.WindowMode = "exact",
    batch_size: int = 8,
) -> Score:
    """Scores pieces through the caches that generation uses, token by token from each piece's start.

    What `score` says of the model, this says of decoding it under a latent budget, with a context that rolls on.

    Args:
        decoder: the model, ready to decode.
        pieces: token arrays, each beginning with `vocabulary.START`; they may be cut short.
        latents: the latent budget.
        mode: how the windows of latents go on once they are full.
        batch_size: pieces at once.
    """
    nats = 0.0
    for first in range(0, len(pieces), batch_size):
        batch = pieces[first : first + batch_size]
        longest = -(-max(len(piece) - 1 for piece in batch) // _FORCED_LENGTH) * _FORCED_LENGTH
        targets_BxT = np.full((len(batch), longest), vocabulary.PAD, np.int32)
        for row, piece in zip(targets_BxT, batch, strict=True):
            row[: len(piece) - 1] = piece[1:]
        starts = [piece[:1].astype(np.int32) for piece in batch]
        state = decoder.start(starts, latents=latents, seeds=[0] * len(batch), limit_steps=2**30, mode=mode)
        for targets_BxF in np.split(targets_BxT, longest // _FORCED_LENGTH, axis=1):
            state, logits_BxFxV = decoder.force(state, targets_BxF)
            nats_BxF = np.asarray(token_nats(logits_BxFxV, jax.numpy.asarray(targets_BxF)))
            nats += float(nats_BxF[targets_BxF != vocabulary.PAD].sum())
    return Score.of(nats, pieces)


def _check(pieces: Sequence[np.ndarray]) -> None:
    if not pieces:
        raise ValueError("there are no pieces to score")
    if min(map(len, pieces)) < 2:
        raise ValueError("expected pieces of at least a start and an end token")


def _windows(pieces: Sequence[np.ndarray], counts: Sequence[int], stride: int) -> Iterator[_Window]:
    for index, (piece, count) in enumerate(zip(pieces, counts, strict=True)):
        last = len(piece) - 1
        for done in range(last - count, last, stride):
            end = min(done + stride, last)
            yield _Window(index, end, end - done)


def _batches(
    pieces: Sequence[np.ndarray], windows: list[_Window], M: int, batch_size: int
) -> Iterator[tuple[list[_Window], np.ndarray]]:
    """Windows and their tokens [batch_size, M + 1]; rows that are left over in the last batch repeat its first."""
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        filled = batch + batch[:1] * (batch_size - len(batch))  # one shape, one compilation
        yield batch, np.stack([_cut(pieces[window.piece], window.end, M) for window in filled])


def _cut(piece: np.ndarray, end: int, M: int) -> np.ndarray:
    """The M inputs before target `end` and the target, left-padded: [M + 1]."""
    cut = np.full(M + 1, vocabulary.PAD, np.int32)
    kept = piece[max(0, end - M) : end + 1]
    cut[M + 1 - len(kept) :] = kept
    return cut


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _window_nats(
    graph: nnx.GraphDef[PerceiverAR], params: nnx.State, tokens_BxM1: Array, temperatures_C: Array, N: int, S: int
) -> Float[Array, "C B S"]:
    """Nats of the last S targets of each window, at each temperature."""
    logits_BxSxV = nnx.merge(graph, params)(tokens_BxM1[:, :-1], latents=N)[:, -S:]
    return jax.lax.map(
        lambda temperature: token_nats(logits_BxSxV / temperature.reshape(1, 1, 1), tokens_BxM1[:, -S:]), temperatures_C
    )
