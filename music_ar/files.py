"""Reading without surprises, and atomic writes: a file is complete or absent, even if its writer is killed."""

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MAX_NAME_BYTES = 240
"""Longest name of a file to write: file systems take 255 bytes, and variations are numbered."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_file(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> bytes:
    """Read a whole file. Pipes and devices, which might never end, are refused at once.

    Args:
        path: the file, or a link to it.
        max_bytes: size of the largest accepted file.

    Raises:
        OSError: it cannot be read, is not a file, or is too large; `strerror` says which, and `filename` is `path`.
    """
    name = os.fspath(path)
    try:
        # A pipe is opened without waiting for its writer, in case it took the place of the file just now.
        descriptor = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a null character, or half a character
        raise OSError(errno.EINVAL, "no file can have this name", name) from error
    try:
        kind = _KINDS.get(stat.S_IFMT(os.fstat(descriptor).st_mode))
        if kind is not None:
            raise OSError(errno.EISDIR if kind == "a folder" else errno.EINVAL, f"it is {kind}, not a file", name)
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read() if max_bytes is None else file.read(max_bytes + 1)
    finally:
        os.close(descriptor)
    if max_bytes is not None and len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes / 2**20:.4g} MB", name)
    return data


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, or nested deeper than can be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@contextlib.contextmanager
def replacing(path: Path, *, part: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` when the block ends without an error.

    A process that is killed inside the block leaves the partial file behind and `path` unchanged. Links are replaced,
    never followed.

    Args:
        path: the file to create or replace.
        part: name of the partial file, in the same folder. Set it only if a single process writes `path`, since it
            overwrites what an earlier crash left. Default: a unique hidden name for each writer.

    Raises:
        OSError: the file cannot be written; its `filename` is `path`.
    """
    if part is None:  # short, so that any name that can be written has room for it
        part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        part.unlink(missing_ok=True)
        with part.open("xb") as file:
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
