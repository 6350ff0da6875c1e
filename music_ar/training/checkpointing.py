"""Training checkpoints: the newest states of a run, to resume from."""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from music_ar.files import write_atomically
from music_ar.model.pretrained import CheckpointError
from music_ar.tokens import vocabulary

SETTINGS = "settings.json"


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
        settings = json.loads(json.dumps(settings | {"fingerprint": vocabulary.FINGERPRINT}))
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
