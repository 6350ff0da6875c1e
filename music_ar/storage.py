"""Folders that results are written to: on this machine, or wherever fsspec reaches, such as `s3://bucket/out`.

A file is complete or absent in both. On this machine, and on remote file systems that can rename, it is written under
a temporary name and renamed. Object stores have no such need: a put is atomic. This is the only module that knows
fsspec.
"""

import atexit
import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from music_ar.files import read_file, write_atomically

PART = ".part."
"""What the name of a half-written file begins with; its own name follows."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "memory", "oci", "oss", "obs", "tos"}
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


class StorageError(ValueError):
    """An address that cannot be reached from here at all; the message says what to install or to change."""


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address, as `s3://bucket/out` is, and not a path on this machine."""
    return _URL.match(os.fspath(path)) is not None


class LocalFolder:
    """A folder on this machine, or on a file system that is mounted here.

    Args:
        path: the folder; it need not exist until something is written.
    """

    is_remote = False

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path)

    def __str__(self) -> str:
        return str(self._path)

    def path(self, name: str) -> Path:
        """The path of a file of the folder."""
        return self._path / name

    def prepare(self) -> None:
        """Make the folder, if it is missing.

        Raises:
            OSError: it cannot be made.
        """
        self._path.mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            OSError: it cannot be read.
        """
        return read_file(self.path(name))

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically; only one process may write a name at a time.

        Raises:
            OSError: it cannot be written.
        """
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Always the same temporary name, so that the next run overwrites what a killed process has left.
        write_atomically(path, data, part=path.with_name(f"{PART}{path.name}"))

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.path(name).exists()

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        self.path(name).unlink(missing_ok=True)

    def names(self, below: str = "") -> list[str]:
        """Names of the files directly in the folder, or in a folder below it; none if it is missing."""
        folder = self.path(below)
        prefix = f"{below}/" if below else ""
        return sorted(f"{prefix}{path.name}" for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []

    def local_copy(self, name: str) -> Path:
        """A path on this machine with the content of a file."""
        return self.path(name)


class RemoteFolder:
    """A folder on a file system or object store that fsspec knows. Methods are those of `LocalFolder`.

    Args:
        url: the address, such as `s3://bucket/out`.
        filesystem: fsspec's file system for it.
        root: the folder as that names it.
    """

    is_remote = True

    def __init__(self, url: str, filesystem: Any, root: str):
        self._url, self._filesystem, self._root = url.rstrip("/"), filesystem, root.rstrip("/")
        self._copies: Path | None = None

    def __str__(self) -> str:
        return self._url

    def path(self, name: str) -> str:
        """The address of a file of the folder."""
        return f"{self._url}/{name}"

    def prepare(self) -> None:
        """Find out whether the folder can be written, before the work.

        Raises:
            OSError: it cannot.
        """
        try:
            self.write(_PROBE, b"")
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "there is no such bucket", self._url) from error
        with contextlib.suppress(OSError):  # who may write may perhaps not delete
            self.remove(_PROBE)

    def read(self, name: str) -> bytes:
        """The content of a file."""
        with _os_errors(self.path(name)):
            return bytes(self._filesystem.cat_file(self._inside(name)))

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically."""
        target, filesystem = self._inside(name), self._filesystem
        with _os_errors(self.path(name)):
            if _protocols(filesystem) & _OBJECT_STORES:
                filesystem.pipe_file(target, data)
                return
            part = f"{PurePosixPath(target).parent}/{PART}{PurePosixPath(target).name}"
            filesystem.makedirs(str(PurePosixPath(target).parent), exist_ok=True)
            filesystem.pipe_file(part, data)
            filesystem.mv(part, target)

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        with _os_errors(self.path(name)):
            return self._filesystem.exists(self._inside(name))

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with _os_errors(self.path(name)), contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(self._inside(name))

    def names(self, below: str = "") -> list[str]:
        """Names of the files directly in the folder, or in a folder below it; none if it is missing."""
        folder = self._inside(below) if below else self._root
        with _os_errors(self.path(below)):
            return [path.removeprefix(self._root).lstrip("/") for path in _find(self._filesystem, folder, maxdepth=1)]

    def local_copy(self, name: str) -> Path:
        """Fetch a file to a temporary folder, which ends with this process."""
        if self._copies is None:
            self._copies = Path(tempfile.mkdtemp(prefix="music-ar-"))
            atexit.register(shutil.rmtree, self._copies, ignore_errors=True)
        write_atomically(self._copies / name, self.read(name))
        return self._copies / name

    def _inside(self, name: str) -> str:
        return f"{self._root}/{name}"


Folder = LocalFolder | RemoteFolder
_PROBE = f"{PART}music-ar"


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """A folder to write to and to read from.

    Args:
        path: a path on this machine, or an address that fsspec knows.

    Raises:
        StorageError: the package for this kind of address is not installed, or no package knows it.
    """
    if not is_url(path):
        return LocalFolder(path)
    filesystem, root = _open(os.fspath(path))
    if "file" in _protocols(filesystem):
        return LocalFolder(root)
    return RemoteFolder(os.fspath(path), filesystem, root)


def read_path(path: str | os.PathLike[str], *, max_bytes: int) -> bytes:
    """Read a whole file, by its path or its address; errors as `music_ar.files.read_file`.

    Raises:
        OSError: it cannot be read, or is too large.
        StorageError: as `open_folder`.
    """
    if not is_url(path):
        return read_file(path, max_bytes=max_bytes)
    url = os.fspath(path)
    filesystem, root = _open(url)
    with _os_errors(url):
        if (filesystem.size(root) or 0) > max_bytes:
            raise OSError(errno.EFBIG, f"it has more than {max_bytes / 2**20:.4g} MB", url)
        return bytes(filesystem.cat_file(root))


def write_path(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically, by its path or its address.

    Raises:
        OSError: it cannot be written.
        StorageError: as `open_folder`.
    """
    folder, _, name = os.fspath(path).rpartition("/") if is_url(path) else (Path(path).parent, "", Path(path).name)
    open_folder(folder).write(name, data)


