"""What a folder of rendered pieces remembers: one line a piece in `manifest.jsonl`, and who is making which piece now.

Any number of processes may work in one folder. A claim on a piece is a lock on one byte of `.render.lock`; the system
lets go of it when its process ends, however it ends, so a crash leaves nothing to clean up. A piece is written under a
temporary name, renamed, and then gets its line: what has a line is complete.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from app.console import CommandError
from music_ar.files import write_atomically

MANIFEST, LOCKS = "manifest.jsonl", ".render.lock"
_MANIFEST_BYTE = 0

Line = dict[str, Any]


class Ledger:
    """The manifest and the claims of one folder.

    Args:
        folder: made if it is missing.
        look_only: make and claim nothing.

    Raises:
        CommandError: the folder cannot be written, or its manifest is not ours.
    """

    def __init__(self, folder: Path, *, look_only: bool = False):
        self.folder = folder
        self._manifest = folder / MANIFEST
        self._locks = -1
        try:
            if not look_only:
                folder.mkdir(parents=True, exist_ok=True)
                self._locks = os.open(folder / LOCKS, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CommandError(
                f"cannot write in {folder}: {error.strerror}; name a folder of your own with --output"
            ) from error
        self.lines: dict[str, Line] = {}
        self._read_bytes, self._read_inode = 0, -1
        self.read()

    def close(self) -> None:
        """Lets go of all claims."""
        if self._locks >= 0:
            os.close(self._locks)

    def read(self) -> None:
        """Takes in the lines that were added since, by whoever. The last line of a piece counts.

        Raises:
            CommandError: a line is damaged.
        """
        try:
            with self._manifest.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._read_inode:  # new, or another process has put it in order
                    self._read_bytes, self._read_inode = 0, inode
                file.seek(self._read_bytes)
                new = file.read()
        except FileNotFoundError:
            return
        whole = new[: new.rfind(b"\n") + 1]  # a torn last line was being written when its process was killed
        for text in whole.splitlines():
            try:
                line = json.loads(text)
                self.lines[line["file"]] = line
            except (ValueError, TypeError, KeyError) as error:
                raise CommandError(
                    f"{self._manifest} has a line that is no piece's: {text[:60]!r}; mend it or move it away"
                ) from error
        self._read_bytes += len(whole)

    def claim(self, name: str) -> bool:
        """Whether this process may make the piece now; what is claimed stays so until `release` or the process ends."""
        return _lock_byte(self._locks, _byte_of(name), wait=False)

    def release(self, name: str) -> None:
        """Gives a claim back."""
        _unlock_byte(self._locks, _byte_of(name))

    def write(self, name: str, data: bytes) -> None:
        """Writes a file of a claimed piece: it is there whole or not at all."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Always under the same name, so that what a killed process left is written over and nothing piles up.
        write_atomically(path, data, part=path.with_name(f".part.{path.name}"))

    def add(self, line: Line) -> None:
        """Adds a piece's line to the manifest."""
        data = _encoded(line)
        with self._alone(), self._manifest.open("a+b") as file:
            file.seek(0)
            torn = len(old := file.read()) - (old.rfind(b"\n") + 1)
            if torn:
                file.truncate(len(old) - torn)
            start = file.seek(0, os.SEEK_END)
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            except OSError:  # a full disk: leave no half line
                with contextlib.suppress(OSError):
                    file.truncate(start)
                raise
        self.lines[line["file"]] = line

    def rewrite(self, order: Sequence[str], changes: dict[str, Line]) -> None:
        """Puts the lines in order, one a piece, so that the manifest does not tell in which order pieces were finished.

        Args:
            order: the planned pieces; others come after them, by name.
            changes: fields to set, by piece.
        """
        with self._alone():
            self._read_bytes = 0
            self.read()
            places = {name: place for place, name in enumerate(order)}
            names = sorted(self.lines, key=lambda name: (places.get(name, len(places)), name))
            for name in names:
                self.lines[name] |= changes.get(name, {})
            self.write(MANIFEST, b"".join(_encoded(self.lines[name]) for name in names))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        _lock_byte(self._locks, _MANIFEST_BYTE, wait=True)
        try:
            yield
        finally:
            _unlock_byte(self._locks, _MANIFEST_BYTE)


def sha256(data: bytes) -> str:
    """The hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str | None:
    """The SHA-256 of a file, or None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):  # ValueError: a path with a null character
        return None


def _encoded(line: Line) -> bytes:
    """A line of the manifest. What is no Unicode in a prompt's name gets JSON's own escapes."""
    return json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _byte_of(name: str) -> int:
    """The byte that stands for a piece; by a rare collision two pieces would not be made at the same time, no more."""
    return 1 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % 2**30


if sys.platform == "win32":
    import msvcrt

    def _lock_byte(file: int, position: int, *, wait: bool) -> bool:
        os.lseek(file, position, os.SEEK_SET)
        while True:
            try:
                msvcrt.locking(file, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            except OSError:
                if not wait:
                    return False
            else:
                return True

    def _unlock_byte(file: int, position: int) -> None:
        os.lseek(file, position, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock_byte(file: int, position: int, *, wait: bool) -> bool:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, position)
        except BlockingIOError:
            return False
        except PermissionError:  # how some systems say that another has it
            return False
        return True

    def _unlock_byte(file: int, position: int) -> None:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, position)
