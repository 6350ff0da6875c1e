"""Where the lines of a manifest are kept: appended to a file, or put one by one where files cannot grow."""

import contextlib
import hashlib
import os
from collections.abc import Iterator

from filelock import FileLock

from music_ar.storage import Folder, LocalFolder, RemoteFolder

MANIFEST = "manifest.jsonl"
_LOCK = ".manifest.lock"
_LINES = ".lines"


class LocalLines:
    """The file `manifest.jsonl` of a folder, to which several processes append."""

    def __init__(self, folder: LocalFolder):
        self._folder, self._path = folder, folder.path(MANIFEST)
        self._lock = FileLock(folder.path(_LOCK))

    def locked(self) -> contextlib.AbstractContextManager[object]:
        """Keep other processes from writing."""
        return self._lock

    def read(self) -> bytes:
        """All lines; the last may be half written."""
        try:
            return self._folder.read(MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            return b""

    def append(self, _name: str, line: bytes) -> None:
        """Add the line of a piece."""
        with self._lock, self._path.open("a+b") as file:
            file.seek(0)
            end = complete(file.read())
            file.truncate(end)  # drops the partial line of a killed process
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:  # a full disk: leave no partial line
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise

    def replace(self, lines: bytes) -> None:
        """Write all lines anew."""
        self._folder.write(MANIFEST, lines)


class RemoteLines:
    """`manifest.jsonl` of a remote folder, and until a run is over a hidden object for each line that it has added.

    One process at a time writes to a remote folder, so the lines are fetched once.
    """

    def __init__(self, folder: RemoteFolder):
        self._folder, self._lines = folder, b""
        with contextlib.suppress(FileNotFoundError):
            self._lines = folder.read(MANIFEST)
        self._added = set(folder.names(_LINES))
        self._lines += b"".join(folder.read(name) for name in sorted(self._added))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nothing, since no other process writes."""
        yield

    def read(self) -> bytes:
        """All lines."""
        return self._lines

    def append(self, name: str, line: bytes) -> None:
        """Add the line of a piece."""
        added = f"{_LINES}/{hashlib.sha256(name.encode()).hexdigest()}.json"
        self._folder.write(added, line)
        self._added.add(added)
        self._lines += line

    def replace(self, lines: bytes) -> None:
        """Write all lines anew, into the manifest."""
        self._folder.write(MANIFEST, lines)
        self._lines = lines
        while self._added:
            self._folder.remove(self._added.pop())


def open_lines(folder: Folder) -> LocalLines | RemoteLines:
    """The lines of a folder's manifest."""
    return RemoteLines(folder) if isinstance(folder, RemoteFolder) else LocalLines(folder)


def complete(data: bytes) -> int:
    """The length of the complete lines in `data`: a killed process may leave a partial line at the end."""
    return data.rfind(b"\n") + 1
