"""The cost of early exits, fitted on held-out pieces: how many nats a token is expected to lose by leaving.

It is a Poisson regression of the Kullback-Leibler divergence between the predictions of all blocks and of the first
ones, on the normalized residual stream at the exit. If the full depth is right about how likely each token is, that
divergence is what leaving costs.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Integer

from music_ar.evaluation.calibration import newton_minimum
from music_ar.evaluation.windows import batch_windows, check_pieces, cut_windows
from music_ar.model.exits import ExitCosts
from music_ar.model.perceiver_ar import PerceiverAR

_MOST_TARGETS = 2**16  # more of them gain nothing
_BATCH_SIZE = 4  # windows per forward pass
_PRIOR = 10.0  # inverse variance of the weights


def fit_exit_costs(
    model: PerceiverAR, pieces: Sequence[Integer[np.ndarray, " _"]]
) -> tuple[PerceiverAR, dict[int, float]]:
    """Fit what leaving at each exit is expected to cost, so that decoding can tell easy tokens from hard ones.

    Args:
        model: a model with exits; it is not changed.
        pieces: token arrays that it was not trained on; windows from all of them are used.

    Returns:
        The model with its costs, and the mean cost of each exit on these pieces, in nats.

    Raises:
        ValueError: there are no pieces, one is shorter than a start and an end, or the model has no exits.
    """
    if not model.config.exits:
        raise ValueError("this model predicts only after all its layers; train it with exits")
    check_pieces(pieces, model.config)
    streams, costs = _measured(model, pieces)
    fitted = nnx.clone(model)
    kernel_DxE, bias_E = fitted.exit_costs.kernel, fitted.exit_costs.bias
    for number, (x_TxD, cost_T) in enumerate(zip(streams, costs, strict=True)):
        *weights, bias = _poisson_regression(x_TxD, cost_T)
        kernel_DxE[...] = kernel_DxE[...].at[:, number].set(jnp.asarray(weights, jnp.float32))
        bias_E[...] = bias_E[...].at[number].set(bias)
    return fitted, {depth: float(cost_T.mean()) for depth, cost_T in zip(model.config.exits, costs, strict=True)}


def without_exit_costs(model: PerceiverAR) -> PerceiverAR:
    """Return the model with the costs of a new one, so that no token leaves early."""
    unknown = nnx.clone(model)
    unknown.exit_costs = ExitCosts(model.config.width, len(model.config.exits))
    return unknown


def _measured(
    model: PerceiverAR, pieces: Sequence[np.ndarray]
) -> tuple[list[Float[np.ndarray, "T D"]], list[Float[np.ndarray, " T"]]]:
    """Return the normalized stream of some targets at each exit, and what leaving there costs each of them."""
    latents = model.config.latents
    windows = cut_windows(pieces, [len(piece) - 1 for piece in pieces], latents)
    count = min(len(windows), max(1, _MOST_TARGETS // latents))
    windows = [windows[index] for index in np.linspace(0, len(windows) - 1, count).astype(int)]
    batch_size = min(_BATCH_SIZE, len(windows))
    graph, params = nnx.split(model)
    found: list[list[np.ndarray]] = []
    for batch, tokens in batch_windows(pieces, windows, model.config.window, batch_size, model.config.pad):
        streams, costs = _leaving(graph, params, tokens, latents)
        targets_B = np.array([window.targets for window in batch] + [0] * (batch_size - len(batch)))
        counts_BxN = np.arange(latents)[None] >= latents - targets_B[:, None]
        found.append([np.asarray(array)[counts_BxN] for array in (*streams, *costs)])
    every = [np.concatenate(arrays) for arrays in zip(*found, strict=True)]
    return every[: len(model.config.exits)], every[len(model.config.exits) :]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _leaving(
    graph: nnx.GraphDef[PerceiverAR], params: nnx.State, tokens_BxM1: Array, N: int
) -> tuple[list[Float[Array, "B N D"]], list[Float[Array, "B N"]]]:
    """Return the normalized stream at each exit, and the divergence of the prediction there from that of all blocks."""
    model = nnx.merge(graph, params)
    found = model.predict(tokens_BxM1[:, :-1], depths=model.config.depths, latents=N)
    *early, full = (jax.nn.log_softmax(logits_BxNxV) for logits_BxNxV in found.depths_BxNxV)
    costs = [jnp.maximum((jnp.exp(full) * (full - logs_BxNxV)).sum(axis=-1), 0.0) for logs_BxNxV in early]
    return [model.final_norm(x_BxNxD).astype(jnp.float32) for x_BxNxD in found.streams_BxNxD[:-1]], costs


def _poisson_regression(x_TxD: Float[np.ndarray, "T D"], y_T: Float[np.ndarray, " T"]) -> Float[np.ndarray, " D1"]:
    """Return weights, and last a bias, so that exp(x @ weights + bias) is close to y; weights are shrunk to 0."""
    T, D = x_TxD.shape
    x_TxD1 = np.concatenate([x_TxD, np.ones((T, 1), np.float32)], axis=1)
    prior_D1 = np.append(np.full(D, _PRIOR), 0.0)

    def derivatives(w_D1: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        with np.errstate(over="ignore"):  # such a step is halved
            logs_T = x_TxD1 @ w_D1.astype(np.float32)
            mean_T = np.exp(logs_T)
        value = float((mean_T - y_T * logs_T).sum(dtype=np.float64) + (prior_D1 * w_D1**2).sum() / 2)
        gradient_D1 = x_TxD1.T @ (mean_T - y_T) + prior_D1 * w_D1
        return value, gradient_D1, (x_TxD1 * mean_T[:, None]).T @ x_TxD1 + np.diag(prior_D1)

    start = np.append(np.zeros(D), np.log(max(float(y_T.mean()), 1e-9)))
    return newton_minimum(derivatives, start, targets=T)
