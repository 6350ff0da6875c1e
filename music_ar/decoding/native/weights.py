"""A model's tensors as the engine takes them: matrices in int8 with a scale per output channel, vectors in float32."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from music_ar.features import keyboard, notes, retrieval
from music_ar.model.config import ModelConfig
from music_ar.model.quantization import quantize


class Weights(NamedTuple):
    """One tensor.

    Attributes:
        numbers: int8 [in, out] of a matrix; None for a vector.
        values: the matrix's scales [out], or the vector.
    """

    numbers: np.ndarray | None
    values: np.ndarray


def weights_of(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Weights]:
    """The tensors that decoding reads, by name.

    Args:
        config: sizes of the model.
        tensors: as in a pretrained model's file: int8 with scales under the name with ".scale" after it, or float32.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    found = {}
    for name, shape in _shapes(config).items():
        if name not in tensors:
            raise ValueError(f"the model lacks the tensor {name}")
        array = np.asarray(tensors[name])
        if array.shape != shape:
            raise ValueError(f"expected {name} of shape {shape}, got {array.shape}")
        found[name] = _matrix(name, array, tensors) if len(shape) == 2 else Weights(None, _floats(array))
    return found


def _matrix(name: str, array: np.ndarray, tensors: Mapping[str, np.ndarray]) -> Weights:
    if array.dtype != np.int8:
        numbers, scale = quantize(_floats(array))
        return Weights(np.ascontiguousarray(numbers), scale)
    scale = tensors.get(f"{name}.scale")
    if scale is None or np.shape(scale) != array.shape[1:]:
        raise ValueError(f"{name} is int8 and needs {name}.scale, one number per output channel")
    return Weights(np.ascontiguousarray(array), _floats(scale))


def _floats(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, V = config.width, config.vocabulary_size
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (V, D),
        "context_norm.scale": (D,),
        "latent.kernel": (D, D),
        "final_norm.scale": (D,),
        "head.kernel": (D, V),
        "head.bias": (V,),
    }
    if config.conv_width > 1:
        shapes["conv"] = (config.conv_width, D)
    if config.onsets:
        shapes["keyboard.kernel"] = (keyboard.CHANNELS + notes.feature_count(config.onsets), D)
    if config.retrieval_notes:
        shapes["retrieval.kernel"] = (retrieval.feature_count(), D)
    for block in ("cross", *(f"blocks.{number}" for number in range(config.layers))):
        shapes |= {f"{block}.{name}": shape for name, shape in _block_shapes(config).items()}
    return shapes


def _block_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, F, K = config.width, config.hidden, config.head_size
    query, kv = config.heads * K, config.kv_heads * K
    return {
        "attention_norm.scale": (D,),
        "query.kernel": (D, query),
        "query_norm.scale": (K,),
        "key.kernel": (D, kv),
        "key_norm.scale": (K,),
        "value.kernel": (D, kv),
        "output.kernel": (query, D),
        "feed_forward_norm.scale": (D,),
        "expand.kernel": (D, F),
        "contract.kernel": (F, D),
    }
