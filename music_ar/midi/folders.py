"""MIDI files in folders: one rule for what is a MIDI file by its name."""

import os
from pathlib import Path, PurePosixPath

MIDI_EXTENSIONS = (".mid", ".midi", ".kar", ".rmi")
"""Endings of MIDI files, in any case; .kar is karaoke, .rmi is MIDI in a RIFF file."""


def is_hidden(name: str) -> bool:
    """Whether a file or a folder above it is hidden, such as ._copy.mid and __MACOSX of macOS.

    Args:
        name: relative path, with forward slashes.
    """
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def is_midi_name(name: str) -> bool:
    """Whether a file is a MIDI file by its name, and not hidden."""
    return name.lower().endswith(MIDI_EXTENSIONS) and not is_hidden(name)


def find_midi_files(folder: Path) -> list[Path]:
    """List the MIDI files in a folder and its subfolders, sorted. Among them may be pipes and broken links."""
    names = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sorted(path for path in names if is_midi_name(path.relative_to(folder).as_posix()) and not path.is_dir())
