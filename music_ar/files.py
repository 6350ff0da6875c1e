"""Atomic file writes: a file is complete or absent, even if its writer is killed."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path, *, part: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` when the block ends without an error.

    A process that is killed inside the block leaves the partial file behind and `path` unchanged.

    Args:
        path: the file to create or replace.
        part: name of the partial file, in the same folder. Set it only if a single process writes `path`, since it
            overwrites what an earlier crash left. Default: a unique hidden name for each writer.

    Raises:
        OSError: the file cannot be written; its `filename` is `path`.
    """
    if part is None:
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, os.fspath(part)):
            error.filename, error.filename2 = os.fspath(path), None
        raise


def write_atomically(path: Path, data: bytes, *, part: Path | None = None) -> None:
    """Write a file as `replacing` does."""
    with replacing(path, part=part) as file:
        file.write(data)
