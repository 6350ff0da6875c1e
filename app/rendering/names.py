"""Names of pieces: that a file system accepts them, and that no two are the same to it.

Names of prompts are cut and cleaned. A name that a job asks for, and that would lead out of the folder or is too long,
is an error.
"""

import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from app.console import CommandError
from app.rendering.manifest import is_inside
from music_ar.ranges import shown

_MAX_PART_BYTES = 200  # leaves room for the number of a variation and an extension
_MAX_BYTES = 1000  # of all parts together
_HALF_CHARACTERS = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # the others stand for bytes that are not Unicode
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Names:
    """The names that are taken. File systems that fold case, or Unicode's two ways to write é, keep them apart."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def unique(self, name: str) -> str:
        """The name, numbered if it is taken."""
        unique, number = name, 1
        while _folded(unique) in self._taken:
            number += 1
            unique = f"{name}~{number}"
        self._taken.add(_folded(unique))
        return unique


def file_name(name: str) -> str:
    """A name that file systems accept: Unicode, and each part short enough.

    Raises:
        CommandError: the parts are too long together.
    """
    name = _HALF_CHARACTERS.sub("\ufffd", name)
    path = PurePath(os.fsencode(name).decode(errors="replace"))
    cut = PurePath(*(part.encode()[:_MAX_PART_BYTES].decode(errors="ignore") for part in path.parts)).as_posix()
    if len(cut.encode()) > _MAX_BYTES:
        raise CommandError(f"the name of a piece must have at most {_MAX_BYTES} bytes, got {shown(name)}")
    return cut


def job_name(job: Mapping[str, Any], number: int) -> str:
    """The name of a job's pieces: the name given, that of the prompt, or the job's number.

    Raises:
        CommandError: the name would lead out of the output folder, or no file can have it.
    """
    if "name" not in job:
        return PurePath(job["prompt"]).stem if "prompt" in job else f"job-{number:04}"
    name = job["name"]
    if not is_inside(name) or _CONTROL_CHARACTERS.search(name):
        raise CommandError(
            f"a job's name must be a relative path, without .. and control characters, got {shown(name)}"
        )
    return PurePath(name).as_posix()


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())
