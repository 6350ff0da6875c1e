"""Linear layers with int8 weights, for decoding."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from music_ar.decoding.layers import join_norms, replace_linears
from music_ar.features import keyboard
from music_ar.features.keyboard import Classes, hot_places, one_hot
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.quantization import quantize

_LARGEST = 127 * 128 + 63  # of 128 high + low with high in -127..127 and low in -64..63


# With more rows than this, as in a prefill, arithmetic takes longer than the weights, and float32 is faster at it.
_MOST_ROWS = 64


YNNPACK = jax.__version_info__ >= (0, 12)
"""Whether YNNPACK makes XLA's products on CPUs: it is fast at other layouts and types (figures: docs/decoding.md)."""


class Int8Linear(nnx.Module):
    """A linear layer with an int8 matrix, in place of `nnx.Linear`. Not for training.

    With JAX 0.12 the matrix is held as [out, in], which XLA multiplies with as it is, where it packs one of [in, out]
    anew at each call; and in two parts, whose products run at the same time if there are two cores. With JAX 0.10, as
    Python 3.11 has it, that is slower than [in, out] (docs/decoding.md has figures).

    Args:
        linear: the layer.
        inputs: of so many of its inputs, the first ones; default: of all. The scales are those of all.
    """

    def __init__(self, linear: nnx.Linear, *, inputs: int | None = None):
        whole_kernel, scale = quantize(np.asarray(linear.kernel[...], np.float32))
        kernel = whole_kernel[:inputs]
        parts = np.array_split(np.ascontiguousarray(kernel.T), 2) if YNNPACK else [kernel]
        self.parts = nnx.List([nnx.Variable(jnp.asarray(part)) for part in parts])
        self.scale_O = nnx.Variable(jnp.asarray(scale))
        self.bias_O = None if linear.bias is None else nnx.Variable(linear.bias[...])

    def __call__(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """The layer's output, in the type of `x`."""
        x_TxI = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        few = x_TxI.shape[0] <= _MOST_ROWS
        y_TxO = self._product(x_TxI) if few else self._rows(x_TxI)
        if self.bias_O is not None:
            y_TxO = y_TxO + self.bias_O[...][None]
        return y_TxO.reshape(*x.shape[:-1], -1).astype(x.dtype)

    def _product(self, x_TxI: Array) -> Array:
        step_Tx1 = jnp.maximum(jnp.abs(x_TxI).max(axis=-1, keepdims=True), 1e-30) / _LARGEST
        return self._times_whole(x_TxI / step_Tx1) * step_Tx1 * self.scale_O[...][None]

    def _rows(self, x_TxI: Array) -> Array:
        return self._times(x_TxI) * self.scale_O[...][None]

    def _times_whole(self, x_TxI: Array) -> Array:
        """The product of `x`, up to `_LARGEST` in size and rounded to whole numbers, and the matrix."""
        whole_TxI = jnp.round(x_TxI)
        high_TxI = jnp.round(whole_TxI / 128)
        halves = jnp.concatenate([high_TxI, whole_TxI - 128 * high_TxI]).astype(jnp.int8)
        high_TxO, low_TxO = jnp.split(self._times(halves).astype(jnp.float32), 2)
        return 128 * high_TxO + low_TxO

    def _times(self, x_TxI: Array) -> Array:
        """The product of `x` and the matrix in numbers of their kind: int8 ones are summed in int32."""
        whole = x_TxI.dtype == jnp.int8
        products = [
            jax.lax.dot_general(
                x_TxI,
                part[...].astype(x_TxI.dtype),
                (((1,), (1 if YNNPACK else 0,)), ((), ())),
                preferred_element_type=jnp.int32 if whole else x_TxI.dtype,
            )
            for part in self.parts
        ]
        return jnp.concatenate(products, axis=1)


class NormedInt8Linear(Int8Linear):
    """RMSNorm and the linear layer behind it in one, with an int8 matrix. Not for training.

    A normed row's numbers are at most sqrt(I) times the norm's largest scale, so nobody has to look for the largest
    before they are rounded: of some 640 small operations a step that saves 84 (docs/decoding.md). It costs three or
    four of their 15 bits, of the worst row seen five.
    """

    def __init__(self, norm: nnx.RMSNorm, linear: nnx.Linear):
        super().__init__(linear)
        assert norm.scale is not None
        step = jnp.maximum(jnp.abs(norm.scale[...]).max() * linear.kernel.shape[0] ** 0.5, 1e-30) / _LARGEST
        self.norm_I = nnx.Variable(norm.scale[...].astype(jnp.float32) / step)
        self.scale_O[...] = self.scale_O[...] * step
        self.epsilon = norm.epsilon

    def _product(self, x_TxI: Array) -> Array:
        return self._times_whole(self._normed(x_TxI)) * self.scale_O[...][None]

    def _rows(self, x_TxI: Array) -> Array:
        return super()._rows(self._normed(x_TxI))

    def _normed(self, x_TxI: Array) -> Array:
        """Normed rows in steps, of which they are `_LARGEST` at most."""
        factor_Tx1 = jax.lax.rsqrt(jnp.square(x_TxI).mean(axis=-1, keepdims=True) + self.epsilon)
        return x_TxI * factor_Tx1 * self.norm_I[...][None]


class GatheredInt8Linear(nnx.Module):
    """A linear layer of numbers and classes (`model.Gathering`) with an int8 matrix. Not for training.

    Of the rows that belong to classes, a token needs a few dozen of some thousand, and they are all that is read.

    Args:
        linear: the layer that takes classes as one-hot numbers.
        numbers: how many other numbers it takes, before them.
    """

    def __init__(self, linear: nnx.Linear, numbers: int):
        assert linear.bias is None, "what is told has none"
        kernel, scale = quantize(np.asarray(linear.kernel[...], np.float32))
        self.rows_CxO, self.scale_O = nnx.Variable(jnp.asarray(kernel[numbers:])), nnx.Variable(jnp.asarray(scale))
        self.of_numbers = Int8Linear(linear, inputs=numbers) if numbers else None

    def gather(self, numbers: Float[Array, "*T _"] | None, classes: list[Classes]) -> Float[Array, "*T O"]:
        """The layer's output in float32; see `model.Gathering`."""
        index = hot_places(classes, jnp)
        index_TxH = index.reshape(-1, index.shape[-1])
        if len(index_TxH) <= _MOST_ROWS:
            known_TxHx1 = (index_TxH >= 0)[..., None]
            y_TxO = jnp.where(known_TxHx1, self.rows_CxO[...][index_TxH], 0).sum(axis=1, dtype=jnp.float32)
        else:
            hot_TxC = one_hot(classes, jnp).reshape(len(index_TxH), -1)
            y_TxO = hot_TxC @ self.rows_CxO[...].astype(jnp.float32)
        y = (y_TxO * self.scale_O[...][None]).reshape(*index.shape[:-1], -1)
        if self.of_numbers is None:
            return y
        assert numbers is not None, "the layer takes numbers before its classes"
        return y + self.of_numbers(numbers)


def with_int8_weights(model: PerceiverAR) -> PerceiverAR:
    """A copy of a model with every linear layer in int8; weights that were released so stay as they are."""
    model = nnx.clone(model)
    join_norms(model, NormedInt8Linear)
    for name, numbers in (("keyboard", keyboard.CHANNELS), ("recall", 0)):
        if hasattr(model, name):
            setattr(model, name, GatheredInt8Linear(getattr(model, name), numbers))
    return replace_linears(model, Int8Linear)