def find_files(url: str) -> list[str]:
    """Names of all files below an address, sorted.

    Raises:
        OSError, StorageError: as `read_path`.
    """
    filesystem, root = _open(url)
    root = root.rstrip("/")
    with _os_errors(url):
        return [path.removeprefix(root).lstrip("/") for path in _find(filesystem, root)]


def _find(filesystem: Any, root: str, **limits: Any) -> list[str]:
    filesystem.invalidate_cache()  # other processes write, too
    return sorted(filesystem.find(root, **limits))


def _open(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs  # takes a moment to import, and few need it

    scheme = url.partition(":")[0]
    try:
        return url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        advice = f"pip install {package}" if package else _one_line(error)
        raise StorageError(
            f"{url}: addresses with {scheme}:// need a package that is not installed: {advice}"
        ) from error
    except ValueError as error:
        raise StorageError(f"{url}: expected a path or an address such as s3://bucket/folder; {error}") from error
    except Exception as error:  # each file system raises its own, if it looks for credentials at once
        raise StorageError(f"{url}: cannot be opened: {_one_line(error)}") from error


def _protocols(filesystem: Any) -> set[str]:
    protocol = filesystem.protocol
    return {protocol} if isinstance(protocol, str) else set(protocol)


@contextlib.contextmanager
def _os_errors(url: str) -> Iterator[None]:
    """Turn what a file system raises, of any class, into an OSError with `strerror` and `filename`."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from error
    except PermissionError as error:
        raise PermissionError(errno.EACCES, error.strerror or _one_line(error) or "Permission denied", url) from error
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or _one_line(error), url) from error
    except Exception as error:  # credentials, networks: each package has classes of its own
        raise OSError(errno.EIO, _one_line(error), url) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
