"""Which code this is, as a hash: by it hosts and nodes are compared, and stored programs are told apart."""

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

_PACKAGES = ("music_ar", "data_pipeline", "app")


def code_digest(*packages: str) -> str:
    """SHA-256 of the names and contents of the Python files of some packages, as this process would import them.

    Args:
        packages: their names; default: all packages of this project.

    Raises:
        ModuleNotFoundError: there is no such package.
    """
    digest = look_for_code(*packages)()
    if digest is None:
        raise ModuleNotFoundError(f"expected packages, got {' '.join(packages or _PACKAGES)}")
    return digest


def look_for_code(*packages: str) -> Callable[[], str | None]:
    """A function that returns what `code_digest` does, or None if a package is missing.

    It refers to nothing of this project, so that Ray carries it whole to a node that may have another version, or none.
    """
    packages = packages or _PACKAGES

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
