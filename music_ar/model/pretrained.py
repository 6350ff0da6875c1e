"""Pretrained models on disk: safetensors and JSON, no pickle.

A pretrained model is a folder with `config.json` (the `ModelConfig`, the fingerprint of the vocabulary, the format, the
SHA-256 of the weights) and `model.safetensors`. Matrices are int8 with one float32 scale per output channel, all other
parameters are float32.
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
from music_ar.model.config import Compute, ModelConfig
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.quantization import dequantize, quantize
from music_ar.tokens import vocabulary

FORMAT = "music-ar 2"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
COMPANIONS = ("MODEL_CARD.md", "curve.json", "metrics.json")
"""Files that may accompany a model; they are fetched from the hub with it."""
DEFAULT_MODEL = "maestro-small"
_HERE = Path(__file__).resolve().parents[1]
SHIPPED_FOLDERS = (_HERE.parent / "checkpoints", _HERE / "checkpoints")
"""Folders of the models that ship with the project: in a checkout, and in an installed wheel."""

_OLD_FORMAT = "music-ar 1"
_OLD_NAMES = {  # of sizes and of tensors in the old format
    "recall": "retrieval_notes",
    "view_size": "label_size",
    "recall.kernel": "retrieval.kernel",
    "recall.kernel.scale": "retrieval.kernel.scale",
    "view.kernel": "label.kernel",
    "view.kernel.scale": "label.kernel.scale",
}


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or for a different model or vocabulary; the message names the file."""


def save_pretrained(model: PerceiverAR, folder: Path, *, int8: bool = True) -> None:
    """Write a model to a folder, in the format that this module describes.

    Args:
        model: the model.
        folder: created if it is missing; files in it are replaced one by one, each atomically.
        int8: whether to store matrices in one byte per parameter.
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


def load_pretrained(source: str | os.PathLike[str] | None = None, *, compute: Compute = Compute()) -> PerceiverAR:
    """Load a pretrained model.

    Args:
        source: name of a model that ships with the project, a folder, or the id of a Hugging Face hub repository
            ("owner/name"); default: `DEFAULT_MODEL`.
        compute: how the model computes.

    Raises:
        CheckpointError: there is no such model, a file is missing or damaged, or the model has a different format or
            vocabulary.
    """
    folder = _folder_of(source)
    config, sha256 = _read_config(folder / CONFIG)
    tensors = _read_tensors(folder / WEIGHTS, sha256)
    graph, params = nnx.split(nnx.eval_shape(lambda: PerceiverAR(config, rngs=nnx.Rngs(0), compute=compute)))
    flat = dict(nnx.to_flat_state(params))
    for path, variable in flat.items():
        name = _name(path)
        array = _take_tensor(tensors, name, folder / WEIGHTS)
        if array.shape != variable.shape:
            raise CheckpointError(
                f"{folder / WEIGHTS}: expected {name} of shape {variable.shape} by {CONFIG}, got {array.shape}"
            )
        flat[path] = variable.replace(jnp.asarray(array))
    if tensors:
        raise CheckpointError(f"{folder / WEIGHTS} has tensors that do not belong to {CONFIG}: {sorted(tensors)}")
    return nnx.merge(graph, nnx.from_flat_state(flat))


def identity(source: str | os.PathLike[str] | None = None) -> dict[str, str | None]:
    """Return the name of the model that `load_pretrained` would load, and the SHA-256 of its weights.

    Raises:
        CheckpointError: as `load_pretrained`, for the config alone.
    """
    _, sha256 = _read_config(_folder_of(source) / CONFIG)
    return {"name": DEFAULT_MODEL if source is None else Path(source).name, "weights_sha256": sha256}


def read_companion(source: str | os.PathLike[str] | None, name: str) -> str:
    """Return the text of one of the `COMPANIONS` of a model; empty if the model has none.

    Raises:
        CheckpointError: there is no such model.
    """
    path = _folder_of(source) / name
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _read_tensors(path: Path, sha256: str | None) -> dict[str, np.ndarray]:
    """Return the tensors of a file by their current names."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}") from error
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"{path} does not match its SHA-256 in {CONFIG}: fetch both files again")
    try:
        tensors = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a type that NumPy does not have
        raise CheckpointError(f"{path} is damaged: {error}. Fetch it again") from error
    return _with_current_names(tensors)


def _take_tensor(tensors: dict[str, np.ndarray], name: str, path: Path) -> np.ndarray:
    """Remove a tensor, and its scale if it is int8, from `tensors`; return it as float32."""
    array = tensors.pop(name, None)
    if array is None:
        raise CheckpointError(f"{path} lacks the tensor {name}")
    if array.dtype == np.int8:
        scale = tensors.pop(f"{name}.scale", None)
        if scale is None or scale.dtype != np.float32 or scale.shape != array.shape[1:]:
            raise CheckpointError(f"{path}: {name} is int8 and needs {name}.scale, one float32 per output channel")
        return dequantize(array, scale)
    if array.dtype != np.float32:
        raise CheckpointError(f"{path}: expected {name} in int8 or float32, got {array.dtype}")
    return array


def _folder_of(source: str | os.PathLike[str] | None) -> Path:
    """Return the folder of a model, fetched from the hub if need be."""
    name = DEFAULT_MODEL if source is None else os.fspath(source)
    for folder in (*(shipped / name for shipped in SHIPPED_FOLDERS), Path(name)):
        if folder.is_dir():
            return folder
    if source is None:
        raise CheckpointError(
            f"the model {name}, which ships with the project, is missing: looked in "
            + " and ".join(map(str, SHIPPED_FOLDERS))
        )
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"expected the name of a model that ships with the project, a folder or a hub id (owner/name), got {name}"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, *COMPANIONS]))
    except Exception as error:  # the hub's client raises network, HTTP and file errors of many classes
        raise CheckpointError(f"{name} is not a folder, and could not be fetched from the hub: {error}") from error


def _read_config(path: Path) -> tuple[ModelConfig, str | None]:
    """Return the sizes of a model and, if present, the SHA-256 of its weights."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] not in (FORMAT, _OLD_FORMAT):
            raise CheckpointError(f'{path}: expected format "{FORMAT}", got "{record["format"]}"')
        if record["fingerprint"] != vocabulary.FINGERPRINT:
            raise CheckpointError(
                f"{path}: the model has a different event vocabulary (fingerprint {record['fingerprint'][:12]}…, "
                f"expected {vocabulary.FINGERPRINT[:12]}…)"
            )
        sizes = _with_current_names(record["model"])
        if sizes.pop("cross_depths", []):
            raise CheckpointError(f"{path}: models with cross_depths are not supported since version 0.2.0")
        return ModelConfig(**sizes), record.get("weights_sha256")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}, so it is not a pretrained model") from error
    except CheckpointError:
        raise
    except (AttributeError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is not a model configuration: {error!r}") from error


def _with_current_names(named: dict[str, Any]) -> dict[str, Any]:
    return {_OLD_NAMES.get(name, name): value for name, value in named.items()}


def _named_parameters(model: PerceiverAR) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {_name(path): np.asarray(variable[...], np.float32) for path, variable in flat}


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)
