"""Files that are there whole or not at all, however their writing ends."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path, *, part: Path | None = None) -> Iterator[BinaryIO]:
    """A binary file to write, which takes the place of `path` once the block ends without an error.

    A process that is killed inside the block leaves the part behind, and `path` as it was.

    Args:
        path: the file to make or replace.
        part: the name it has while it is being written, in the same folder; for those who have only one writer, and
            clean up or write again under the same name after a crash. Default: a hidden name that no other writer has.

    Raises:
        OSError: it cannot be written; its `filename` is `path`.
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
    """Writes a file as `replacing` does."""
    with replacing(path, part=part) as file:
        file.write(data)
