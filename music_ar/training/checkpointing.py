"""Training checkpoints: the newest states of a run, to resume from, and the settings of the run."""

import json
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from music_ar.files import parse_json, read_file, write_atomically
from music_ar.model.weights import CheckpointError
from music_ar.tokens import vocabulary

SETTINGS = "settings.json"

_APPEARS_S = 90
"""How long a new file may take to be seen on other hosts; NFS asks again after a minute at most."""


class TrainingCheckpoints:
    """The newest training states of a run, written in the background; each is complete or absent.

    With several JAX processes, each makes one, and each writes its shards.

    Args:
        folder: where they are kept; all processes must see it.
        settings: settings of the run, JSON-like; saved in `settings.json` and compared when resuming.
        resume: whether to continue the run that `folder` holds.

    Raises:
        CheckpointError: `folder` holds a run and `resume` is false; or it is true, and `folder` holds none or a run
            with different settings; or this process does not see what process 0 has written there.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, resume: bool):
        self._folder = folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            folder,
            item_names=("state", "position"),
            options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True),
        )
        self._newest = self._manager.latest_step()
        try:
            if resume:
                if self._newest is None:
                    raise CheckpointError(f"nothing to resume: {folder} holds no complete training checkpoint")
                check_settings(folder, settings)
            elif self._newest is not None:
                raise CheckpointError(
                    f"{folder} already holds a run (step {self._newest}): resume it or choose another folder"
                )
            elif jax.process_index() == 0:
                save_settings(folder, settings)
            else:
                _await_settings(folder, settings)
        except BaseException:
            self._manager.close()
            raise

    @property
    def newest(self) -> str | None:
        """Path of the newest checkpoint, even if it is still being written."""
        return None if self._newest is None else str(self._folder / str(self._newest))

    def __enter__(self) -> "TrainingCheckpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()  # waits for pending writes

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Save a pytree of arrays and a JSON-like position. Returns as soon as the arrays may be changed."""
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(_leaves(state)), position=ocp.args.JsonSave(position)),
        )
        self._newest = step

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """Return the newest state, in the structure and on the devices of `like`, and its position.

        Raises:
            CheckpointError: it cannot be read.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _leaves(like))
        try:
            restored = self._manager.restore(
                self._newest,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore()),
            )
        except Exception as error:  # orbax, tensorstore and JSON each raise errors of their own
            raise CheckpointError(f"cannot read the training checkpoint {self.newest}: {error}") from error
        # The leaves of a dict come in the order of its keys, which is their original order.
        return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(restored["state"])), restored["position"]


def _leaves(tree: Any) -> dict[str, Any]:
    """Return a pytree's leaves under sortable numbers: a plain dict for orbax, whatever classes the tree has."""
    return {f"{index:05d}": leaf for index, leaf in enumerate(jax.tree.leaves(tree))}


def save_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write `settings.json`: the settings of a run, and the fingerprint of the vocabulary."""
    write_atomically(folder / SETTINGS, json.dumps(_with_fingerprint(settings), indent=1).encode())


def _await_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Wait until the settings that process 0 writes can be read here."""
    end_s = time.monotonic() + _APPEARS_S
    while True:
        try:
            return check_settings(folder, settings)
        except CheckpointError as error:
            if time.monotonic() > end_s:
                raise CheckpointError(
                    f"{folder} does not show what process 0 has written there: the folder of a run must be on a file "
                    "system that all hosts share"
                ) from error
            time.sleep(0.1)


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Compare settings with those of the run in a folder.

    Raises:
        CheckpointError: they differ, or `settings.json` cannot be read.
    """
    path = folder / SETTINGS
    try:
        saved = parse_json(read_file(path))
        if not isinstance(saved, dict):
            raise ValueError("expected an object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}, the settings of the run: {error}") from error
    differences = sorted(_differences(saved, json.loads(json.dumps(_with_fingerprint(settings)))))
    if differences:
        raise CheckpointError(f"{folder} holds a run with different settings: {', '.join(differences)}")


def _with_fingerprint(settings: dict[str, Any]) -> dict[str, Any]:
    return {"fingerprint": vocabulary.FINGERPRINT} | settings


def _differences(saved: dict[str, Any], given: dict[str, Any], prefix: str = "") -> set[str]:
    """Return a line for each setting that differs; nested settings are joined by dots."""
    found = set()
    for name in saved.keys() | given.keys():
        old, new = saved.get(name), given.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.add(f"{prefix}{name} was {old}, is {new}")
    return found
