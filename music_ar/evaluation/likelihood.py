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
from music_ar.tokens import codec
from music_ar.training.trainer import token_nats


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
            notes=sum(int((piece < codec.NOTE_OFF).sum()) for piece in pieces),
            seconds=sum(float(codec.event_steps(piece)[-1]) for piece in pieces) / codec.STEPS_PER_SECOND,
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
_KIND_OF = np.searchsorted(codec.KIND_STARTS, np.arange(codec.VOCABULARY_SIZE), side="right")  # "end": control tokens

# The fit of `calibrated` ends with the step that promises less than so many nats a token, at the latest after so many
# passes over the pieces; two or three are usual.
_CALIBRATION_GAIN, _CALIBRATION_PASSES = 1e-6, 32

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
        pieces: token arrays, each from `codec.START` to `codec.END`.
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


def best_temperature(temperatures: Sequence[float], nats: Float[np.ndarray, " C"]) -> tuple[float, float]:
    """The temperature of least nats, and those: the vertex of the parabola through the least figure and its neighbours.

    1 is what a calibrated model has; above it, the model is too sure of itself (Guo et al., arXiv 1706.04599, 4.2).

    Args:
        temperatures: C >= 3 of them, rising.
        nats: at each.
    """
    middle = int(np.clip(np.argmin(nats), 1, len(nats) - 2))
    near = np.asarray(temperatures[middle - 1 : middle + 2])
    parabola = np.polynomial.Polynomial.fit(near, nats[middle - 1 : middle + 2], 2)
    candidates = np.clip([near[0], near[-1], *parabola.deriv().roots().real], near[0], near[-1])
    best = candidates[np.argmin(parabola(candidates))]
    return float(best), float(parabola(best))


