"""What the commands say: progress on standard error, tables of results on standard output."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

if TYPE_CHECKING:
    from music_ar.midi.performance import Performance


class CommandError(ValueError):
    """A command cannot be carried out as it was given; the message says what to change."""


class ProgressLine:
    """A bar with a text beside it; where standard error is no terminal, the text alone on a line now and then.

    Args:
        title: what is going on, before the first report.
        seconds_between_lines: without a terminal, how long to wait before the next line.
    """

    def __init__(self, title: str, *, seconds_between_lines: float = 5.0):
        self._console = Console(stderr=True)
        self._seconds_between_lines = seconds_between_lines
        self._next_line_s = time.monotonic()
        self._bar = Progress(
            BarColumn(bar_width=16),  # so that a training line fits in 80 columns
            TextColumn("{task.description}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=1.0)
        if not self._console.is_terminal:
            print(title, file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def report(self, share: float, text: str) -> None:
        """Shows that `share` (0..1) of the work is done, with `text` beside it."""
        self._bar.update(self._task, completed=share, description=text)
        now_s = time.monotonic()
        if not self._console.is_terminal and now_s >= self._next_line_s:
            print(text, file=sys.stderr, flush=True)
            self._next_line_s = now_s + self._seconds_between_lines

    def timed(self, text: str) -> Callable[[float], None]:
        """A function that shows a share of some work that begins now, with `text` and the time left."""
        began_s = time.monotonic()

        def report(share: float) -> None:
            left_s = (time.monotonic() - began_s) * (1 - share) / max(share, 1e-9)
            self.report(share, f"{text}, {clock(left_s)} left" if share > 0 else text)

        report(0.0)
        return report


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns to standard output, the first flush left, the others flush right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = [cell.ljust(width) if column == 0 else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(line, widths, strict=True))]  # fmt: skip
        print("  ".join(cells).rstrip())


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def check_writable(path: Path) -> None:
    """Finds out before the work, not after it, that a file cannot be written.

    Raises:
        CommandError: `path` is a folder, or lies in one that is missing or read-only.
    """
    if path.is_dir():
        raise CommandError(f"{path} is a folder; name the file to write")
    if not path.parent.is_dir():
        raise CommandError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise CommandError(f"cannot write {path}: the folder {path.parent} is read-only")


def read_performance(path: Path) -> "Performance":
    """`read_midi` with errors that name the file.

    Raises:
        CommandError: there is no such file, or it is not usable MIDI.
    """
    from music_ar.midi.io import read_midi
    from music_ar.midi.performance import MidiError

    if not path.is_file():
        raise CommandError(f"{path}: no such file")
    try:
        return read_midi(path)
    except MidiError as error:
        raise CommandError(f"{path}: {error}") from error
