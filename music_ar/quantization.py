"""Matrices in int8 with one scale an output channel: a quarter of the bytes of float32, on disk and when decoding.

One-token decoding on a CPU waits for weights to arrive from memory, so int8 weights pay. Activations are not rounded
to int8 with them: each is taken as 128 high + low, two int8 numbers that together hold 15 bits, and both rows go
through one integer product. The result is that of the released weights to about 1e-4 of its size.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int8

from music_ar.linear import replace_linears
from music_ar.model import PerceiverAR

_LARGEST = 127 * 128 + 63  # of 128 high + low with high in -127..127 and low in -64..63
# With more rows than this, as in a prefill, arithmetic takes longer than the weights, and float32 is faster at it.
_MOST_ROWS = 64
# Which way XLA is faster at, by the version of JAX; see `Int8Linear`.
_OUT_FIRST = jax.__version_info__ >= (0, 12)


def quantize(array: Float[np.ndarray, "I O"]) -> tuple[Int8[np.ndarray, "I O"], Float32[np.ndarray, " O"]]:
    """A float matrix [in, out] as int8 and float32 scales [out]: value = int8 * scale."""
    scale = np.maximum(np.abs(array).max(axis=0), 1e-12).astype(np.float32) / 127
    return np.round(array / scale).astype(np.int8), scale


def dequantize(array: Int8[np.ndarray, "I O"], scale: Float32[np.ndarray, " O"]) -> Float32[np.ndarray, "I O"]:
    """The inverse of `quantize`, to half a step."""
    return array.astype(np.float32) * scale


class Int8Linear(nnx.Module):
    """A linear layer with an int8 matrix, in place of `nnx.Linear`. Not for training.

    With JAX 0.12 the matrix is held as [out, in], which XLA multiplies with as it is, where it packs one of [in, out]
    anew at each call; and in two parts, whose products run at the same time if there are two cores. With JAX 0.10, as
    Python 3.11 has it, that is slower than [in, out] (docs/decoding.md has figures).
    """

    def __init__(self, linear: nnx.Linear):
        kernel, scale = quantize(np.asarray(linear.kernel[...], np.float32))
        parts = np.array_split(np.ascontiguousarray(kernel.T), 2) if _OUT_FIRST else [kernel]
        self.parts = nnx.List([nnx.Variable(jnp.asarray(part)) for part in parts])
        self.scale_O = nnx.Variable(jnp.asarray(scale))
        self.bias_O = None if linear.bias is None else nnx.Variable(linear.bias[...])

    def __call__(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """The layer's output, in the type of `x`."""
        x_TxI = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        few = x_TxI.shape[0] <= _MOST_ROWS
        y_TxO = self._product(x_TxI) if few else self._times(x_TxI) * self.scale_O[...][None]
        if self.bias_O is not None:
            y_TxO = y_TxO + self.bias_O[...][None]
        return y_TxO.reshape(*x.shape[:-1], -1).astype(x.dtype)

    def _product(self, x_TxI: Array) -> Array:
        step_Tx1 = jnp.maximum(jnp.abs(x_TxI).max(axis=-1, keepdims=True), 1e-30) / _LARGEST
        whole_TxI = jnp.round(x_TxI / step_Tx1)
        high_TxI = jnp.round(whole_TxI / 128)
        halves = jnp.concatenate([high_TxI, whole_TxI - 128 * high_TxI]).astype(jnp.int8)
        high_TxO, low_TxO = jnp.split(self._times(halves).astype(jnp.float32), 2)
        return (128 * high_TxO + low_TxO) * step_Tx1 * self.scale_O[...][None]

    def _times(self, x_TxI: Array) -> Array:
        """The product of `x` and the matrix in numbers of their kind: int8 ones are summed in int32."""
        whole = x_TxI.dtype == jnp.int8
        products = [
            jax.lax.dot_general(
                x_TxI,
                part[...].astype(x_TxI.dtype),
                (((1,), (1 if _OUT_FIRST else 0,)), ((), ())),
                preferred_element_type=jnp.int32 if whole else x_TxI.dtype,
            )
            for part in self.parts
        ]
        return jnp.concatenate(products, axis=1)


def with_int8_weights(model: PerceiverAR) -> PerceiverAR:
    """A copy of a model with every linear layer as `Int8Linear`; exact for weights that were released as int8."""
    return replace_linears(model, Int8Linear)
