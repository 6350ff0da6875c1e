"""Linear layers with int8 matrices, for decoding on a CPU.

One-token decoding is limited by reading weights from memory, so int8 weights pay off. Activations are not rounded to
int8: each is split into 128 * high + low, two int8 numbers that together hold 15 bits, and both rows go through one
integer product. The result matches that of the pretrained weights to about 1e-4 of its size, or 1e-3 after a norm.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int8

from music_ar.features.categorical import Categorical, hot_indices, one_hot
from music_ar.model.perceiver_ar import FeatureProjection
from music_ar.model.quantization import quantize

_LARGEST = 127 * 128 + 63  # of 128 * high + low, with high in -127..127 and low in -64..63
# With more rows than this, as in a prefill, arithmetic takes longer than reading weights, and float32 is faster.
_MOST_ROWS = 64

Layout = Literal["in_out", "out_in"]


class Int8Forms:
    """Linear layers with int8 matrices.

    Args:
        layout: how matrices are stored. YNNPACK (JAX 0.12) multiplies with [out, in] as it is, but repacks [in, out] at
            each call; with JAX 0.10, [out, in] is slower (measurements: docs/results/decoding.md).
    """

    def __init__(self, layout: Layout):
        self._layout: Layout = layout

    def linear(self, layer: nnx.Linear) -> "Int8Linear":
        """An int8 layer."""
        return Int8Linear(*_quantized(layer.kernel[...]), self._layout, layer.bias)

    def normed(self, norm: nnx.RMSNorm, layer: nnx.Linear) -> "NormedInt8Linear":
        """An int8 layer that holds the norm."""
        return NormedInt8Linear(norm, layer, self._layout)

    def features(self, layer: FeatureProjection) -> "Int8EmbeddingBag":
        """An int8 embedding bag."""
        return Int8EmbeddingBag(layer, self._layout)


def _quantized(kernel_IxO: Array) -> tuple[Int8[np.ndarray, "I O"], Float32[np.ndarray, " O"]]:
    return quantize(np.asarray(kernel_IxO, np.float32))


class Int8Linear(nnx.Module):
    """A linear layer with an int8 matrix. Not for training.

    With [out, in], the matrix is in two parts, whose products run at the same time if there are two cores.

    Args:
        kernel_IxO: the matrix.
        scale_O: its scales.
        layout: how to store it.
        bias: of the layer, or None.
    """

    def __init__(
        self,
        kernel_IxO: Int8[np.ndarray, "I O"],
        scale_O: Float32[np.ndarray, " O"],
        layout: Layout,
        bias: nnx.Param | None = None,
    ):
        self.out_first = layout == "out_in"
        parts = np.array_split(np.ascontiguousarray(kernel_IxO.T), 2) if self.out_first else [kernel_IxO]
        self.parts = nnx.List([nnx.Variable(jnp.asarray(part)) for part in parts])
        self.scale_O = nnx.Variable(jnp.asarray(scale_O))
        self.bias_O = None if bias is None else nnx.Variable(bias[...])

    def __call__(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """The layer's output, in the type of `x`."""
        x_TxI = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        few = x_TxI.shape[0] <= _MOST_ROWS
        y_TxO = self._integer_product(x_TxI) if few else self._float_product(x_TxI)
        if self.bias_O is not None:
            y_TxO = y_TxO + self.bias_O[...][None]
        return y_TxO.reshape(*x.shape[:-1], -1).astype(x.dtype)

    def _integer_product(self, x_TxI: Array) -> Array:
        step_Tx1 = jnp.maximum(jnp.abs(x_TxI).max(axis=-1, keepdims=True), 1e-30) / _LARGEST
        return self._times_rounded(x_TxI / step_Tx1) * step_Tx1 * self.scale_O[...][None]

    def _float_product(self, x_TxI: Array) -> Array:
        return self._times(x_TxI) * self.scale_O[...][None]

    def _times_rounded(self, x_TxI: Array) -> Array:
        """The product of `x`, at most `_LARGEST` in size and rounded to integers, and the matrix."""
        whole_TxI = jnp.round(x_TxI)
        high_TxI = jnp.round(whole_TxI / 128)
        halves = jnp.concatenate([high_TxI, whole_TxI - 128 * high_TxI]).astype(jnp.int8)
        high_TxO, low_TxO = jnp.split(self._times(halves).astype(jnp.float32), 2)
        return 128 * high_TxO + low_TxO

    def _times(self, x_TxI: Array) -> Array:
        """The product of `x` and the matrix in the type of `x`; int8 is summed in int32."""
        products = [
            jax.lax.dot_general(
                x_TxI,
                part[...].astype(x_TxI.dtype),
                (((1,), (1 if self.out_first else 0,)), ((), ())),
                preferred_element_type=jnp.int32 if x_TxI.dtype == jnp.int8 else x_TxI.dtype,
            )
            for part in self.parts
        ]
        return jnp.concatenate(products, axis=1)


