"""The command `music-ar`, which has the commands of `COMMANDS`.

A command is a frozen dataclass: its fields are the options, its `run` does the work. Only the requested command is
imported, and it imports JAX only in `run`, so `--help` is quick.

Exit codes: 0 done; 2 wrong usage or bad input (one line on standard error, no traceback); 3 some of many items failed;
4 another host of the run is gone; 130 interrupted; 1 a bug.
"""

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Protocol

import tyro

from app.console import error_line, is_bad_input
from music_ar.system import keep_compiled_programs

# Name: (summary for `music-ar --help`, "module:class").
COMMANDS = {
    "prepare": ("turn MIDI files into a dataset of tokens", "app.commands.prepare:Prepare"),
    "train": ("train a model on a prepared dataset", "app.commands.train:Train"),
    "train-encoder": ("train a piece encoder, which compares music", "app.commands.train_encoder:TrainEncoder"),
    "evaluate": ("score a model and report on the music it generates", "app.commands.evaluate:Evaluate"),
    "generate": ("generate a piece, or continue one, as MIDI", "app.commands.generate:Generate"),
    "render": ("generate many pieces unattended; resumable", "app.commands.render:Render"),
    "inspect": ("summarize MIDI files", "app.commands.inspect:Inspect"),
    "similar": ("find the music of a dataset that is most like a MIDI file", "app.commands.similar:Similar"),
    "push": ("publish a model on the Hugging Face Hub", "app.commands.push:Push"),
    "web": ("open the web page", "app.commands.web:Web"),
    "bench": ("measure decoding speed on this machine", "app.commands.bench:Bench"),
}


class Command(Protocol):
    """A command: options in its fields, work in `run`.

    A command that decodes also has an attribute `many_rows`: whether it fills large batches. It decides how JAX is set
    up.
    """

    def run(self) -> int | None:
        """Do the work and print the result; return the exit code if it is not 0."""
        ...


class _ShowVersion(argparse.Action):
    """Looks up the version only when asked: a copy of the code that is not installed has none."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(metadata.version("music-ar"))
        parser.exit()


def parse(arguments: Sequence[str]) -> Command:
    """Build the command that the arguments name; import only that one.

    Raises:
        SystemExit: with code 0 after `--help` or `--version`; with code 2 after printing what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="music-ar",
        description="Generate long piano music: Perceiver AR, MIDI in and MIDI out.",
        epilog="`music-ar COMMAND --help` shows the options of a command.",
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, _) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    name = parser.parse_args(arguments[:1]).command
    module, _, class_name = COMMANDS[name][1].partition(":")
    command = getattr(importlib.import_module(module), class_name)
    markers = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)
    return tyro.cli(command, prog=f"music-ar {name}", args=arguments[1:], config=markers)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors that are bugs propagate."""
    keep_compiled_programs()
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may not be Unicode; standard error escapes them anyway
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        many_rows = getattr(command, "many_rows", None)
        if many_rows is not None:
            from music_ar.decoding import backend

            backend.prepare(many_rows=many_rows)
        with _termination_interrupts():
            return command.run() or 0
    except BrokenPipeError:  # whatever reads our output, `head` for example, has closed the pipe
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


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, so that it cleans up."""
    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
