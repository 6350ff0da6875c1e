"""The command `music-ar inspect`: summarize MIDI files next to real piano music."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from app.console import (
    SOME_FAILED,
    STDIN,
    CommandError,
    Unset,
    check_writable,
    clock,
    midi_files_at,
    print_table,
    read_performance,
)

if TYPE_CHECKING:
    from music_ar.midi.performance import Performance

PITCH_CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")

# Rows of the summary that were also measured on MAESTRO, and the fields of `Statistics` that they show.
_MAESTRO_FIELDS = {
    "notes per second": "notes_per_s",
    "mean polyphony": "mean_polyphony",
    "lowest pitch": "lowest_pitch",
    "highest pitch": "highest_pitch",
    "lowest velocity": "softest",
    "median velocity": "median_velocity",
    "highest velocity": "loudest",
    "longest silence": "longest_silence_s",
}


_MOST_ROLLS = 12
_LIST_HEADER = f"{'notes':>7}  {'length':>8}  notes/s  polyphony  {'pitches':>9}  velocity  file"


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Print statistics of MIDI files; of one or two next to MAESTRO's. The sustain pedal is folded into the notes.

    Example: music-ar inspect mine.mid longer.mid --plot rolls.png

    Attributes:
        files: MIDI files, pipes, "-" for standard input, or folders. Two files are compared with each other. More, and
            those in folders, have a line each; so has a file that cannot be read, and the exit code is then 3.
        tokens: print the event tokens instead, one per line: time in seconds, id, meaning.
        plot: draw the piano rolls to this PNG, SVG or PDF file; needs the extra `plot`.
        data: dataset written by `music-ar prepare`: a folder, or its address (s3://bucket/data, gs://...). Also print
            the longest run of notes that each file shares with its training split, in any key and rhythm: a check for
            memorization.
    """

    files: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILE [FILE ...]", help_behavior_hint="")
    ]
    tokens: bool = False
    plot: Unset[Path] = None
    data: Annotated[Unset[str], tyro.conf.arg(metavar="FOLDER")] = None

    def __post_init__(self) -> None:
        if not self.files:
            raise CommandError("expected a MIDI file, a folder, or - for standard input")
        if self.tokens and len(self.files) > 1:
            raise CommandError(f"--tokens takes one file, got {len(self.files)}; inspect them one at a time")
        if any(file.is_dir() for file in self.files) and (self.tokens or self.plot is not None):
            raise CommandError("--tokens and --plot take files, got a folder; name files in it")
        if self.plot is not None and len(self.files) > _MOST_ROLLS:
            raise CommandError(f"--plot draws at most {_MOST_ROLLS} files, got {len(self.files)}")
        if sum(str(file) == STDIN for file in self.files) > 1:
            raise CommandError("standard input (-) can be read only once")

    def run(self) -> int:
        """Print the summary, the list or the tokens, and draw the piano rolls; return the exit code."""
        if self.plot is not None:
            check_writable(self.plot)
        if len(self.files) > 2 or any(file.is_dir() for file in self.files):
            pieces, failed = self._print_list()
        else:
            pieces, failed = [(file, read_performance(file)) for file in self.files], 0
            self._print_pieces(pieces)
        if self.data is not None and pieces:
            for (file, _), line in zip(pieces, shared_runs([piece for _, piece in pieces], self.data), strict=True):
                print(f"{file.name}: {line}")
        if self.plot is not None and pieces:
            from app.report.piano_roll import draw

            draw([(str(file), piece) for file, piece in pieces], self.plot)
        return SOME_FAILED if failed else 0

    def _print_list(self) -> "tuple[list[tuple[Path, Performance]], int]":
        """Print a line a file; return the pieces if they are needed, and how many files cannot be read."""
        files = [found for file in self.files for found in midi_files_at(file)]
        are_needed = self.data is not None or self.plot is not None
        pieces, failed = [], 0
        print(_LIST_HEADER)
        for file in files:
            try:
                piece = read_performance(file)
            except CommandError as error:
                failed += 1
                print(f"cannot be read: {error}")
            else:
                print(list_line(file, piece), flush=True)
                pieces += [(file, piece)] if are_needed else []
        if len(files) > 1:
            print(f"{len(files)} files" + (f", of which {failed} cannot be read" if failed else ""))
        return pieces, failed

    def _print_pieces(self, pieces: "Sequence[tuple[Path, Performance]]") -> None:
        if self.tokens:
            for line in token_lines(pieces[0][1]):
                print(line)
            return
        columns = [summary(piece) for _, piece in pieces]
        header = ["", *(file.name for file, _ in pieces), "MAESTRO: min / median / max"]
        print_table(header, [[name, *(column[name] for column in columns), maestro_range(name)] for name in columns[0]])
        if len(pieces) == 2:
            print(f"notes in common  {common_notes(pieces[0][1], pieces[1][1])}")


