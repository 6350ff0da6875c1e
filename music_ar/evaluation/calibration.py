"""Calibration of a model's logits on held-out pieces (Guo et al., arXiv 1706.04599)."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Integer

from music_ar.evaluation.likelihood import TOKEN_TYPES, TYPE_OF_TOKEN
from music_ar.evaluation.windows import batch_windows, check_pieces, cut_windows
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.training.losses import token_nll

_TOLERANCE = 1e-6  # a fit ends with the step whose expected gain is smaller, per target
_MAX_PASSES = 32  # over the pieces; two or three are usual
_BATCH_SIZE = 32  # windows per forward pass


def best_temperature(temperatures: Sequence[float], nll: Float[np.ndarray, " C"]) -> tuple[float, float]:
    """Return the temperature with the lowest NLL, and that NLL, from a parabola through the minimum and its neighbors.

    A calibrated model has 1; above 1, the model is overconfident.

    Args:
        temperatures: C >= 3 temperatures, rising.
        nll: negative log-likelihood at each.
    """
    middle = int(np.clip(np.argmin(nll), 1, len(nll) - 2))
    near = np.asarray(temperatures[middle - 1 : middle + 2])
    parabola = np.polynomial.Polynomial.fit(near, nll[middle - 1 : middle + 2], 2)
    candidates = np.clip([near[0], near[-1], *parabola.deriv().roots().real], near[0], near[-1])
    best = candidates[np.argmin(parabola(candidates))]
    return float(best), float(parabola(best))


def calibrate(
    model: PerceiverAR, pieces: Sequence[Integer[np.ndarray, " _"]]
) -> tuple[PerceiverAR, dict[str, dict[str, float]]]:
    """Fit a scale and an offset for the logits of each token type, so that the model predicts `pieces` best.

    A model that has begun to memorize its training pieces is overconfident on others, more so for some token types.
    A few numbers, fitted to held-out pieces, correct most of that (vector scaling). They are folded into the weights of
    the output head, so decoding needs no change.

    Args:
        model: the model; it is not changed.
        pieces: token arrays that it was not trained on. Each of a few passes over them takes as long as `score` with a
            stride of the model's latents.

    Returns:
        The calibrated model, and the "scale" and "offset" of each of `TOKEN_TYPES`. Equal scales with offsets of 0
        would amount to a single temperature.

    Raises:
        ValueError: there are no pieces, one is shorter than a start and an end, or the model is not one of music.
    """
    if not model.config.is_music:
        raise ValueError("calibration scales token types of music; this model has a vocabulary of its own")
    check_pieces(pieces, model.config)
    targets = sum(len(piece) - 1 for piece in pieces)
    fit_2xK = newton_minimum(
        lambda fit_2xK: _nll_derivatives(model, pieces, fit_2xK),
        np.stack([np.ones(len(TOKEN_TYPES)), np.zeros(len(TOKEN_TYPES))]),
        targets=targets,
    )
    scales, offsets = fit_2xK.tolist()
    return _with_calibrated_head(model, fit_2xK), {
        name: {"scale": scale, "offset": offset}
        for name, scale, offset in zip(TOKEN_TYPES, scales, offsets, strict=True)
    }


def _with_calibrated_head(model: PerceiverAR, fit_2xK: np.ndarray) -> PerceiverAR:
    """Return a copy of the model whose logits are scaled and offset."""
    scale_V, offset_V = jnp.asarray(fit_2xK[:, TYPE_OF_TOKEN[: model.config.vocabulary_size]], np.float32)
    calibrated = nnx.clone(model)
    kernel_DxV, bias_V = calibrated.head.kernel, calibrated.head.bias
    assert bias_V is not None
    kernel_DxV[...] = kernel_DxV[...] * scale_V[None]
    bias_V[...] = bias_V[...] * scale_V + offset_V
    return calibrated


def _nll_derivatives(
    model: PerceiverAR, pieces: Sequence[np.ndarray], fit_2xK: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the NLL of all pieces with a scale and an offset per token type, its gradient and its Hessian.

    A Gaussian prior of variance 1 about scales of 1 and offsets of 0 is added. It weighs less than a token, and settles
    what the pieces leave undetermined: types that do not occur in them, and a constant added to all offsets.
    """
    latents = model.config.latents
    windows = cut_windows(pieces, [len(piece) - 1 for piece in pieces], latents)
    batch_size = min(_BATCH_SIZE, len(windows))
    graph, params = nnx.split(model)
    found: list[tuple[Array, Array, Array]] = []
    for batch, tokens in batch_windows(pieces, windows, model.config.window, batch_size, model.config.pad):
        targets_B = np.array([window.targets for window in batch] + [0] * (batch_size - len(batch)))
        found.append(_window_derivatives(graph, params, tokens, targets_B, fit_2xK.astype(np.float32), latents))
    nll, gradient_2xK, hessian_2xKx2xK = (
        np.concatenate(part).sum(axis=0, dtype=np.float64) for part in zip(*found, strict=True)
    )
    gradient_2xK[1] -= gradient_2xK[1].mean()  # the mean is 0 except for rounding
    away_2xK = fit_2xK - np.array([[1.0], [0.0]])
    return (
        float(nll + (away_2xK**2).sum() / 2),
        gradient_2xK + away_2xK,
        hessian_2xKx2xK + np.eye(fit_2xK.size).reshape(hessian_2xKx2xK.shape),
    )


@functools.partial(jax.jit, static_argnums=(0, 5))
def _window_derivatives(
    graph: nnx.GraphDef[PerceiverAR], params: nnx.State, tokens_BxM1: Array, targets_B: Array, fit_2xK: Array, N: int
) -> tuple[Float[Array, " B"], Float[Array, "B 2 K"], Float[Array, "B 2 K 2 K"]]:
    """Return the NLL of each window's last targets, its gradient and its Hessian.

    One window is processed at a time, since a Hessian takes memory.
    """
    logits_BxNxV = nnx.merge(graph, params)(tokens_BxM1[:, :-1], latents=N)
    counts_BxN = jnp.arange(N)[None] >= N - targets_B[:, None]

    def nll(fit_2xK: Array, row: tuple[Array, Array, Array]) -> Array:
        logits_NxV, targets_N, counts_N = row
        scale_V, offset_V = fit_2xK[:, TYPE_OF_TOKEN[: logits_NxV.shape[1]]]
        logits_NxV = logits_NxV * scale_V[None] + offset_V[None]
        return (token_nll(logits_NxV[None], targets_N[None])[0] * counts_N).sum()

    return jax.lax.map(
        lambda row: (nll(fit_2xK, row), jax.grad(nll)(fit_2xK, row), jax.hessian(nll)(fit_2xK, row)),
        (logits_BxNxV, tokens_BxM1[:, -N:], counts_BxN),
    )


def newton_minimum(
    function: Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]], start: np.ndarray, *, targets: int
) -> np.ndarray:
    """Return the minimum of a convex function by Newton's method; a step that does not descend is halved.

    Args:
        function: value, gradient and Hessian at a point.
        start: the first point.
        targets: over which the function is a sum. A step with an expected gain of less than 1e-6 of their number is the
            last.
    """
    point, least, step = start, math.inf, np.zeros_like(start)
    for _ in range(_MAX_PASSES):
        value, gradient, hessian = function(point + step)
        if not value <= least:
            step = step / 2
            continue
        point, least = point + step, value
        step = -np.linalg.solve(hessian.reshape(point.size, point.size), gradient.ravel()).reshape(point.shape)
        if -np.vdot(gradient, step) / 2 < _TOLERANCE * targets:
            return point + step
    return point
