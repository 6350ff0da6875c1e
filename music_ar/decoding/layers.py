"""Linear layers for decoding: other forms of a model's `nnx.Linear`s, put in their place."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from music_ar.model.perceiver_ar import PerceiverAR


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
        y = _product(x.astype(self.dtype), self.kernel_OxI[...].astype(self.dtype))
        if self.bias_O is not None:
            y = y + self.bias_O[...].astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


class NormedLinear(nnx.Module):
    """RMSNorm and the linear layer behind it in one, with a matrix as `TransposedLinear` has it. Not for training.

    The norm's scale is in the matrix, and what it divides by, one number a row, divides the product: so the product
    does not wait for it, and no normalised stream passes through memory (docs/decoding.md has figures).
    """

    def __init__(self, norm: nnx.RMSNorm, linear: nnx.Linear):
        assert norm.scale is not None
        assert linear.bias is None, "what is divided has none"
        self.kernel_OxI = nnx.Variable((norm.scale[...][:, None] * linear.kernel[...]).T)
        self.epsilon, self.dtype = norm.epsilon, linear.dtype

    def __call__(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """The layer's output, in the layer's type."""
        mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        y = _product(x.astype(self.dtype), self.kernel_OxI[...].astype(self.dtype), jnp.float32)
        return (y * jax.lax.rsqrt(mean_square + self.epsilon)).astype(self.dtype)


def _product(x: Array, kernel_OxI: Array, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "*T O"]:
    return jax.lax.dot_general(x, kernel_OxI, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)


class _Unchanged(nnx.Module):
    """What stands in a norm's place once it is part of the layer behind it."""

    def __call__(self, x: Array) -> Array:
        return x


def join_norms(model: PerceiverAR, layer: Callable[[nnx.RMSNorm, nnx.Linear], nnx.Module] = NormedLinear) -> None:
    """Puts `layer(norm, linear)` where queries, keys and values of a joined self block, or a feed-forward, begin.

    Like `Block.join`, it changes the model itself.
    """
    for block in (model.cross, *model.further_crosses, *model.blocks):
        if block.joined is not None:
            _join(block, "attention_norm", block.joined, "projection", layer)
        _join(block, "feed_forward_norm", block, "expand", layer)


def _join(norm_of: nnx.Module, norm: str, linear_of: nnx.Module, linear: str, layer: Callable[..., nnx.Module]) -> None:
    setattr(linear_of, linear, layer(getattr(norm_of, norm), getattr(linear_of, linear)))
    setattr(norm_of, norm, _Unchanged())


def replace_linears(model: PerceiverAR, layer: Callable[[nnx.Linear], nnx.Module]) -> PerceiverAR:
    """A copy of a model with `layer(linear)` in place of every linear layer."""
    model = nnx.clone(model)
    for _, module in list(nnx.iter_modules(model)):
        for name, child in list(vars(module).items()):
            if isinstance(child, nnx.Linear):
                setattr(module, name, layer(child))
    return model
