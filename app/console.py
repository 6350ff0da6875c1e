"""What the commands share: option types, progress on standard error, tables on standard output, file checks."""

import dataclasses
import importlib.util
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from music_ar.cluster import AUTO
from music_ar.decoding.sampling import SamplingOptions
from music_ar.features.wish_options import Wishes
from music_ar.files import MAX_NAME_BYTES
from music_ar.ranges import check_ranges, shown
from music_ar.storage import is_url, open_folder

if TYPE_CHECKING:
    from music_ar.midi.performance import Performance

T = TypeVar("T")

SOME_FAILED = 3
"""Exit code of a command that did its work, except for some of many items: each of them has a line that says why."""

HOST_GONE = 4
"""Exit code of a run on many hosts that ended because another process did; it can be resumed."""

Sampling = tyro.conf.OmitArgPrefixes[SamplingOptions]
"""Type of a command's field `sampling: Sampling = SamplingOptions()`.

Every field of `SamplingOptions` becomes an option of the command (`--temperature`, `--top-k`, ...). `--help` shows them
as a group, with names, defaults and help texts from that class. Leave the field out of the command's docstring.
"""

Unset = Annotated[T | None, tyro.conf.arg(help_behavior_hint="")]
"""`prompt: Unset[Path] = None`: an option that may be left out, without "(default: None)" in `--help`.

The help text must say what happens if it is.
"""

_WISH_FIELDS = [
    (field.name, Unset[field.type] if field.default is None else field.type, field)
    for field in dataclasses.fields(Wishes)
]
_WishOptions = dataclasses.make_dataclass(
    "_WishOptions", _WISH_FIELDS, bases=(Wishes,), frozen=True, kw_only=True, namespace={"__doc__": Wishes.__doc__}
)
WishOptions = Annotated[Wishes, tyro.conf.OmitArgPrefixes, tyro.conf.arg(constructor=_WishOptions)]
"""Type of a command's field `wishes: WishOptions = Wishes()`: an option for each wish, as with `Sampling`."""

Layers = Annotated[
    Unset[int],
    tyro.conf.arg(
        help="number of layers of the model to use. Fewer is faster, for a model that was trained to stop early. "
        "Default: all."
    ),
]
Tolerance = Annotated[
    float,
    tyro.conf.arg(
        help="use fewer layers for an event where that is expected to cost fewer nats than this, such as 0.05. More is "
        "faster; 0 never does. For a model that was trained to stop early."
    ),
]
Choices = Annotated[
    int,
    tyro.conf.arg(
        help="generate each 8-second phrase this many times, and keep the one that recalls the opening most. Two take "
        "about twice as long as one."
    ),
]
Budget = Annotated[
    Unset[float],
    tyro.conf.arg(
        help="in place of the three, a share of the time that the best quality takes, such as 0.5; it takes the best "
        "setting that was measured for the model at that cost."
    ),
]


def _one_address(given: list[str]) -> str:
    if len(given) > 1:
        raise ValueError("expected at most one address")
    return given[0] if given else AUTO


Ray = Annotated[
    str | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[HOST:PORT]",
        instance_from_str=_one_address,
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda address: [address],
    ),
    tyro.conf.arg(help_behavior_hint=""),
]
"""`ray: Ray = None`: the option `--ray` with an address, or alone for the cluster that this machine is part of."""

STDIN = "-"
"""The argument that stands for standard input."""


class CommandError(ValueError):
    """A command cannot run as given; the message says what to change."""