def calibrated(
    model: PerceiverAR, pieces: Sequence[Integer[np.ndarray, " _"]]
) -> tuple[PerceiverAR, dict[str, dict[str, float]]]:
    """The model with a scale and an offset on the logits of each kind of event, by which it predicts `pieces` best.

    A model that has begun to learn its training pieces by heart is too sure of itself on others, of some kinds of event
    more than of others; few numbers, found on held-out pieces, take most of that back (Guo et al., arXiv 1706.04599).
    The head's weights take them up, so that decoding knows nothing of them.

    Args:
        model: the model; it is not changed.
        pieces: token arrays that it was not trained on. Each pass over them takes as long as `score` with a stride of
            the model's latents.

    Returns:
        The better model, and the "scale" and the "offset" of each of `KINDS`; what one temperature would do is all
        scales alike and no offsets.

    Raises:
        ValueError: no pieces, or one that is shorter than its start and end.
    """
    _check(pieces)
    tokens = sum(len(piece) - 1 for piece in pieces)
    fit_2xK = _least(
        lambda fit_2xK: _calibration_nats(model, pieces, fit_2xK),
        np.stack([np.ones(len(KINDS)), np.zeros(len(KINDS))]),
        tolerance=_CALIBRATION_GAIN * tokens,
    )
    scale_V, offset_V = jax.numpy.asarray(fit_2xK[:, _KIND_OF], np.float32)
    better = nnx.clone(model)
    kernel_DxV, bias_V = better.head.kernel, better.head.bias
    assert bias_V is not None
    kernel_DxV[...] = kernel_DxV[...] * scale_V[None]
    bias_V[...] = bias_V[...] * scale_V + offset_V
    scales, offsets = fit_2xK.tolist()
    return better, {
        kind: {"scale": scale, "offset": offset} for kind, scale, offset in zip(KINDS, scales, offsets, strict=True)
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
        pieces: token arrays, each beginning with `codec.START`; they may be cut short.
        latents: the latent budget.
        mode: how the windows of latents go on once they are full.
        batch_size: pieces at once.
    """
    nats = 0.0
    for first in range(0, len(pieces), batch_size):
        batch = pieces[first : first + batch_size]
        longest = -(-max(len(piece) - 1 for piece in batch) // _FORCED_LENGTH) * _FORCED_LENGTH
        targets_BxT = np.full((len(batch), longest), codec.PAD, np.int32)
        for row, piece in zip(targets_BxT, batch, strict=True):
            row[: len(piece) - 1] = piece[1:]
        starts = [piece[:1].astype(np.int32) for piece in batch]
        state = decoder.start(starts, latents=latents, seeds=[0] * len(batch), limit_steps=2**30, mode=mode)
        for targets_BxF in np.split(targets_BxT, longest // _FORCED_LENGTH, axis=1):
            state, logits_BxFxV = decoder.force(state, targets_BxF)
            nats_BxF = np.asarray(token_nats(logits_BxFxV, jax.numpy.asarray(targets_BxF)))
            nats += float(nats_BxF[targets_BxF != codec.PAD].sum())
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
    cut = np.full(M + 1, codec.PAD, np.int32)
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


def _calibration_nats(
    model: PerceiverAR, pieces: Sequence[np.ndarray], fit_2xK: np.ndarray, batch_size: int = 32
) -> tuple[float, np.ndarray, np.ndarray]:
    """Nats of all pieces, with a scale and an offset of each kind; their gradient and Hessian.

    To them comes a Gaussian prior of variance 1 about scales of 1 and offsets of 0. It weighs less than a token, and
    settles what the pieces leave open: a kind that none of them holds, and what all offsets have in common.
    """
    N = model.config.latents
    windows = list(_windows(pieces, [len(piece) - 1 for piece in pieces], N))
    batch_size = min(batch_size, len(windows))
    graph, params = nnx.split(model)
    found: list[tuple[Array, Array, Array]] = []
    for batch, tokens in _batches(pieces, windows, model.config.window, batch_size):
        targets_B = np.array([window.targets for window in batch] + [0] * (batch_size - len(batch)))
        found.append(_window_calibration(graph, params, tokens, targets_B, fit_2xK.astype(np.float32), N))
    nats, gradient_2xK, hessian_2xKx2xK = (
        np.concatenate(part).sum(axis=0, dtype=np.float64) for part in zip(*found, strict=True)
    )
    gradient_2xK[1] -= gradient_2xK[1].mean()  # which is 0, but for rounding
    away_2xK = fit_2xK - np.array([[1.0], [0.0]])
    return (
        float(nats + (away_2xK**2).sum() / 2),
        gradient_2xK + away_2xK,
        hessian_2xKx2xK + np.eye(fit_2xK.size).reshape(hessian_2xKx2xK.shape),
    )


@functools.partial(jax.jit, static_argnums=(0, 5))
def _window_calibration(
    graph: nnx.GraphDef[PerceiverAR], params: nnx.State, tokens_BxM1: Array, targets_B: Array, fit_2xK: Array, N: int
) -> tuple[Float[Array, " B"], Float[Array, "B 2 K"], Float[Array, "B 2 K 2 K"]]:
    """Nats of each window's last targets, their gradient and Hessian; windows one by one, as a Hessian takes memory."""
    logits_BxNxV = nnx.merge(graph, params)(tokens_BxM1[:, :-1], latents=N)
    counts_BxN = jax.numpy.arange(N)[None] >= N - targets_B[:, None]

    def nats(fit_2xK: Array, row: tuple[Array, Array, Array]) -> Array:
        logits_NxV, targets_N, counts_N = row
        scale_V, offset_V = fit_2xK[:, _KIND_OF]
        logits_NxV = logits_NxV * scale_V[None] + offset_V[None]
        return (token_nats(logits_NxV[None], targets_N[None])[0] * counts_N).sum()

    return jax.lax.map(
        lambda row: (nats(fit_2xK, row), jax.grad(nats)(fit_2xK, row), jax.hessian(nats)(fit_2xK, row)),
        (logits_BxNxV, tokens_BxM1[:, -N:], counts_BxN),
    )


def _least(
    of: Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]], start: np.ndarray, *, tolerance: float
) -> np.ndarray:
    """Where a convex function is least, by Newton's method: a step that does not lead down is halved.

    Args:
        of: value, gradient and Hessian at a point.
        start: the first point.
        tolerance: a step that promises less is the last.
    """
    point, least, step = start, math.inf, np.zeros_like(start)
    for _ in range(_CALIBRATION_PASSES):
        value, gradient, hessian = of(point + step)
        if not value <= least:
            step = step / 2
            continue
        point, least = point + step, value
        step = -np.linalg.solve(hessian.reshape(point.size, point.size), gradient.ravel()).reshape(point.shape)
        if -np.vdot(gradient, step) / 2 < tolerance:
            return point + step
    return point
