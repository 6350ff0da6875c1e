"""Matrices in int8 with one scale per output channel: a quarter of the bytes of float32, on disk and in decoding."""

import numpy as np
from jaxtyping import Float, Float32, Int8


def quantize(array: Float[np.ndarray, "I O"]) -> tuple[Int8[np.ndarray, "I O"], Float32[np.ndarray, " O"]]:
    """Return a float matrix [in, out] as int8 and float32 scales [out]: value = int8 * scale."""
    scale = np.maximum(np.abs(array).max(axis=0), 1e-12).astype(np.float32) / 127
    return np.round(array / scale).astype(np.int8), scale


def dequantize(array: Int8[np.ndarray, "I O"], scale: Float32[np.ndarray, " O"]) -> Float32[np.ndarray, "I O"]:
    """Invert `quantize`, up to half a step."""
    return array.astype(np.float32) * scale