class NormedInt8Linear(Int8Linear):
    """RMSNorm and the linear layer after it, with an int8 matrix. Not for training.

    Numbers of a normalized row are at most sqrt(I) times the norm's largest scale, so their maximum need not be
    computed before rounding: that saves 84 of about 640 small operations per step (docs/results/decoding.md). It costs
    three or four of their 15 bits, and five in the worst row seen.
    """

    def __init__(self, norm: nnx.RMSNorm, linear: nnx.Linear, layout: Layout):
        super().__init__(*_quantized(linear.kernel[...]), layout, linear.bias)
        assert norm.scale is not None
        step = jnp.maximum(jnp.abs(norm.scale[...]).max() * linear.kernel.shape[0] ** 0.5, 1e-30) / _LARGEST
        self.norm_I = nnx.Variable(norm.scale[...].astype(jnp.float32) / step)
        self.scale_O[...] = self.scale_O[...] * step
        self.epsilon = norm.epsilon

    def _integer_product(self, x_TxI: Array) -> Array:
        return self._times_rounded(self._normed(x_TxI)) * self.scale_O[...][None]

    def _float_product(self, x_TxI: Array) -> Array:
        return super()._float_product(self._normed(x_TxI))

    def _normed(self, x_TxI: Array) -> Array:
        """Normalized rows in quantization steps, at most `_LARGEST` in size."""
        factor_Tx1 = jax.lax.rsqrt(jnp.square(x_TxI).mean(axis=-1, keepdims=True) + self.epsilon)
        return x_TxI * factor_Tx1 * self.norm_I[...][None]


class Int8EmbeddingBag(nnx.Module):
    """A `FeatureProjection` with an int8 matrix, as a sum of the rows of its classes. Not for training.

    A token needs a few dozen of the thousands of rows that belong to classes, and only those are read.
    """

    def __init__(self, projection: FeatureProjection, layout: Layout):
        kernel, scale = _quantized(projection.kernel[...])
        self.rows_CxO = nnx.Variable(jnp.asarray(kernel[projection.numbers :]))
        self.scale_O = nnx.Variable(jnp.asarray(scale))
        self.numbers = Int8Linear(kernel[: projection.numbers], scale, layout) if projection.numbers else None
        self.dtype = projection.dtype

    def __call__(self, numbers: Float[Array, "*T _"] | None, categories: list[Categorical]) -> Float[Array, "*T O"]:
        """See `FeatureProjection`."""
        index = hot_indices(categories)
        index_TxH = index.reshape(-1, index.shape[-1])
        if len(index_TxH) <= _MOST_ROWS:
            known_TxHx1 = (index_TxH >= 0)[..., None]
            y_TxO = jnp.where(known_TxHx1, self.rows_CxO[...][index_TxH], 0).sum(axis=1, dtype=jnp.float32)
        else:
            hot_TxC = one_hot(categories).reshape(len(index_TxH), -1)
            y_TxO = hot_TxC @ self.rows_CxO[...].astype(jnp.float32)
        y = (y_TxO * self.scale_O[...][None]).reshape(*index.shape[:-1], -1)
        if self.numbers is not None:
            assert numbers is not None, "the layer takes numbers before its classes"
            y = y + self.numbers(numbers)
        return y.astype(self.dtype)
