"""`Performance`: piano notes in seconds."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int32, Int64

from music_ar.midi.prompt_file import PromptFile


class MidiError(ValueError):
    """The input is not a usable MIDI file, or a note is invalid."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Performance:
    """Piano notes, sorted by (onset, pitch), as four read-only columns of equal length n.

    The constructor copies the columns, converts them to the types below, checks them, and sorts the notes (stably).

    Attributes:
        onset_s: `float64 [n]`, when each note begins, in seconds, >= 0.
        offset_s: `float64 [n]`, when it stops sounding, in seconds, > onset_s. The sustain pedal is included.
        pitch: `int32 [n]`, MIDI pitch, 0..127.
        velocity: `int32 [n]`, MIDI velocity, 1..127.
        prompt_file: the MIDI file that a generated piece continues, whose events `write_midi` keeps; None for others.
            It does not count in comparisons.

    Raises:
        MidiError: the columns differ in length, or a value is out of range.
    """

    onset_s: Float[np.ndarray, " n"]
    offset_s: Float[np.ndarray, " n"]
    pitch: Int[np.ndarray, " n"]
    velocity: Int[np.ndarray, " n"]
    prompt_file: PromptFile | None = None

    def __post_init__(self) -> None:
        onset_s = np.array(self.onset_s, np.float64)
        offset_s = np.array(self.offset_s, np.float64)
        pitch = np.array(self.pitch, np.int32)
        velocity = np.array(self.velocity, np.int32)
        columns = {"onset_s": onset_s, "offset_s": offset_s, "pitch": pitch, "velocity": velocity}
        _check_columns(columns)
        order = _note_order(onset_s, pitch)
        for name, column in columns.items():
            column = column[order]
            column.flags.writeable = False
            object.__setattr__(self, name, column)

    @classmethod
    def empty(cls) -> "Performance":
        """Return a performance without notes."""
        no_times, no_numbers = np.zeros(0), np.zeros(0, np.int32)
        return cls(onset_s=no_times, offset_s=no_times, pitch=no_numbers, velocity=no_numbers)

    def __len__(self) -> int:
        return len(self.pitch)

    def __eq__(self, other: object) -> bool:
        """Compare all four columns, bit for bit."""
        if not isinstance(other, Performance):
            return NotImplemented
        return (
            np.array_equal(self.onset_s, other.onset_s)
            and np.array_equal(self.offset_s, other.offset_s)
            and np.array_equal(self.pitch, other.pitch)
            and np.array_equal(self.velocity, other.velocity)
        )

    @property
    def duration_s(self) -> float:
        """When the last note ends, in seconds from time zero; 0 without notes."""
        return float(self.offset_s.max(initial=0.0))

    def select(self, kept: Bool[np.ndarray, " n"]) -> "Performance":
        """Return the notes where `kept` is true."""
        return Performance(
            onset_s=self.onset_s[kept],
            offset_s=self.offset_s[kept],
            pitch=self.pitch[kept],
            velocity=self.velocity[kept],
        )

    def shift(self, seconds: int | float) -> "Performance":
        """Return the same notes `seconds` later, or earlier if negative.

        Raises:
            MidiError: a note would begin before time zero.
        """
        return Performance(
            onset_s=self.onset_s + seconds,
            offset_s=self.offset_s + seconds,
            pitch=self.pitch,
            velocity=self.velocity,
        )

    def crop(self, start_s: int | float = 0, end_s: int | float = np.inf) -> "Performance":
        """Return the notes that begin in [start_s, end_s), timed from `start_s` and cut at `end_s`."""
        inside = self.select((self.onset_s >= start_s) & (self.onset_s < end_s))
        return Performance(
            onset_s=inside.onset_s - start_s,
            offset_s=np.minimum(inside.offset_s, end_s) - start_s,
            pitch=inside.pitch,
            velocity=inside.velocity,
            prompt_file=None if self.prompt_file is None else self.prompt_file.crop(start_s, end_s),
        )


def _note_order(onset_s: Float64[np.ndarray, " n"], pitch: Int32[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Return the order by (onset, pitch), as `lexsort` does, but several times faster on nearly sorted onsets."""
    by_time = np.argsort(onset_s, kind="stable")
    moment = np.cumsum(np.diff(onset_s[by_time], prepend=0.0) > 0)
    return by_time[np.argsort(moment * 128 + pitch[by_time], kind="stable")]


def _check_columns(columns: dict[str, np.ndarray]) -> None:
    shapes = {name: column.shape for name, column in columns.items()}
    if any(len(shape) != 1 for shape in shapes.values()) or len(set(shapes.values())) != 1:
        raise MidiError(f"the columns of a Performance must be one-dimensional and of equal length, got {shapes}")
    onset_s, offset_s = columns["onset_s"], columns["offset_s"]
    rules = {
        "onset_s must be finite and >= 0": np.isfinite(onset_s) & (onset_s >= 0),
        "offset_s must be finite and > onset_s": np.isfinite(offset_s) & (offset_s > onset_s),
        "pitch must be in 0..127": (columns["pitch"] >= 0) & (columns["pitch"] <= 127),
        "velocity must be in 1..127": (columns["velocity"] >= 1) & (columns["velocity"] <= 127),
    }
    for rule, holds in rules.items():
        if not holds.all():
            note = int(np.argmin(holds))
            values = {name: column[note].item() for name, column in columns.items()}
            raise MidiError(f"{rule}, but note {note} is {values}")
