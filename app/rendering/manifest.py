"""The manifest of a rendered folder: `manifest.jsonl`, one line per piece.

A piece is written atomically and only then added to the manifest. So every piece with a line is complete.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from app.console import CommandError
from app.rendering.lines import MANIFEST, complete, open_lines
from music_ar.decoding.request import Request
from music_ar.decoding.sampling import SamplingOptions
from music_ar.files import parse_json
from music_ar.ranges import shown
from music_ar.storage import open_folder

_TEXT, _NUMBER = str | None, int | float | None
_FIELDS = {  # that are read again
    "file": str,
    "prompt_sha256": _TEXT,
    "seed": int,
    "settings": dict,
    "model": dict,
    "score": _NUMBER,
    "status": str,
    "sha256": _TEXT,
    "audio": _TEXT,
}

Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Output:
    """The planned piece of a request: the request's tag.

    Attributes:
        file: MIDI file to write, relative to the output folder.
        prompt: the prompt as given; None generates a piece from scratch.
        prompt_sha256: hash of the prompt's bytes; None if it cannot be read, which makes the request fail later.
        settings: everything the music depends on apart from prompt, seed and model.
        model: the model's identity.
        group: name shared by the variations of which --keep-best keeps the best.
        error: why the piece cannot be generated, if that is known before the work.
    """

    file: str
    prompt: str | None
    prompt_sha256: str | None
    settings: dict[str, Any]
    model: dict[str, Any]
    group: str
    error: str | None = None


class Manifest:
    """The lines of a folder's manifest, shared with other processes.

    Args:
        folder: the output folder, a path or an address. It need not exist until something is written.

    Attributes:
        folder: the output folder.
        lines: the last line of each piece, by file.

    Raises:
        CommandError: a line is damaged.
        StorageError: the address of the folder cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = open_folder(folder)
        self.lines: dict[str, Line] = {}
        self._stored = open_lines(self.folder)
        self._read = b""
        self.read()

    def read(self) -> None:
        """Read the lines that any process has added or changed since the last call.

        Only the bytes tell whether the file has grown or was rewritten: an inode is used again once it is free.

        Raises:
            CommandError: a line is damaged.
        """
        data = self._stored.read()
        whole = data[: complete(data)]
        if not whole.startswith(self._read):
            self.lines.clear()
            self._read = b""
        added, before = whole[len(self._read) :], self._read.count(b"\n")
        for number, text in enumerate(added.split(b"\n")[:-1], start=before + 1):
            line = self._parsed(text, number)
            self.lines[line["file"]] = line
        self._read = whole

    def _parsed(self, text: bytes, number: int) -> Line:
        try:
            line = parse_json(text)
            _check(line)
        except ValueError as error:
            found = shown(text.decode(errors="replace"))
            raise CommandError(
                f"{self.folder.path(MANIFEST)}:{number} is not a record of a piece: {found}; fix or remove the file"
            ) from error
        return line

    def write(self, name: str, data: bytes) -> str:
        """Write a file of the folder atomically, for a piece that this process has leased. Returns its SHA-256."""
        self.folder.write(name, data)
        return hashlib.sha256(data).hexdigest()

    def add(self, line: Line) -> None:
        """Append the line of a piece."""
        self._stored.append(line["file"], _encode(line))
        self.lines[line["file"]] = line

    def rewrite(self, order: Sequence[str], changes: Mapping[str, Line]) -> None:
        """Sort the lines, one per piece, so that the manifest does not depend on the order of completion.

        Args:
            order: files of the planned pieces. Any others follow, by name.
            changes: fields to set, by file.
        """
        with self._stored.locked():
            self.read()
            places = {name: place for place, name in enumerate(order)}
            names = sorted(self.lines, key=lambda name: (places.get(name, len(places)), name))
            for name in names:
                self.lines[name] |= changes.get(name, {})
            self._stored.replace(b"".join(_encode(self.lines[name]) for name in names))

    def is_complete(self, request: Request) -> bool:
        """Whether the piece exists as requested, unchanged. A piece dropped by `keep_best` counts as complete."""
        line = self.lines.get(request.tag.file)
        if line is None or line["status"] == "failed" or changed_settings(line, request):
            return False
        if line["status"] == "dropped":
            return True
        audio = line.get("audio")
        has_audio = audio is None or self.folder.exists(audio)
        return has_audio and self._sha256(line["file"]) == line["sha256"]

    def _sha256(self, name: str) -> str | None:
        """The hexadecimal SHA-256 of a file, or None if it cannot be read."""
        try:
            return hashlib.sha256(self.folder.read(name)).hexdigest()
        except OSError:
            return None

    def check_unchanged(self, requests: Sequence[Request]) -> None:
        """Raise `CommandError` if an existing piece was generated with other settings."""
        for request in requests:
            line = self.lines.get(request.tag.file)
            changes = [] if line is None or line["status"] == "failed" else changed_settings(line, request)
            if changes:
                raise CommandError(
                    f"{self.folder.path(request.tag.file)} was generated with other settings ({'; '.join(changes)}): "
                    "use the same settings or another folder, or replace it with --overwrite"
                )


def planned_line(request: Request) -> Line:
    """The line of a piece before it is generated."""
    output: Output = request.tag
    return {
        "file": output.file,
        "prompt": output.prompt,
        "prompt_sha256": output.prompt_sha256,
        "seed": request.seed,
        "settings": output.settings,
        "model": output.model,
        "tokens": None,
        "seconds": None,
        "nats_per_token": None,
        "score": None,
        "status": "planned",
        "error": None,
        "sha256": None,
    }


def changed_settings(line: Line, request: Request) -> list[str]:
    """Describe how the settings of an existing piece differ from those requested now."""

    def flat(line: Line) -> dict[str, Any]:
        return line["settings"] | {name: line[name] for name in ("seed", "prompt_sha256")} | line["model"]

    # An older version that did not have a sampling option generated as its default does.
    was, now = dataclasses.asdict(SamplingOptions()) | flat(line), flat(planned_line(request))
    if was.get("mode") == "sliding":  # an option until 0.2.0; this value is the only one now
        del was["mode"]
    if request.tag.prompt is not None and now["prompt_sha256"] is None:  # the prompt is gone, the piece is not
        del was["prompt_sha256"], now["prompt_sha256"]
    names = [name for name in dict.fromkeys((*was, *now)) if was.get(name) != now.get(name)]
    return [f"{name} was {was.get(name)}, is {now.get(name)}" for name in names]


def is_inside(name: str) -> bool:
    """Whether a relative path stays in its folder."""
    path = PurePath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name and bool(path.name.strip())


def _check(line: Any) -> None:
    """Raise ValueError unless this is a line that `planned_line` began."""
    if not isinstance(line, dict):
        raise ValueError("not an object")
    if not all(isinstance(line.get(name), kind) for name, kind in _FIELDS.items()):
        raise ValueError("a field is missing or of another type")
    if not all(is_inside(name) for name in (line["file"], line.get("audio") or line["file"])):
        raise ValueError("a file outside of the folder")


def _encode(line: Line) -> bytes:
    """Encode a line. Bytes of a prompt's name that are not Unicode become JSON escapes."""
    return json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
