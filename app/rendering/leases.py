"""Leases: which process generates which piece of a folder.

Any number of processes may render into one folder, also from several machines on a network file system. A lease is a
locked file, which the operating system unlocks when its process ends, however it ends: a crash leaves nothing to clean
up. The lease files are hidden in the folder and empty.
"""

import contextlib
import hashlib
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from app.console import CommandError

LEASES = ".leases"


class Leases:
    """The leases that this process holds in one folder. A context manager that gives all of them back.

    Args:
        folder: the output folder; created if it is missing.

    Raises:
        CommandError: the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self._folder = folder / LEASES
        self._held: dict[str, FileLock] = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(
                f"cannot write in {folder}: {error.strerror}; choose another folder with --output"
            ) from error

    def acquire(self, piece: str) -> bool:
        """Lease a piece until `release`, or the end of this process; False if someone else holds its lease."""
        lock = FileLock(self._folder / hashlib.sha256(piece.encode()).hexdigest())
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        self._held[piece] = lock
        return True

    def release(self, piece: str) -> None:
        """Give a lease back."""
        lock = self._held.pop(piece)
        with contextlib.suppress(OSError):  # Windows deletes no open file; an empty file stays there
            Path(lock.lock_file).unlink()
        lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for piece in list(self._held):
            self.release(piece)
