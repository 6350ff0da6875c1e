"""Compiled programs on disk, so that a second start neither traces nor lowers the model again.

JAX's own cache saves XLA's work only; tracing and lowering the decoding loop takes 2 s on a GPU. Loading a program runs
code from it, as with JAX's cache: the folder must be the user's own. Not for CPUs, on which a loaded program may lack
functions (JAX 0.10).
"""

import functools
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from music_ar.code import code_digest
from music_ar.files import write_atomically

_logger = logging.getLogger(__name__)


class StoredPrograms:
    """Compiled programs of one model, by their static and their array arguments.

    Args:
        identity: what the programs depend on besides their names, array arguments and this project's code. Its `repr`
            must not change from process to process.
        folder: where they are stored; None to store none.
    """

    def __init__(self, identity: Any, folder: Path | None):
        self._identity, self._folder = identity, folder
        self._programs: dict[Any, Callable[..., Any]] = {}

    def call(self, name: str, function: Any, static: tuple[Any, ...], arguments: tuple[Any, ...], like: Any) -> Any:
        """Return `function(*static, *arguments)`.

        Args:
            name: differs for other static arguments.
            function: made by `jax.jit`, with the first arguments static.
            static: those arguments.
            arguments: pytrees of arrays, the first of them on the devices that are to run it.
            like: any pytree with the structure of the result.
        """
        if self._folder is None:
            return function(*static, *arguments)
        leaves, structure = jax.tree.flatten(arguments)
        key = (name, structure, tuple((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves))
        if key in self._programs:
            return self._programs[key](*arguments)
        digest = hashlib.sha256(repr((_environment(), self._identity, *map(str, key))).encode()).hexdigest()
        path = self._folder / f"{name}-{digest}.program"
        structures = jax.tree.structure((arguments, {})), jax.tree.structure(like)
        program = _loaded(path, *structures, leaves[0].sharding)
        if program is not None:
            self._programs[key] = program
            return program(*arguments)
        program = self._programs[key] = function.lower(*static, *arguments).compile()
        result = program(*arguments)
        _store(path, program)  # while the device computes
        return result

    def clear(self) -> None:
        """Forget the programs that are in memory."""
        self._programs.clear()


def cache_folder() -> Path | None:
    """The folder of JAX's cache, if it has one and the device is not a CPU."""
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]  # added at run time
    return None if folder is None or jax.local_devices()[0].platform == "cpu" else Path(folder)


@functools.cache
def _environment() -> tuple[str, ...]:
    """What a compiled program depends on besides its arguments: this code, JAX, the device and its settings."""
    device = jax.local_devices()[0]
    flags = os.environ.get("XLA_FLAGS", "")
    return (code_digest("music_ar"), jax.__version__, device.device_kind, device.client.platform_version, flags)


def _loaded(path: Path, arguments: Any, result: Any, sharding: Any) -> Callable[..., Any] | None:
    """The program in a file; None if there is none, or it cannot be loaded."""
    try:
        payload = path.read_bytes()
        devices = sorted(sharding.device_set, key=lambda device: device.id)
        return serialize_executable.deserialize_and_load(payload, arguments, result, execution_devices=devices)
    except FileNotFoundError:
        return None
    except Exception as error:  # of XLA, pickle or the file system: the program is compiled instead
        _logger.info("cannot load %s: %s", path, error)
        return None


def _store(path: Path, program: Any) -> None:
    try:
        payload, *_ = serialize_executable.serialize(program)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, payload)
    except Exception as error:  # a platform that cannot serialize, or a full disk: the next start compiles again
        _logger.info("cannot store %s: %s", path, error)
