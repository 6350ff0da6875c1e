"""Linear layers for decoding: other forms of a model's `nnx.Linear`s, put in their place."""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float

from music_ar.model import PerceiverAR


class TransposedLinear(nnx.Module):
    """A linear layer whose matrix is held as [out, in], in place of `nnx.Linear`. Not for training.

    XLA computes a product of one row as multiplications and a sum. On a GPU, with a matrix as [in, out], these are two
    kernels, and the products pass through memory; as [out, in] they are one (docs/decoding.md has figures).
    """

    def __init__(self, linear: nnx.Linear):
        self.kernel_OxI = nnx.Variable(linear.kernel[...].T)
        self.bias_O = None if linear.bias is None else nnx.Variable(linear.bias[...])
        self.dtype = linear.dtype

    def __call__(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """The layer's output, in the layer's type."""
        kernel_OxI = self.kernel_OxI[...].astype(self.dtype)
        y = jax.lax.dot_general(x.astype(self.dtype), kernel_OxI, (((x.ndim - 1,), (1,)), ((), ())))
        if self.bias_O is not None:
            y = y + self.bias_O[...].astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


def replace_linears(model: PerceiverAR, layer: Callable[[nnx.Linear], nnx.Module]) -> PerceiverAR:
    """A copy of a model with `layer(linear)` in place of every linear layer."""
    model = nnx.clone(model)
    for _, module in list(nnx.iter_modules(model)):
        for name, child in list(vars(module).items()):
            if isinstance(child, nnx.Linear):
                setattr(module, name, layer(child))
    return model
