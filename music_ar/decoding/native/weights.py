"""A model's tensors as the engine takes them: matrices in int8 with a scale per output channel, vectors in float32."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from music_ar.model.config import ModelConfig
from music_ar.model.quantization import quantize
from music_ar.model.weights import parameter_shapes


class Tensor(NamedTuple):
    """A matrix or a vector.

    Attributes:
        numbers: int8 [in, out] of a matrix; None for a vector.
        values: the matrix's scales [out], or the vector.
    """

    numbers: np.ndarray | None
    values: np.ndarray


def engine_tensors(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The tensors that decoding reads, by name.

    Args:
        config: sizes of the model.
        tensors: as in a pretrained model's file: int8 with scales under the name with ".scale" after it, or float32.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    found = {}
    for name, shape in parameter_shapes(config).items():
        if name in ("label.kernel", "wishes.kernel"):  # for training only; summed in Python
            continue
        if name not in tensors:
            raise ValueError(f"the model lacks the tensor {name}")
        array = np.asarray(tensors[name])
        if array.shape != shape:
            raise ValueError(f"expected {name} of shape {shape}, got {array.shape}")
        found[name] = _matrix(name, array, tensors) if len(shape) == 2 else Tensor(None, _floats(array))
    return found


def _matrix(name: str, array: np.ndarray, tensors: Mapping[str, np.ndarray]) -> Tensor:
    if array.dtype != np.int8:
        numbers, scale = quantize(_floats(array))
        return Tensor(np.ascontiguousarray(numbers), scale)
    scale = tensors.get(f"{name}.scale")
    if scale is None or np.shape(scale) != array.shape[1:]:
        raise ValueError(f"{name} is int8 and needs {name}.scale, one number per output channel")
    return Tensor(np.ascontiguousarray(array), _floats(scale))


def _floats(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32)
