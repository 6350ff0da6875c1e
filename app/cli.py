"""The command `music-ar`: prepare | train | evaluate | generate | render | inspect | web | bench.

A command is a frozen dataclass: its fields are the options, its `run` does the work. Only the command that is asked for
is loaded, and `run` imports what it needs when it needs it, so `music-ar --help` never waits for JAX.

Exit codes: 0 done, 2 wrong use or bad input (said on standard error, never a traceback), 3 some of many pieces failed,
1 our own failure.
"""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Protocol

import platformdirs
import tyro

from music_ar.system import usable_cores

if TYPE_CHECKING:
    pass

# Each command with the line that `music-ar --help` says about it, and where it is found.
COMMANDS = {
    "prepare": ("MIDI files -> token shards to train on", "app.commands.prepare:Prepare"),
    "train": ("token shards -> a model", "app.commands.train:Train"),
    "evaluate": ("score a model, and report on the music it makes", "app.commands.evaluate:Evaluate"),
    "generate": ("a new piece, or the continuation of one, as MIDI", "app.commands.generate:Generate"),
    "render": ("many pieces, unattended and resumable", "app.commands.render:Render"),
    "inspect": ("what we read in a MIDI file", "app.commands.inspect:Inspect"),
    "web": ("a page in the browser to play with", "app.commands.web:Web"),
    "bench": ("how fast this machine decodes", "app.commands.bench:Bench"),
}

_DECODING_COMMANDS = ("generate", "render", "web", "bench")
_MOST_CPU_DEVICES = 16  # as many as a batch has rows


class Command(Protocol):
    """What a command is: options in its fields, work in `run`."""

    def run(self) -> int | None:
        """Does the work and prints the result; returns the exit code if that is not 0."""
        ...


class _ShowVersion(argparse.Action):
    """Asks for the version only when it is to be shown: a bare copy of the code has none."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(metadata.version("music-ar"))
        parser.exit()


def parse(arguments: Sequence[str]) -> Command:
    """The command that the arguments ask for; loads that command only.

    Raises:
        SystemExit: with 0 after `--help` or `--version`, with 2 after saying what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="music-ar",
        description="Piano music with a long memory: Perceiver AR, MIDI in and MIDI out.",
        epilog="`music-ar COMMAND --help` shows the options of a command.",
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and stop")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, _) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    name = parser.parse_args(arguments[:1]).command
    if name in _DECODING_COMMANDS:  # rows of a batch are dealt to devices; JAX reads this when it is imported
        many = "render" in arguments[:2]  # or what `bench` is asked to time
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(cpu_devices(many_rows=many)))
    module, _, class_name = COMMANDS[name][1].partition(":")
    command = getattr(importlib.import_module(module), class_name)
    markers = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)
    return tyro.cli(command, prog=f"music-ar {name}", args=arguments[1:], config=markers)


def cpu_devices(*, many_rows: bool = False) -> int:
    """How many devices to make of the CPU for decoding; JAX, which this does not import, has to be told before it is.

    A step of few rows keeps about one core busy with JAX 0.10 and two with 0.12 (docs/decoding.md).
    """
    major, minor = map(int, metadata.version("jax").split(".")[:2])
    cores = 2 if (major, minor) >= (0, 12) and not many_rows else 1
    return max(1, min(_MOST_CPU_DEVICES, usable_cores() // cores))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; an error that is our own failure is left to propagate."""
    # What JAX compiles is kept for the next start. JAX reads this when it is imported, which is later.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", platformdirs.user_cache_dir("music-ar", appauthor=False))
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be no Unicode; standard error escapes them anyway
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return parse(sys.argv[1:] if arguments is None else arguments).run() or 0
    except BrokenPipeError:  # the reader of our output, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("music-ar: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if not is_bad_input(error):
            raise
        print(f"music-ar: {error_line(error)}", file=sys.stderr)
        return 2
    return 0


def is_bad_input(error: Exception) -> bool:
    """Whether the person at the keyboard can mend it: a file's fault, or one of the error classes of our own packages.

    Other libraries' ValueErrors are our bugs, and so is a bare ValueError.
    """
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("app", "data_pipeline", "music_ar")


def error_line(error: Exception) -> str:
    """An error as one plain line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
