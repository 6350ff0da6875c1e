"""Pretrained models on disk, read without JAX: safetensors and JSON, no pickle.

A pretrained model is a folder with `config.json` (the `ModelConfig`, the fingerprint of the vocabulary, the format, the
SHA-256 of the weights) and `model.safetensors`. Matrices are int8 with one float32 scale per output channel, all other
parameters are float32. `pretrained` builds the model from it.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from music_ar.features import keyboard, notes, retrieval
from music_ar.model.config import ModelConfig
from music_ar.model.quantization import dequantize
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


class Weights(NamedTuple):
    """A model's sizes and parameters.

    Attributes:
        config: the sizes.
        tensors: by name, each parameter of `parameter_shapes`: float32, or int8 with float32 scales [out] under
            "<name>.scale".
    """

    config: ModelConfig
    tensors: dict[str, np.ndarray]

    def float32(self, name: str) -> Float32[np.ndarray, "..."]:
        """A parameter in float32."""
        array = self.tensors[name]
        return dequantize(array, self.tensors[f"{name}.scale"]) if array.dtype == np.int8 else array


def read_weights(source: str | os.PathLike[str] | None = None) -> Weights:
    """Read a pretrained model.

    Args:
        source: name of a model that ships with the project, a folder, or the id of a Hugging Face hub repository
            ("owner/name"); default: `DEFAULT_MODEL`.

    Raises:
        CheckpointError: there is no such model, a file is missing or damaged, or the model has a different format or
            vocabulary.
    """
    folder = _folder_of(source)
    config, sha256 = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    tensors, shapes = _read_tensors(path, sha256), parameter_shapes(config)
    for name, shape in shapes.items():
        _check_tensor(tensors, name, shape, path)
    scales = {f"{name}.scale" for name in shapes if tensors[name].dtype == np.int8}
    if unknown := tensors.keys() - shapes.keys() - scales:
        raise CheckpointError(f"{path} has tensors that do not belong to {CONFIG}: {sorted(unknown)}")
    return Weights(config, tensors)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of each parameter of a model of this size; matrices are [in, out]."""
    D, K, F, V = config.width, config.head_size, config.hidden, config.vocabulary_size
    query_width, kv_width = config.heads * K, config.kv_heads * K
    block = {
        "attention_norm.scale": (D,),
        "query.kernel": (D, query_width),
        "query_norm.scale": (K,),
        "key.kernel": (D, kv_width),
        "key_norm.scale": (K,),
        "value.kernel": (D, kv_width),
        "output.kernel": (query_width, D),
        "feed_forward_norm.scale": (D,),
        "expand.kernel": (D, F),
        "contract.kernel": (F, D),
    }
    optional = {
        "conv": (config.conv_width if config.conv_width > 1 else 0, D),
        "keyboard.kernel": (keyboard.CHANNELS + notes.feature_count(config.onsets) if config.onsets else 0, D),
        "retrieval.kernel": (retrieval.feature_count() if config.retrieval_notes else 0, D),
        "label.kernel": (config.label_size, D),
    }
    return {
        "embedding": (V, D),
        **{name: shape for name, shape in optional.items() if shape[0]},
        "context_norm.scale": (D,),
        "latent.kernel": (D, D),
        **{f"cross.{name}": shape for name, shape in block.items()},
        **{f"blocks.{layer}.{name}": shape for layer in range(config.layers) for name, shape in block.items()},
        "final_norm.scale": (D,),
        "head.kernel": (D, V),
        "head.bias": (V,),
    }


def identity(source: str | os.PathLike[str] | None = None) -> dict[str, str | None]:
    """Return the name of the model that `read_weights` would read, and the SHA-256 of its weights.

    Raises:
        CheckpointError: as `read_weights`, for the config alone.
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
    import safetensors
    import safetensors.numpy

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


def _check_tensor(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...], path: Path) -> None:
    array = tensors.get(name)
    if array is None:
        raise CheckpointError(f"{path} lacks the tensor {name}")
    if array.dtype == np.int8:
        scale = tensors.get(f"{name}.scale")
        if scale is None or scale.dtype != np.float32 or scale.shape != array.shape[1:]:
            raise CheckpointError(f"{path}: {name} is int8 and needs {name}.scale, one float32 per output channel")
    elif array.dtype != np.float32:
        raise CheckpointError(f"{path}: expected {name} in int8 or float32, got {array.dtype}")
    if array.shape != shape:
        raise CheckpointError(f"{path}: expected {name} of shape {shape} by {CONFIG}, got {array.shape}")


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
    from huggingface_hub import snapshot_download  # takes long to import

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