def list_line(file: Path, performance: "Performance") -> str:
    """One line about a performance, in the columns of the list."""
    from music_ar.metrics.statistics import Statistics

    measured = Statistics.of(performance)
    pitches = f"{pitch_name(measured.lowest_pitch)}-{pitch_name(measured.highest_pitch)}"
    return (
        f"{measured.notes:7}  {clock(performance.duration_s):>8}  {measured.notes_per_s:7.1f}  "
        f"{measured.mean_polyphony:9.1f}  {pitches:>9}  {measured.median_velocity:8g}  {file}"
    )


def summary(performance: "Performance") -> dict[str, str]:
    """What `music-ar inspect` prints about a performance, as name -> value."""
    from music_ar.metrics.statistics import Statistics
    from music_ar.tokens.codec import encode

    measured = Statistics.of(performance)
    return {
        "notes": f"{measured.notes}",
        "length": f"{performance.duration_s:.2f} s ({clock(performance.duration_s)})",
        "first onset": f"{performance.onset_s[0]:.2f} s",
        "notes per second": f"{measured.notes_per_s:.2f}",
        "mean polyphony": f"{measured.mean_polyphony:.2f}",
        "lowest pitch": f"{pitch_name(measured.lowest_pitch)} ({measured.lowest_pitch})",
        "highest pitch": f"{pitch_name(measured.highest_pitch)} ({measured.highest_pitch})",
        "lowest velocity": f"{measured.softest}",
        "median velocity": f"{measured.median_velocity:g}",
        "highest velocity": f"{measured.loudest}",
        "longest silence": f"{measured.longest_silence_s:.2f} s",
        "event tokens": f"{len(encode(performance))}",
    }


def maestro_range(name: str) -> str:
    """Minimum, median and maximum of a row of the summary over MAESTRO; empty if it was not measured."""
    from music_ar.metrics.statistics import MAESTRO

    field = _MAESTRO_FIELDS.get(name)
    return "" if field is None else " / ".join(f"{value:g}" for value in MAESTRO[field])


def common_notes(first: "Performance", second: "Performance") -> str:
    """Count the notes with the same onset (in steps of 10 ms) and pitch, and find the first that differs."""
    from music_ar.tokens.codec import quantize
    from music_ar.tokens.vocabulary import STEPS_PER_SECOND

    notes = [set(zip(quantize(p.onset_s).tolist(), p.pitch.tolist(), strict=True)) for p in (first, second)]
    common = notes[0] & notes[1]
    difference = min(notes[0] ^ notes[1], default=None)
    where = "no difference" if difference is None else f"first difference at {difference[0] / STEPS_PER_SECOND:.2f} s"
    return f"{len(common)} of {len(notes[0])} and {len(notes[1])}, {where}"


def shared_runs(performances: "Sequence[Performance]", data: str) -> Iterator[str]:
    """Describe each performance's longest run of notes shared with the training split, in any key and rhythm.

    Counted over all notes, and again without repeated patterns such as trills and scales, which much music shares.
    """
    from data_pipeline.dataset import Pieces
    from music_ar.metrics.memorization import longest_shared_runs
    from music_ar.tokens.codec import decode

    train = Pieces.open(data, "train")
    corpus = [decode(tokens) for tokens in train.tokens]
    counts = (longest_shared_runs(performances, corpus, repeated_patterns=counted) for counted in (True, False))
    for runs in zip(*counts, strict=True):
        sources = [f" (in {train.records[run.source].name})" if run.notes else "" for run in runs]
        yield (
            f"longest run of notes shared with the training split: {runs[0].notes}{sources[0]}; "
            f"without repeated patterns: {runs[1].notes}{sources[1]}"
        )


def token_lines(performance: "Performance") -> Iterator[str]:
    """The event tokens of a performance as text: time in seconds, id, meaning."""
    from music_ar.tokens.codec import encode, event_steps
    from music_ar.tokens.vocabulary import STEPS_PER_SECOND

    tokens = encode(performance)
    for step, token in zip(event_steps(tokens), tokens, strict=True):
        yield f"{step / STEPS_PER_SECOND:9.2f}  {token:3}  {describe_token(int(token))}"


def describe_token(token: int) -> str:
    """The meaning of an event token, such as "note-on 60 (C4)"."""
    from music_ar.tokens import vocabulary

    if token < vocabulary.NOTE_OFF:
        return f"note-on {token - vocabulary.NOTE_ON} ({pitch_name(token - vocabulary.NOTE_ON)})"
    if token < vocabulary.TIME_SHIFT:
        return f"note-off {token - vocabulary.NOTE_OFF} ({pitch_name(token - vocabulary.NOTE_OFF)})"
    if token < vocabulary.VELOCITY:
        return f"time shift {(token - vocabulary.TIME_SHIFT + 1) / vocabulary.STEPS_PER_SECOND:.2f} s"
    return f"velocity {token - vocabulary.VELOCITY + 1} of {vocabulary.VELOCITY_BINS}"


def pitch_name(pitch: int) -> str:
    """The name of a MIDI pitch; 60 is C4."""
    return f"{PITCH_CLASSES[pitch % 12]}{pitch // 12 - 1}"
