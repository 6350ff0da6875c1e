"""Pretrained models on disk, read without JAX: safetensors and JSON, no pickle.

A pretrained model is a folder with `config.json` (the `ModelConfig`, the fingerprint of the vocabulary, the format, the
SHA-256 of the weights) and `model.safetensors`. Matrices are int8 with one float32 scale per output channel, all other
parameters are float32. `pretrained` builds the model from it.
"""

import dataclasses
import hashlib
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from music_ar.features import gap, keyboard, notes, retrieval
from music_ar.features.wishes import WishTable
from music_ar.files import parse_json, read_file
from music_ar.model import hub
from music_ar.model.card import without_metadata
from music_ar.model.config import ModelConfig, TapeConfig
from music_ar.model.quantization import dequantize
from music_ar.tokens import vocabulary

FORMAT = "music-ar 2"
ENCODER_FORMAT = "music-ar encoder 1"
"""Format of the checkpoints of `music_ar.embedding`."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_CARD, CURVE, METRICS = "MODEL_CARD.md", "curve.json", "metrics.json"
PASSAGES = "passages.safetensors"
"""The index that a piece encoder has made (`music_ar.embedding.index`)."""
COMPANIONS = (MODEL_CARD, hub.CARD, CURVE, METRICS, PASSAGES)
"""Files that may accompany a model; they are fetched from the hub with it."""
DEFAULT_MODEL = "maestro-small"
_HERE = Path(__file__).resolve().parents[1]
SHIPPED_FOLDERS = (_HERE.parent / "checkpoints", _HERE / "checkpoints")
"""Folders of the models that ship with the project: in a checkout, and in an installed wheel."""

_MAX_CONFIG_BYTES = 2**20
_SIZE_SLACK = 2**20  # bytes, for the header and what small models have besides int8 matrices
_LATER_SIZES = ("segment", "exits", "wishes", "tape", "padding")  # not in the first configs, and off by default
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


def read_weights(source: str | os.PathLike[str] | None = None, *, any_vocabulary: bool = False) -> Weights:
    """Read a pretrained model.

    Args:
        source: name of a model that ships with the project, a folder, or the id of a Hugging Face hub repository
            ("owner/name"); default: `DEFAULT_MODEL`.
        any_vocabulary: whether the model may be one of other sequences than music, with a vocabulary of its own.

    Raises:
        CheckpointError: there is no such model, a file is missing or damaged, or the model has a different format or
            vocabulary.
    """
    folder = folder_of(source)
    config, sha256 = _read_config(folder / CONFIG)
    if not (config.is_music or any_vocabulary):
        raise CheckpointError(
            f"{folder} is not a model of music: its {config.vocabulary_size:,} tokens are not events but a vocabulary "
            f"of its own. Expected a model of music, such as {DEFAULT_MODEL}"
        )
    path, shapes = folder / WEIGHTS, parameter_shapes(config)
    _check_size(path, shapes)
    tensors = read_tensors(path, sha256)
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
        "gap.kernel": (gap.CLASSES if config.fills_gaps else 0, D),
        "label.kernel": (config.label_size, D),
        "wishes.kernel": (config.wish_rows, D),
    }
    return {
        "embedding": (V, D),
        **{name: shape for name, shape in optional.items() if shape[0]},
        **_tape_shapes(config),
        "context_norm.scale": (D,),
        "latent.kernel": (D, D),
        **{f"cross.{name}": shape for name, shape in block.items()},
        **{f"blocks.{layer}.{name}": shape for layer in range(config.layers) for name, shape in block.items()},
        "final_norm.scale": (D,),
        "head.kernel": (D, V),
        "head.bias": (V,),
        **_exit_shapes(config),
    }


def _exit_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    exits = len(config.exits)
    return {"exit_costs.kernel": (config.width, exits), "exit_costs.bias": (exits,)} if exits else {}


def _tape_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    if config.tape is None:
        return {}
    D, learned = config.width, config.tape.learned
    return {
        **({"tape.learned": (learned, D)} if learned else {}),
        "tape.start": (D,),
        **{f"tape.{name}.kernel": (D, D) for name in ("item", "key", "query")},
        "tape.expand.kernel": (2 * D, 2 * D),
        "tape.contract.kernel": (2 * D, D),
        "tape.halt.kernel": (D, 1),
        "tape.halt.bias": (1,),
    }


def identity(source: str | os.PathLike[str] | None = None) -> dict[str, str | None]:
    """Return the name of the model that `read_weights` would read, and the SHA-256 of its weights.

    Raises:
        CheckpointError: as `read_weights`, for the config alone.
    """
    _, sha256 = _read_config(folder_of(source) / CONFIG)
    return {"name": DEFAULT_MODEL if source is None else Path(source).name, "weights_sha256": sha256}


def read_companion(source: str | os.PathLike[str] | None, name: str) -> str:
    """Return the text of one of the `COMPANIONS` of a model; empty if the model has none.

    The card of a model from the hub is its README.md without the metadata.

    Raises:
        CheckpointError: there is no such model.
    """
    folder = folder_of(source)
    return without_metadata(card_of(folder)) if name == MODEL_CARD else _text_of(folder / name)


def card_of(folder: Path) -> str:
    """Return the model card in a folder, with its metadata if it has some; empty if there is none."""
    return _text_of(folder / MODEL_CARD) or _text_of(folder / hub.CARD)


def _text_of(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.is_file() else ""


def read_figures(source: str | os.PathLike[str] | None, name: str) -> dict[str, Any]:
    """Return the curve or the metrics of a model (`CURVE`, `METRICS`); empty if the model has none.

    Raises:
        CheckpointError: there is no such model, or the file is damaged.
    """
    text = read_companion(source, name)
    try:
        figures = parse_json(text) if text else {}
    except ValueError as error:
        raise CheckpointError(f"{name} of the model is not JSON: {error}; write it again, or remove it") from error
    if not isinstance(figures, dict):
        raise CheckpointError(f"{name} of the model has no names for its figures; write it again, or remove it")
    return figures


def local_folder(source: str | os.PathLike[str]) -> Path:
    """Return the folder of a model on this machine.

    Args:
        source: the name of a model that ships with the project, or a folder.

    Raises:
        CheckpointError: it is neither.
    """
    folder = _folder_here(os.fspath(source))
    if folder is None:
        raise CheckpointError(f"expected a folder, or the name of a model that ships with the project, got {source}")
    if not (folder / CONFIG).exists() and (folder / "model" / CONFIG).exists():
        raise CheckpointError(f"{folder} is the folder of a training run; its model is {folder / 'model'}")
    return folder


def _check_size(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a config whose parameters the file cannot hold, before anything of their size is read or built."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error
    parameters = sum(math.prod(shape) for shape in shapes.values())
    if not parameters - _SIZE_SLACK <= size <= 8 * parameters + _SIZE_SLACK:
        raise CheckpointError(
            f"{path} has {size / 2**20:,.1f} MB, but {CONFIG} describes a model of {parameters:,} parameters, which "
            f"takes {parameters / 2**20:,.1f} MB or up to four times as much: fetch both files again"
        )


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error of a file of a checkpoint that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path.parent} has no {path.name}, so it is not a pretrained model")
    return CheckpointError(f"{path} cannot be read: {error.strerror}")


def read_tensors(path: Path, sha256: str | None) -> dict[str, np.ndarray]:
    """Return the tensors of a file by their current names.

    Raises:
        CheckpointError: the file is missing or damaged, or has another SHA-256.
    """
    import safetensors
    import safetensors.numpy

    try:
        data = read_file(path)
    except OSError as error:
        raise unreadable(path, error) from error
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"{path} does not match its SHA-256 in {CONFIG}: fetch both files again")
    try:
        tensors = safetensors.numpy.load(data)
    # KeyError: a type that NumPy does not have; the others: shapes that it cannot have.
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, OverflowError) as error:
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
    for part in (name, f"{name}.scale"):
        if part in tensors and tensors[part].dtype == np.float32 and not np.isfinite(tensors[part]).all():
            raise CheckpointError(f"{path}: {part} has numbers that are infinite or not a number; fetch it again")


def _folder_here(name: str) -> Path | None:
    folders = (*(shipped / name for shipped in SHIPPED_FOLDERS), Path(name))
    return next((folder for folder in folders if folder.is_dir()), None)


def folder_of(source: str | os.PathLike[str] | None) -> Path:
    """Return the folder of a model, fetched from the hub if need be."""
    name = DEFAULT_MODEL if source is None else os.fspath(source)
    if (folder := _folder_here(name)) is not None:
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
        folder = hub.fetch(name, (CONFIG, WEIGHTS, *COMPANIONS))
    except hub.HubError as error:
        raise CheckpointError(f"{name} is not a folder, and could not be fetched from the hub: {error}") from error
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"{name} on the hub has no {CONFIG}, so it is not a pretrained model")
    return folder


def _read_config(path: Path) -> tuple[ModelConfig, str | None]:
    """Return the sizes of a model and, if present, the SHA-256 of its weights."""
    try:
        record = parse_json(read_file(path, max_bytes=_MAX_CONFIG_BYTES))
        _check_format(record["format"], path)
        _check_events(record, path)
        sizes = _with_current_names(record["model"])
        if sizes.pop("cross_depths", []):
            raise CheckpointError(f"{path}: models with cross_depths are not supported since version 0.2.0")
        if missing := [name for name in _needed_sizes(record["format"]) if name not in sizes]:
            raise CheckpointError(f"{path} lacks {', '.join(missing)}, so it is not a model configuration")
        sizes["exits"] = tuple(sizes.get("exits", ()))
        config = ModelConfig(**sizes | _nested(sizes))
        _check_fingerprint(config, record["fingerprint"], path)
        return config, record.get("weights_sha256")
    except OSError as error:
        raise unreadable(path, error) from error
    except CheckpointError:
        raise
    except (AttributeError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is not a model configuration: {_in_words(error)}") from error


def _check_format(found: Any, path: Path) -> None:
    if found == ENCODER_FORMAT:
        raise CheckpointError(f"{path}: this is a piece encoder, which compares music; expected a model that makes it")
    if found not in (FORMAT, _OLD_FORMAT):
        raise CheckpointError(f'{path}: expected format "{FORMAT}", got "{found}"')


def _check_events(record: dict[str, Any], path: Path) -> None:
    """Refuse a model of music whose events are not those of this version."""
    is_music = not isinstance(record.get("model"), dict) or record["model"].get("padding") is None
    if is_music and record["fingerprint"] not in vocabulary.FINGERPRINTS.values():
        known = " or ".join(f"{each[:12]}…" for each in vocabulary.FINGERPRINTS.values())
        raise CheckpointError(
            f"{path}: the model has a different event vocabulary (fingerprint {record['fingerprint'][:12]}…, "
            f"expected {known})"
        )


def _check_fingerprint(config: ModelConfig, fingerprint: str, path: Path) -> None:
    """Refuse a vocabulary that is not the one of the fingerprint."""
    if config.fingerprint == fingerprint:
        return
    fitting = [size for size, each in vocabulary.FINGERPRINTS.items() if each == fingerprint]
    if config.is_music and fitting:
        raise CheckpointError(f"{path}: expected vocabulary_size {fitting[0]}, got {config.vocabulary_size}")
    raise CheckpointError(f"{path}: vocabulary_size and padding are not those of the fingerprint; fetch it again")


def _nested(sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that are records themselves."""
    wishes, tape = sizes.get("wishes"), sizes.get("tape")
    return {
        "wishes": None if wishes is None else WishTable.of_json(wishes),
        "tape": None if tape is None else TapeConfig(**tape),
    }


def _in_words(error: Exception) -> str:
    return f"it lacks {error.args[0]}" if isinstance(error, KeyError) else str(error)


def _needed_sizes(record_format: str) -> list[str]:
    """The fields of `ModelConfig` that a config must have: all that its format began with.

    Weights do not show all sizes, such as the number of time heads: a default for those would be another model.
    """
    sizes = [field for field in dataclasses.fields(ModelConfig) if field.name not in _LATER_SIZES]
    return [field.name for field in sizes if record_format == FORMAT or field.default not in (0, 1)]


def _with_current_names(named: dict[str, Any]) -> dict[str, Any]:
    return {_OLD_NAMES.get(name, name): value for name, value in named.items()}
