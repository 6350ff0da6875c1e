"""The code of this project as a hash, by which a process and the nodes of a cluster compare what they have."""

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

_PACKAGES = ("music_ar", "data_pipeline", "app")


def code_digest() -> str:
    """SHA-256 of the source files of this project, as this process would import them."""
    digest = look_for_code()()
    assert digest is not None
    return digest


def look_for_code() -> Callable[[], str | None]:
    """A function that returns what `code_digest` does, or None if a package is missing.

    It refers to nothing of this project, so that Ray carries it whole to a node that may have another version, or none.
    """
    packages = _PACKAGES

    def look() -> str | None:
        digest = hashlib.sha256()
        for package in packages:
            spec = importlib.util.find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                return None
            folder = Path(spec.submodule_search_locations[0])
            for file in sorted(folder.rglob("*.py")):
                digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
        return digest.hexdigest()

    return look
