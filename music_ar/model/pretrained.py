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

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from flax import nnx
from huggingface_hub import snapshot_download

from music_ar.files import write_atomically
from music_ar.model.perceiver_ar import ModelConfig, PerceiverAR
from music_ar.model.quantization import dequantize, quantize
from music_ar.tokens import codec

FORMAT = "music-ar 1"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
SETTINGS = "settings.json"
DEFAULT_RELEASE = "maestro-small"
_HERE = Path(__file__).resolve().parents[1]
SHIPPED_FOLDERS = (_HERE.parent / "checkpoints", _HERE / "checkpoints")
"""Where the checkpoints that ship with the project lie: in a checkout, and in an installed wheel."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another model or vocabulary; the message names the file."""


class TrainingCheckpoints:
    """The newest training states of a run, written in the background; each is complete or absent.

    Args:
        folder: where they are kept.
        settings: what the run is made with, JSON-like; saved, and compared when resuming.
        resume: whether the run goes on from what `folder` holds.

    Raises:
        CheckpointError: `folder` holds a run and `resume` is false, or none and it is true, or a run with
            other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, resume: bool):
        self._folder = folder = folder.absolute()
        settings = json.loads(json.dumps(settings | {"fingerprint": codec.FINGERPRINT}))
        folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            folder,
            item_names=("state", "position"),
            options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True),
        )
        self._newest = self._manager.latest_step()
        try:
            if resume:
                self._check_same(settings)
            elif self._newest is not None:
                raise CheckpointError(
                    f"{folder} already holds a run (step {self._newest}): resume it or name another folder"
                )
            else:
                write_atomically(folder / SETTINGS, json.dumps(settings, indent=1).encode())
        except BaseException:
            self._manager.close()
            raise

    def _check_same(self, settings: dict[str, Any]) -> None:
        if self._newest is None:
            raise CheckpointError(f"nothing to resume: {self._folder} holds no complete training checkpoint")
        path = self._folder / SETTINGS
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {path}, which says how the run was made: {error}") from error
        changed = sorted(_differences(before, settings))
        if changed:
            raise CheckpointError(f"{self._folder} holds a run with other settings: {', '.join(changed)}")

    @property
    def newest(self) -> str | None:
        """Where the newest checkpoint is, even if it is still being written."""
        return None if self._newest is None else str(self._folder / str(self._newest))

    def __enter__(self) -> "TrainingCheckpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()  # waits for what is being written

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Saves a pytree of arrays and a JSON-like position. Returns once the arrays may change again."""
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(_leaves(state)), position=ocp.args.JsonSave(position)),
        )
        self._newest = step

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """The newest state, in the structure and on the devices of `like`, and its position."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _leaves(like))
        try:
            restored = self._manager.restore(
                self._newest,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore()),
            )
        except Exception as error:  # orbax, tensorstore and JSON each raise their own
            raise CheckpointError(f"cannot read the training checkpoint {self.newest}: {error}") from error
        # The leaves of a dict come in the order of its keys, which is that of the numbers.
        return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(restored["state"])), restored["position"]


def _leaves(tree: Any) -> dict[str, Any]:
    """A pytree's leaves by a sortable number: plain for orbax, whatever classes the tree is made of."""
    return {f"{index:05d}": leaf for index, leaf in enumerate(jax.tree.leaves(tree))}


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for name in before.keys() | now.keys():
        a, b = before.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.add(f"{prefix}{name} was {a}, is {b}")
    return found


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
        "fingerprint": codec.FINGERPRINT,
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
        if record["fingerprint"] != codec.FINGERPRINT:
            raise CheckpointError(
                f"{path}: the model was trained on another event vocabulary (fingerprint "
                f"{record['fingerprint'][:12]}..., here {codec.FINGERPRINT[:12]}...)"
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