def check_options(command: Any) -> None:
    """Check the options of a command or of a part of it. Call it in `__post_init__`.

    Raises:
        CommandError: an option is out of the range declared in its field (`music_ar.ranges`), or one for a path on this
            machine is an address.
    """
    check_ranges(command, CommandError, name=_option)
    for field, value in vars(command).items():
        if isinstance(value, Path) and _ADDRESS.match(str(value)) and not Path(value.parts[0]).exists():
            raise CommandError(f"{_option(field)} must be on this machine, got an address: {shown(str(value))}")


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""What is left of `s3://` at the start of a `Path`."""


class ProgressLine:
    """A progress bar with text. If standard error is not a terminal, only the text, printed every few seconds.

    Args:
        title: text to show before the first report.
        seconds_between_lines: minimum time between two lines if standard error is not a terminal.
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
        """Show the finished share of the work, 0..1, with `text` beside it."""
        self._bar.update(self._task, completed=share, description=text)
        now_s = time.monotonic()
        if not self._console.is_terminal and now_s >= self._next_line_s:
            print(text, file=sys.stderr, flush=True)
            self._next_line_s = now_s + self._seconds_between_lines

    def timed(self, text: str) -> Callable[[float], None]:
        """Start a task. The returned function reports its finished share, with `text` and the time left."""
        began_s = time.monotonic()

        def report(share: float) -> None:
            left_s = (time.monotonic() - began_s) * (1 - share) / max(share, 1e-9)
            self.report(share, f"{text}, {clock(left_s)} left" if share > 0 else text)

        self._bar.update(self._task, completed=0.0, description=text)
        return report


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns to standard output: the first left-aligned, the others right-aligned."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = [cell.ljust(width) if column == 0 else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(line, widths, strict=True))]  # fmt: skip
        print("  ".join(cells).rstrip())


def clock(seconds: float) -> str:
    """Format seconds as m:ss, or as h:mm:ss from one hour."""
    minutes, rest = divmod(math.floor(seconds + 0.5), 60)  # as the player in the browser rounds
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def check_packages(what: str, extra: str, *packages: str) -> None:
    """Check that the packages of an extra are installed, before anything else is done.

    Raises:
        CommandError: `what` needs one that is missing.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise CommandError(f"{what} needs {package}: pip install '.[{extra}]'")


def check_writable(path: str | Path) -> None:
    """Check that a file can be written, before the work instead of after it.

    Args:
        path: the file, or its address.

    Raises:
        OSError, StorageError: the address cannot be written.
        CommandError: `path` is a folder or its name is too long, or its folder is missing or read-only.
    """
    if is_url(path):
        open_folder(str(path).rpartition("/")[0]).prepare()
        return
    path = Path(path)
    length = len(os.fsencode(path.name))
    if length > MAX_NAME_BYTES:
        raise CommandError(f"a file's name must have at most {MAX_NAME_BYTES} bytes, got {length}: {shown(path.name)}")
    if path.is_dir():
        raise CommandError(f"cannot write {path}: it is a folder; name a file in it")
    if path.exists() and not path.is_file():  # it would be replaced
        raise CommandError(f"cannot write {path}: it is a pipe or a device; name a file")
    if not path.parent.is_dir():
        raise CommandError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise CommandError(f"cannot write {path}: the folder {path.parent} is read-only; choose another")


def read_performance(path: Path) -> "Performance":
    """Read a MIDI file, a pipe, or standard input (`STDIN`); errors name the file.

    Raises:
        CommandError: the file does not exist or is not usable MIDI.
    """
    from music_ar.midi.io import read_prompt
    from music_ar.midi.performance import MidiError

    is_stdin = str(path) == STDIN
    if not is_stdin and not path.exists():
        raise CommandError(f"{path}: no such file")
    try:
        return read_prompt(sys.stdin.buffer if is_stdin else path)
    except MidiError as error:
        raise CommandError(f"{'standard input' if is_stdin else path}: {error}") from error


def midi_files_at(path: Path) -> list[Path]:
    """The file, or the MIDI files in the folder.

    Raises:
        CommandError: the folder has none.
    """
    from music_ar.midi.folders import MIDI_EXTENSIONS, find_midi_files

    if not path.is_dir():
        return [path]
    found = [file for file in find_midi_files(path) if not file.is_fifo()]  # a pipe would wait for a writer
    if not found:
        raise CommandError(f"{path}: expected MIDI files ({', '.join(MIDI_EXTENSIONS)}) in it, found none")
    return found


def is_bad_input(error: Exception) -> bool:
    """Whether the user can fix it: an operating system error, or an error class of this project.

    A bare ValueError, or one of another library, is a bug.
    """
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("app", "data_pipeline", "music_ar")


def error_line(error: Exception) -> str:
    """Format an error as one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
