"""Matrices in int8 with one scale an output channel: a quarter of the bytes of float32, on disk and when decoding.

One-token decoding on a CPU waits for weights to arrive from memory, so int8 weights pay. Activations are not rounded
to int8 with them: each is taken as 128 high + low, two int8 numbers that together hold 15 bits, and both rows go
through one integer product. The result is that of the released weights to about 1e-4 of its size, behind a norm 1e-3.
"""

import numpy as np
from jaxtyping import Float, Float32, Int8


def quantize(array: Float[np.ndarray, "I O"]) -> tuple[Int8[np.ndarray, "I O"], Float32[np.ndarray, " O"]]:
    """A float matrix [in, out] as int8 and float32 scales [out]: value = int8 * scale."""
    scale = np.maximum(np.abs(array).max(axis=0), 1e-12).astype(np.float32) / 127
    return np.round(array / scale).astype(np.int8), scale


def dequantize(array: Int8[np.ndarray, "I O"], scale: Float32[np.ndarray, " O"]) -> Float32[np.ndarray, "I O"]:
    """The inverse of `quantize`, to half a step."""
    return array.astype(np.float32) * scale
