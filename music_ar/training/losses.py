"""Cross-entropy, distillation and z-loss."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def token_nats(logits_BxNxV: Float[Array, "B N V"], targets_BxN: Int[Array, "B N"]) -> Float[Array, "B N"]:
    """Cross-entropy of each target, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxNxV, targets_BxN)


def token_loss(
    logits_BxNxV: Float[Array, "B N V"],
    targets_BxN: Int[Array, "B N"],
    weights_BxN: Float[Array, "B N"],
    z_loss: float,
    *,
    taught_BxNxV: Float[Array, "B N V"] | None = None,
    distillation: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What is minimised, and the weighted mean cross-entropy, both in nats a token.

    The first adds the z-loss (PaLM, arXiv 2204.02311, §5) and, where probabilities are `taught`, takes the share
    `distillation` of the cross-entropy with them instead.
    """
    total = jnp.maximum(weights_BxN.sum(), 1e-9)

    def mean(values_BxN: Array) -> Array:
        return jnp.sum(values_BxN * weights_BxN) / total

    nats = loss = mean(token_nats(logits_BxNxV, targets_BxN))
    if taught_BxNxV is not None:
        loss = (1 - distillation) * nats + distillation * mean(optax.softmax_cross_entropy(logits_BxNxV, taught_BxNxV))
    return loss + z_loss * mean(jnp.square(jax.nn.logsumexp(logits_BxNxV, axis=-1))), nats
