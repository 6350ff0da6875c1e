"""Calibration of logits by token type."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Integer

from music_ar.evaluation.likelihood import _KIND_OF, KINDS, _batches, _check, _windows
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.training.losses import token_nats

# The fit of `calibrated` ends with the step that promises less than so many nats a token, at the latest after so many
# passes over the pieces; two or three are usual.
_CALIBRATION_GAIN, _CALIBRATION_PASSES = 1e-6, 32


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
