"""Cross-entropy, distillation and z-loss."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def token_nll(logits_BxNxV: Float[Array, "B N V"], targets_BxN: Int[Array, "B N"]) -> Float[Array, "B N"]:
    """Negative log-likelihood of each target, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxNxV, targets_BxN)


def token_loss(
    logits_BxNxV: Float[Array, "B N V"],
    targets_BxN: Int[Array, "B N"],
    weights_BxN: Float[Array, "B N"],
    *,
    z_loss: float,
    teacher_BxNxV: Float[Array, "B N V"] | None = None,
    distillation_weight: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the loss to minimize and the weighted mean cross-entropy, both in nats per token.

    The loss is the cross-entropy plus `z_loss` times the squared log-partition function (PaLM, arXiv 2204.02311, §5).
    Given the probabilities of a teacher, the cross-entropy with them replaces a fraction `distillation_weight` of the
    cross-entropy with the data.
    """
    total = jnp.maximum(weights_BxN.sum(), 1e-9)

    def mean(values_BxN: Array) -> Array:
        return jnp.sum(values_BxN * weights_BxN) / total

    cross_entropy = loss = mean(token_nll(logits_BxNxV, targets_BxN))
    if teacher_BxNxV is not None:
        distillation = mean(optax.softmax_cross_entropy(logits_BxNxV, teacher_BxNxV))
        loss = (1 - distillation_weight) * cross_entropy + distillation_weight * distillation
    return loss + z_loss * mean(jnp.square(jax.nn.logsumexp(logits_BxNxV, axis=-1))), cross_entropy
