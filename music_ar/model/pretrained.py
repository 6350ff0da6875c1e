"""Pretrained models: from the files that `weights` describes to a model, and back."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

from music_ar.files import write_atomically
from music_ar.model.config import Compute
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.quantization import quantize
from music_ar.model.weights import CONFIG, FORMAT, WEIGHTS, Weights, read_weights
from music_ar.tokens import vocabulary

M = TypeVar("M", bound=nnx.Module)


def save_pretrained(model: PerceiverAR, folder: Path, *, int8: bool = True) -> None:
    """Write a model to a folder, in the format that `weights` describes.

    Args:
        model: the model.
        folder: created if it is missing; files in it are replaced one by one, each atomically.
        int8: whether to store matrices in one byte per parameter.
    """
    weights = safetensors.numpy.save(weights_of(model, int8=int8).tensors, metadata={"format": FORMAT})
    config = {
        "format": FORMAT,
        "fingerprint": vocabulary.FINGERPRINTS[model.config.vocabulary_size],
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "model": dataclasses.asdict(model.config),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, weights)
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def load_pretrained(source: str | os.PathLike[str] | None = None, *, compute: Compute = Compute()) -> PerceiverAR:
    """Load a pretrained model.

    Args:
        source: name of a model that ships with the project, a folder, or the id of a Hugging Face hub repository
            ("owner/name"); default: the shipped model.
        compute: how the model computes.

    Raises:
        CheckpointError: there is no such model, a file is missing or damaged, or the model has a different format or
            vocabulary.
    """
    return model_of(read_weights(source), compute=compute)


def model_of(weights: Weights, *, compute: Compute = Compute()) -> PerceiverAR:
    """The model with these weights.

    Args:
        weights: its sizes and parameters.
        compute: how it computes.
    """

    def make() -> PerceiverAR:
        return PerceiverAR(weights.config, rngs=nnx.Rngs(0), compute=compute)

    return build(make, lambda name, _: weights.float32(name))


def build(make: Callable[[], M], tensor: Callable[[str, tuple[int, ...]], np.ndarray]) -> M:
    """Return the module that `make` would make, with float32 parameters that `tensor` gives by name and shape."""
    graph, params = nnx.split(nnx.eval_shape(make))
    variables = dict(nnx.to_flat_state(params))
    found = {path: tensor(_name(path), variable.shape) for path, variable in variables.items()}
    arrays = jax.device_put(found)  # all at once
    flat = {path: variable.replace(arrays[path]) for path, variable in variables.items()}
    return nnx.merge(graph, nnx.from_flat_state(flat))


def parameters(model: nnx.Module) -> dict[str, np.ndarray]:
    """Return the parameters of a module by name, in float32."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {_name(path): np.asarray(variable[...], np.float32) for path, variable in state}


def weights_of(model: PerceiverAR, *, int8: bool = True) -> Weights:
    """The weights of a model in memory.

    Args:
        model: the model.
        int8: whether matrices are rounded to int8.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, array in parameters(model).items():
        if int8 and array.ndim == 2:
            tensors[name], tensors[f"{name}.scale"] = quantize(array)
        else:
            tensors[name] = array
    return Weights(model.config, tensors)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)
