"""What is kept on disk: the training state (orbax) and released models (safetensors and JSON, no pickle).

A released model is a folder with `config.json` (the ModelConfig, the vocabulary's fingerprint, the format, the weights'
SHA-256) and `model.safetensors`; matrices are int8 with one float32 scale an output channel, the rest is float32.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from huggingface_hub import snapshot_download

from music_ar.files import write_atomically
from music_ar.model.config import ModelConfig
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.quantization import dequantize, quantize
from music_ar.tokens import vocabulary

FORMAT = "music-ar 1"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
DEFAULT_RELEASE = "maestro-small"
_HERE = Path(__file__).resolve().parents[1]
SHIPPED_FOLDERS = (_HERE.parent / "checkpoints", _HERE / "checkpoints")
"""Where the checkpoints that ship with the project lie: in a checkout, and in an installed wheel."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another model or vocabulary; the message names the file."""


def save_released(model: PerceiverAR, folder: Path, *, int8: bool = True) -> None:
    """Writes a model in released form; see the module's text for the format.

    Args:
        model: the model.
        folder: made if it is missing; files in it are replaced one by one, each as a whole.
        int8: whether to store matrices in one byte a parameter.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, array in _named_parameters(model).items():
        if int8 and array.ndim == 2:
            tensors[name], tensors[f"{name}.scale"] = quantize(array)
        else:
            tensors[name] = array
    weights = safetensors.numpy.save(tensors, metadata={"format": FORMAT})
    config = {
        "format": FORMAT,
        "fingerprint": vocabulary.FINGERPRINT,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "model": dataclasses.asdict(model.config),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, weights)
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def load_released(source: str | os.PathLike[str] | None = None, *, dtype: jnp.dtype | None = None) -> PerceiverAR:
    """Reads a released model.

    Args:
        source: the name of a checkpoint that ships with the project, a folder, or the id of a Hugging Face hub
            repository ("owner/name"); default: `DEFAULT_RELEASE`.
        dtype: what to compute in; default `model.default_dtype()`.

    Raises:
        CheckpointError: no such folder, a file is missing or damaged, or the model is of another format or
            vocabulary.
    """
    folder = _folder_of(source)
    config, sha256 = _read_config(folder / CONFIG)
    tensors = _read_tensors(folder / WEIGHTS, sha256)
    graph, params = nnx.split(nnx.eval_shape(lambda: PerceiverAR(config, rngs=nnx.Rngs(0), dtype=dtype)))
    flat = dict(nnx.to_flat_state(params))
    for path, variable in flat.items():
        name = _name(path)
        array = _take_tensor(tensors, name, folder / WEIGHTS)
        if array.shape != variable.shape:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name} should have shape {variable.shape} by {CONFIG}, has {array.shape}"
            )
        flat[path] = variable.replace(jnp.asarray(array))
    if tensors:
        raise CheckpointError(f"{folder / WEIGHTS} has tensors that {CONFIG} does not ask for: {sorted(tensors)}")
    return nnx.merge(graph, nnx.from_flat_state(flat))


def identity(source: str | os.PathLike[str] | None = None) -> dict[str, str | None]:
    """Which model `load_released` would load: its name, and the SHA-256 of its weights.

    Raises:
        CheckpointError: as `load_released`, of the config alone.
    """
    _, sha256 = _read_config(_folder_of(source) / CONFIG)
    return {"name": DEFAULT_RELEASE if source is None else Path(source).name, "weights_sha256": sha256}


def read_beside(source: str | os.PathLike[str] | None, name: str) -> str:
    """The text of another file of a released model, such as its model card; empty if there is none.

    Raises:
        CheckpointError: no such model.
    """
    path = _folder_of(source) / name
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _read_tensors(path: Path, sha256: str | None) -> dict[str, np.ndarray]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}") from error
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"{path} is not the file that {CONFIG} was written with: fetch both again")
    try:
        return safetensors.numpy.load(data)
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a type that NumPy has not
        raise CheckpointError(f"{path} is damaged: {error}. Fetch it again") from error


def _take_tensor(tensors: dict[str, np.ndarray], name: str, path: Path) -> np.ndarray:
    """Removes a tensor, and its scale if it is int8, from `tensors`; returns it as float32."""
    array = tensors.pop(name, None)
    if array is None:
        raise CheckpointError(f"{path} lacks the tensor {name}")
    if array.dtype == np.int8:
        scale = tensors.pop(f"{name}.scale", None)
        if scale is None or scale.dtype != np.float32 or scale.shape != array.shape[1:]:
            raise CheckpointError(f"{path}: {name} is int8 and needs {name}.scale, one float32 an output channel")
        return dequantize(array, scale)
    if array.dtype != np.float32:
        raise CheckpointError(f"{path}: {name} should be int8 or float32, is {array.dtype}")
    return array


def _folder_of(source: str | os.PathLike[str] | None) -> Path:
    name = DEFAULT_RELEASE if source is None else os.fspath(source)
    for folder in (*(shipped / name for shipped in SHIPPED_FOLDERS), Path(name)):
        if folder.is_dir():
            return folder
    if source is None:
        raise CheckpointError(
            f"the checkpoint {name} that ships with the project is missing: looked in "
            + " and ".join(map(str, SHIPPED_FOLDERS))
        )
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{name} is no checkpoint that ships with the project, no folder with a released model, and no hub id "
            "(owner/name)"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the hub's client raises network, HTTP and file errors of many classes
        raise CheckpointError(f"{name} is no folder here and could not be fetched from the hub: {error}") from error


def _read_config(path: Path) -> tuple[ModelConfig, str | None]:
    """The model's sizes and, where it is told, the SHA-256 of its weights."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise CheckpointError(f'{path}: expected format "{FORMAT}", found "{record["format"]}"')
        if record["fingerprint"] != vocabulary.FINGERPRINT:
            raise CheckpointError(
                f"{path}: the model was trained on another event vocabulary (fingerprint "
                f"{record['fingerprint'][:12]}..., here {vocabulary.FINGERPRINT[:12]}...)"
            )
        sizes = record["model"]
        config = ModelConfig(**sizes | {"cross_depths": tuple(sizes["cross_depths"])})  # JSON has no tuples
        return config, record.get("weights_sha256")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}: it is not a released model") from error
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is no model configuration: {error!r}") from error


def _named_parameters(model: PerceiverAR) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {_name(path): np.asarray(variable[...], np.float32) for path, variable in flat}


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)
