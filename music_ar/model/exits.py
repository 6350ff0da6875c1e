"""`ExitCosts`: what leaving at an exit is expected to cost."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

_UNKNOWN = 20.0  # logarithm of a cost that no tolerance allows


class ExitCosts(nnx.Module):
    """The nats that a token is expected to lose at each exit, from the stream there: the exponential of a linear map.

    They get no gradient in training. Those of a new model are so high that no token leaves early;
    `music_ar.evaluation.exit_costs` fits them.

    Args:
        width: D.
        exits: number of exits.
    """

    def __init__(self, width: int, exits: int):
        self.kernel = nnx.Param(jnp.zeros((width, exits)))
        self.bias = nnx.Param(jnp.full(exits, _UNKNOWN))

    def __call__(self, x: Float[Array, "*B D"], exit_number: int) -> Float[Array, "*B"]:
        """The cost of leaving at one of the exits, counted from 0, given the normalized stream."""
        return jnp.exp(x.astype(jnp.float32) @ self.kernel[...][:, exit_number] + self.bias[...][exit_number])
