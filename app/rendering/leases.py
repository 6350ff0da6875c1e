"""Leases: which process generates which piece of a folder.

Any number of processes may render into one folder, even from several machines on a network file system. A lease is a
locked file. The operating system unlocks it when its process ends, however it ends, so a crash leaves nothing to clean
up. Lease files are empty, in a hidden folder. A remote folder has no locks: there, leases are between the processes of
one machine, in its cache.
"""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Self

import platformdirs
from filelock import FileLock, Timeout

from app.console import CommandError
from music_ar.storage import LocalFolder, open_folder

LEASES = ".leases"
_GUARD = "guard"


class Leases:
    """The leases that this process holds in one folder. As a context manager, releases all of them on exit.

    Args:
        folder: the output folder, a path or an address; created if it is missing.

    Raises:
        CommandError: the folder is not writable.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        written = open_folder(folder)
        if isinstance(written, LocalFolder):
            self._folder = written.path(LEASES)
        else:
            cache = platformdirs.user_cache_path("music-ar", appauthor=False)
            self._folder = cache / "leases" / hashlib.sha256(str(written).encode()).hexdigest()
        self._held: dict[str, FileLock] = {}
        # Held while a lease file is opened and locked, or deleted: nobody locks a file that is gone.
        self._guard = FileLock(self._folder / _GUARD)
        try:
            written.prepare()
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(
                f"cannot write in {folder}: {error.strerror}; choose another folder with --output"
            ) from error

    def acquire(self, piece: str) -> bool:
        """Lease a piece until `release` or the end of this process. Return False if another process holds it."""
        lock = FileLock(self._folder / hashlib.sha256(piece.encode()).hexdigest())
        try:
            with self._guard:
                lock.acquire(blocking=False)
        except Timeout:
            return False
        self._held[piece] = lock
        return True

    def release(self, piece: str) -> None:
        """Release a lease."""
        lock = self._held.pop(piece)
        with self._guard:
            with contextlib.suppress(OSError):  # Windows cannot delete an open file; there an empty one is left
                Path(lock.lock_file).unlink()
            lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for piece in list(self._held):
            self.release(piece)
