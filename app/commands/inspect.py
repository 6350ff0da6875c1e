"""The command `music-ar inspect`: what a MIDI file holds, beside MAESTRO's statistics."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from app.console import CommandError, check_writable, clock, print_table, read_performance

if TYPE_CHECKING:
    from music_ar.midi.performance import Performance

PITCH_CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


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
    from music_ar.tokens.codec import encode, event_steps
    from music_ar.tokens.vocabulary import STEPS_PER_SECOND

    tokens = encode(performance)
    for step, token in zip(event_steps(tokens), tokens, strict=True):
        yield f"{step / STEPS_PER_SECOND:9.2f}  {token:3}  {describe_token(int(token))}"


def describe_token(token: int) -> str:
    """What an event token says, such as "note-on 60 (C4)"."""
    from music_ar.tokens import vocabulary

    if token < vocabulary.NOTE_OFF:
        return f"note-on {token - vocabulary.NOTE_ON} ({pitch_name(token - vocabulary.NOTE_ON)})"
    if token < vocabulary.TIME_SHIFT:
        return f"note-off {token - vocabulary.NOTE_OFF} ({pitch_name(token - vocabulary.NOTE_OFF)})"
    if token < vocabulary.VELOCITY:
        return f"wait {(token - vocabulary.TIME_SHIFT + 1) / vocabulary.STEPS_PER_SECOND:.2f} s"
    return f"velocity {token - vocabulary.VELOCITY + 1} of {vocabulary.VELOCITY_BINS}"


def pitch_name(pitch: int) -> str:
    """The name of a MIDI pitch; 60 is C4."""
    return f"{PITCH_CLASSES[pitch % 12]}{pitch // 12 - 1}"
