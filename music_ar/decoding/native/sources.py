"""Which sources a library was compiled from. The build hook runs this file alone, so it imports nothing else."""

import hashlib
from pathlib import Path

SUFFIXES = (".cpp", ".h", ".inc")


def digest(folder: Path) -> str:
    """A hash of the C++ files of a folder: a library that holds another one is out of date."""
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    texts = (path.read_text(encoding="utf-8") for path in files)  # text, since Git may change the ends of lines
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
