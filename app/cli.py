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
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import platformdirs
import tyro

from app.console import CommandError, ProgressLine, check_writable, clock, print_table
from music_ar.system import usable_cores

if TYPE_CHECKING:
    from music_ar.midi.io import Performance

# Each command with the line that `music-ar --help` says about it, and where it is found.
COMMANDS = {
    "prepare": ("MIDI files -> token shards to train on", "app.cli:Prepare"),
    "train": ("token shards -> a model", "app.commands.train:Train"),
    "evaluate": ("score a model, and report on the music it makes", "app.commands.evaluate:Evaluate"),
    "generate": ("a new piece, or the continuation of one, as MIDI", "app.cli:Generate"),
    "render": ("many pieces, unattended and resumable", "app.commands.render:Render"),
    "inspect": ("what we read in a MIDI file", "app.cli:Inspect"),
    "web": ("a page in the browser to play with", "app.commands.web:Web"),
    "bench": ("how fast this machine decodes", "app.commands.bench:Bench"),
}

_DECODING_COMMANDS = ("generate", "render", "web", "bench")
_MOST_CPU_DEVICES = 16  # as many as a batch has rows

PITCH_CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


class Command(Protocol):
    """What a command is: options in its fields, work in `run`."""

    def run(self) -> int | None:
        """Does the work and prints the result; returns the exit code if that is not 0."""
        ...


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Turns MIDI files into token shards and a manifest that `music-ar train` reads.

    Example: music-ar prepare --maestro maestro-v3.0.0-midi.zip --output data/maestro

    Attributes:
        output: folder to write.
        maestro: the official MAESTRO zip, or the folder that it unpacks to; its official splits are kept.
        midi: a folder or zip of your own MIDI files, dealt to splits by file name.
        validation: share of your own files for the validation split.
        test: share of your own files for the test split.
        seed: another number deals your own files otherwise.
        workers: processes; by default one a core.
    """

    output: Path
    maestro: Path | None = None
    midi: Path | None = None
    validation: float = 0.1
    test: float = 0.1
    seed: int = 0
    workers: int | None = None

    def __post_init__(self) -> None:
        if (self.maestro is None) == (self.midi is None):
            raise CommandError("give either --maestro or --midi")

    def run(self) -> None:
        """Writes the shards and prints a table of the splits."""
        from data_pipeline.prepare import prepare_maestro, prepare_midi

        if self.midi is None:
            assert self.maestro is not None
            manifest = prepare_maestro(self.maestro, self.output, workers=self.workers)
        else:
            manifest = prepare_midi(
                self.midi,
                self.output,
                validation=self.validation,
                test=self.test,
                seed=self.seed,
                workers=self.workers,
            )
        rows = [
            (split, f"{count.pieces:,}", f"{count.hours:,.2f}", f"{count.notes:,}", f"{count.tokens:,}")
            for split, count in manifest.splits.items()
        ]
        print_table(("split", "pieces", "hours", "notes", "tokens"), rows)


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Makes piano pieces, from nothing or going on from a prompt, and writes them as MIDI.

    Example: music-ar generate --output longer.mid --prompt mine.mid --prompt-seconds 20 --seconds 120 --latents auto

    Attributes:
        output: MIDI file to write. Several variations get a number before the ending: piece-1.mid, piece-2.mid, …
        prompt: MIDI file to go on from.
        prompt_seconds: how many seconds of the prompt to use, from its beginning; by default all.
        continuation_only: write what was made, without the prompt before it.
        seconds: how many seconds of music to make; a piece may end sooner.
        variations: how many pieces to make at once, with the seeds that follow `seed`.
        latents: the latent budget: fewer are faster, more are better; by default 1024, or what the model has. "auto"
            takes the most that keep `speed` on this machine.
        speed: with "auto", how many seconds of music to make in a second; by default 1.5.
        mode: how the window of latents goes on once it is full: sliding, or exact as in training.
        temperature: below 1 is more predictable, above 1 more daring; 0 takes the likeliest event each time.
        top_k: of each kind of event keep only so many of the likeliest; 0 keeps all.
        top_p: of each kind of event keep the likeliest that together have this share of it; 1 keeps all.
        min_p: keep only events at least this likely, relative to the likeliest of their kind; 0 keeps all.
        steadiness: from 0, not at all, to 1: how closely a piece keeps to the pitch classes and registers it has had so
            far, and to usual loudness and, the longer it is, its own.
        seed: the same seed gives the same piece; by default a new one, which is told.
        checkpoint: name of a shipped model, a folder, or a hub id (owner/name).
    """

    output: Path
    prompt: Path | None = None
    prompt_seconds: float | None = None
    continuation_only: bool = False
    seconds: float = 60.0
    variations: int = 1
    latents: int | Literal["auto"] | None = None
    speed: float | None = None
    mode: Literal["sliding", "exact"] = "sliding"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.97
    min_p: float = 0.0
    steadiness: float = 0.25
    seed: int | None = None
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        if self.prompt is None and (self.prompt_seconds is not None or self.continuation_only):
            raise CommandError("--prompt-seconds and --continuation-only need a --prompt")

    def run(self) -> None:
        """Writes the pieces and prints their length, the time they took and the seeds."""
        from music_ar import Generator, write_midi
        from music_ar.decoding.sampling import SamplingOptions

        check_writable(self.output)
        options = SamplingOptions.of(vars(self))
        prompt = None if self.prompt is None else read_performance(self.prompt)
        began_s, first_s, chunk = time.monotonic(), None, None
        with ProgressLine("loading the model") as line:
            generator = Generator.from_pretrained(self.checkpoint)
            composition = generator.compose(
                prompt,
                latents=self.latents,
                speed=self.speed,
                mode=self.mode,
                options=options,
                seed=self.seed,
                variations=self.variations,
                prompt_seconds=self.prompt_seconds,
                continuation_only=self.continuation_only,
            )
            for chunk in composition.stream(self.seconds):
                first_s = time.monotonic() - began_s if first_s is None else first_s
                line.report(
                    chunk.seconds_made / chunk.seconds_wanted,
                    f"{chunk.seconds_made:.1f} of {chunk.seconds_wanted:g} s of music, "
                    f"{chunk.tokens_per_s:.0f} tokens/s, {clock(chunk.eta_s)} left",
                )
        assert chunk is not None  # a stream has at least one chunk
        elapsed_s = time.monotonic() - began_s
        for number, (seed, piece) in enumerate(zip(chunk.seeds, chunk.performances, strict=True), start=1):
            path = self.output if len(chunk.seeds) == 1 else self.output.with_stem(f"{self.output.stem}-{number}")
            write_midi(piece, path)
            print(f"{path}: {len(piece)} notes, {piece.duration_s:.1f} s, seed {seed}")
        print(
            f"made {chunk.seconds_made:.1f} s of music in {elapsed_s:.1f} s, loading included: "
            f"{chunk.seconds_made / elapsed_s:.2f} times real time, first notes after {first_s:.1f} s, "
            f"{composition.latents} latents"
        )


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Prints what we read in a MIDI file, beside MAESTRO's figures; the sustain pedal is folded into the notes.

    Example: music-ar inspect mine.mid longer.mid --plot rolls.png

    Attributes:
        file: the MIDI file.
        other: another one, to set beside it.
        tokens: print its event tokens instead, one a line: time in seconds, id, meaning.
        plot: picture of the piano rolls to write, PNG, SVG or PDF; needs the extra `plot`.
        data: folder that `music-ar prepare` wrote, to look up the longest run of notes that stands in its train split.
    """

    file: tyro.conf.Positional[Path]
    other: tyro.conf.Positional[Path | None] = None
    tokens: bool = False
    plot: Path | None = None
    data: Path | None = None

    def __post_init__(self) -> None:
        if self.tokens and self.other is not None:
            raise CommandError("--tokens prints one file")

    def run(self) -> None:
        """Prints the summary or the tokens, and draws."""
        files = [self.file] if self.other is None else [self.file, self.other]
        if self.plot is not None:
            check_writable(self.plot)
        performances = [read_performance(file) for file in files]
        if self.tokens:
            for line in token_lines(performances[0]):
                print(line)
        else:
            columns = [summary(performance) for performance in performances]
            real = {name: maestro_figure(name) for name in columns[0]}
            header = ["", *(file.name for file in files), "MAESTRO: least / median / most"]
            print_table(header, [[name, *(column[name] for column in columns), real[name]] for name in columns[0]])
            if self.other is not None:
                print(f"notes in common  {common_notes(*performances)}")
            if self.data is not None:
                for file, line in zip(files, copied_runs(performances, self.data), strict=True):
                    print(f"{file.name}: {line}")
        if self.plot is not None:
            from app.report.piano_roll import draw

            draw([(str(file), piece) for file, piece in zip(files, performances, strict=True)], self.plot)


def summary(performance: "Performance") -> dict[str, str]:
    """The figures that `music-ar inspect` prints, by their names."""
    from music_ar.metrics.statistics import Statistics
    from music_ar.tokens.codec import encode

    figures = Statistics.of(performance)
    low, high = figures.lowest_pitch, figures.highest_pitch
    return {
        "notes": f"{figures.notes}",
        "length": f"{performance.duration_s:.2f} s ({clock(performance.duration_s)})",
        "first note at": f"{performance.onset_s[0]:.2f} s",
        "notes a second": f"{figures.notes_per_s:.2f}",
        "notes at once": f"{figures.mean_polyphony:.2f} on average",
        "lowest pitch": f"{pitch_name(low)} ({low})",
        "highest pitch": f"{pitch_name(high)} ({high})",
        "softest velocity": f"{figures.softest}",
        "median velocity": f"{figures.median_velocity:g}",
        "loudest velocity": f"{figures.loudest}",
        "longest silence": f"{figures.longest_silence_s:.2f} s",
        "event tokens": f"{len(encode(performance))}",
    }


def maestro_figure(name: str) -> str:
    """What a figure of `summary` is in the beginnings of real pieces, if that was measured."""
    from music_ar.metrics.statistics import MAESTRO

    fields = {
        "notes a second": "notes_per_s",
        "notes at once": "mean_polyphony",
        "lowest pitch": "lowest_pitch",
        "highest pitch": "highest_pitch",
        "softest velocity": "softest",
        "median velocity": "median_velocity",
        "loudest velocity": "loudest",
        "longest silence": "longest_silence_s",
    }
    return " / ".join(f"{value:g}" for value in MAESTRO[fields[name]]) if name in fields else ""


def common_notes(first: "Performance", second: "Performance") -> str:
    """How many notes begin in both at the same time (in steps of 10 ms) and pitch, and until when all do."""
    import numpy as np

    from music_ar.tokens.codec import quantize

    struck = [set(zip(quantize(p.onset_s).tolist(), p.pitch.tolist(), strict=True)) for p in (first, second)]
    both = struck[0] & struck[1]
    parting = min(struck[0] ^ struck[1], default=None)
    until = "throughout" if parting is None else f"and all until {np.round(parting[0] / 100, 2):.2f} s"
    return f"{len(both)} of {len(struck[0])} and {len(struck[1])}, {until}"


def copied_runs(performances: "Sequence[Performance]", data: Path) -> Iterator[str]:
    """Of each performance, its longest run of notes that stands in the train split, in any key and rhythm.

    It is told of all notes, and apart from those that only go on with a figure, as trills do.
    """
    from data_pipeline.loader import Pieces
    from music_ar.metrics.memorization import longest_runs
    from music_ar.tokens.codec import decode

    train = Pieces.open(data, "train")
    corpus = [decode(tokens) for tokens in train.tokens]
    for ways in zip(*(longest_runs(performances, corpus, figures=figures) for figures in (True, False)), strict=True):
        places = [f", in {train.records[run.source].name}" if run.notes else "" for run in ways]
        yield (
            f"{ways[0].notes} notes in a row stand in the training set{places[0]}; leaving out figures that go on, "
            f"{ways[1].notes} notes{places[1]}"
        )


def token_lines(performance: "Performance") -> Iterator[str]:
    """The event tokens of a performance, readably: time in seconds, id, meaning."""
    from music_ar.tokens.codec import STEPS_PER_SECOND, encode, event_steps

    tokens = encode(performance)
    for step, token in zip(event_steps(tokens), tokens, strict=True):
        yield f"{step / STEPS_PER_SECOND:9.2f}  {token:3}  {describe_token(int(token))}"


def describe_token(token: int) -> str:
    """What an event token says, such as "note-on 60 (C4)"."""
    from music_ar.tokens import codec

    if token < codec.NOTE_OFF:
        return f"note-on {token - codec.NOTE_ON} ({pitch_name(token - codec.NOTE_ON)})"
    if token < codec.TIME_SHIFT:
        return f"note-off {token - codec.NOTE_OFF} ({pitch_name(token - codec.NOTE_OFF)})"
    if token < codec.VELOCITY:
        return f"wait {(token - codec.TIME_SHIFT + 1) / codec.STEPS_PER_SECOND:.2f} s"
    return f"velocity {token - codec.VELOCITY + 1} of {codec.VELOCITY_BINS}"


def pitch_name(pitch: int) -> str:
    """The name of a MIDI pitch; 60 is C4."""
    return f"{PITCH_CLASSES[pitch % 12]}{pitch // 12 - 1}"


def read_performance(path: Path) -> "Performance":
    """`read_midi` with errors that name the file.

    Raises:
        CommandError: there is no such file, or it is not usable MIDI.
    """
    from music_ar.midi.io import MidiError, read_midi

    if not path.is_file():
        raise CommandError(f"{path}: no such file")
    try:
        return read_midi(path)
    except MidiError as error:
        raise CommandError(f"{path}: {error}") from error


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
