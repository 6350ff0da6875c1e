"""MIDI bytes <-> `Performance`.

symusic parses the files, but its clock is not used: ticks are converted to seconds by the same float64 operations as in
pretty_midi 0.2, through which note-seq reads. A difference in the last bit of a time can move an event by one 10 ms
step.
"""

import io
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float64, Int8, Int64
from symusic.core import NoteTickList, ScoreTick, TempoTick, TrackTick

from music_ar.files import write_atomically
from music_ar.midi.continuation import continued
from music_ar.midi.performance import MidiError, Performance
from music_ar.midi.prompt_file import PromptFile
from music_ar.midi.smf import NEVER_TICK, normalize
from music_ar.midi.sustain import PEDAL_DOWN_VALUE, SUSTAIN_CONTROLLER, Instrument, merge
from music_ar.midi.tracks import PIANO_CHANNELS, TickNotes, piano_file
from music_ar.midi.voices import voices

# To type checkers `io.BytesIO` is a BinaryIO; at run time it lacks some of its methods.
BinaryFile = BinaryIO | io.BufferedIOBase

MAX_BYTES = 16 * 2**20
MAX_NOTES = 1_000_000
MAX_SECONDS = 6 * 3600.0

MICROSECONDS_PER_QUARTER = 500_000
"""Tempo of written files, and of files that set none: 120 quarter notes per minute."""
TICKS_PER_QUARTER = 1000
"""Resolution of written files: a tick is 0.5 ms, so the 10 ms grid of the event tokens falls exactly on ticks."""
TICKS_PER_SECOND = TICKS_PER_QUARTER * 1_000_000 // MICROSECONDS_PER_QUARTER
ACOUSTIC_GRAND_PIANO = 0

_MAX_WRITTEN_TICKS = 2**28
_SAME_TIME_S = 0.01


def read_midi(
    source: str | os.PathLike[str] | bytes | BinaryFile,
    *,
    max_bytes: int = MAX_BYTES,
    max_notes: int = MAX_NOTES,
    max_seconds: int | float = MAX_SECONDS,
) -> Performance:
    """Read the piano performance in a MIDI file.

    Accepts formats 0 and 1, any number of tracks, tempo changes and SMPTE time. Drums (channel 10) are dropped; all
    other instruments become piano. As in note-seq, the sustain pedal acts on the notes of its own track, channel and
    program, and a note without a note-off is dropped, since its length is unknown.

    Args:
        source: a path, the bytes themselves, or an open binary file.
        max_bytes: size of the largest accepted file.
        max_notes: largest accepted number of notes, not counting drums.
        max_seconds: latest accepted end of a note.

    Raises:
        MidiError: `source` is not a usable MIDI file, or exceeds a limit. Nothing else is raised.
    """
    midi, fixed_tick_s = normalize(_read_bytes(source, max_bytes))
    try:
        score = ScoreTick.from_midi(midi)
    except Exception as error:  # symusic raises several types
        raise MidiError(f"the MIDI events cannot be parsed: {error}") from error
    note_count = sum(len(track.notes) for track in score.tracks if not track.is_drum)
    if note_count > max_notes:
        raise MidiError(
            f"at most {max_notes} notes are accepted, but the file has {note_count}; raise max_notes or cut the file"
        )
    clock = _Clock.of_tempos(score) if fixed_tick_s is None else _Clock.constant(fixed_tick_s)
    performance = merge([_read_instrument(track, clock) for track in score.tracks])
    if not len(performance):
        raise MidiError("the MIDI file has no notes for a piano (drums do not count)")
    if performance.duration_s > max_seconds:
        raise MidiError(
            f"at most {max_seconds:g} s are accepted, but the last note ends at {performance.duration_s:.1f} s; "
            "raise max_seconds or cut the file"
        )
    return performance


def read_prompt(source: str | os.PathLike[str] | bytes | BinaryFile, **limits: Any) -> Performance:
    """Read a MIDI file as `read_midi` does, so that `write_midi` keeps its events in a piece that continues it.

    Args:
        source: a path, the bytes themselves, or an open binary file.
        limits: those of `read_midi`.

    Raises:
        MidiError: as `read_midi`.
    """
    data = _read_bytes(source, limits.get("max_bytes", MAX_BYTES))
    return replace(read_midi(data, **limits), prompt_file=PromptFile(midi=data))


def _read_bytes(source: str | os.PathLike[str] | bytes | BinaryFile, max_bytes: int) -> bytes:
    if isinstance(source, bytes):
        data = source
    elif isinstance(source, str | os.PathLike):
        try:
            with Path(source).open("rb") as file:
                data = file.read(max_bytes + 1)
        except (OSError, ValueError) as error:  # ValueError: a null character in the path
            why = error.strerror if isinstance(error, OSError) else error
            raise MidiError(f"cannot read {os.fspath(source)!r}: {why}") from error
    else:
        try:
            data = source.read(max_bytes + 1)
        except Exception as error:
            raise MidiError(f"cannot read from {source!r}: {error}") from error
    if not isinstance(data, bytes):
        raise MidiError(f"expected bytes, got {type(data).__name__}; open the MIDI file in binary mode")
    if not data:
        raise MidiError("the file is empty")
    if len(data) > max_bytes:
        raise MidiError(f"expected at most {max_bytes} bytes, but the file has more; raise max_bytes if it is music")
    return data


@dataclass(frozen=True, kw_only=True)
class _Clock:
    """Ticks -> seconds. From `tick[k]`, which is at `start_s[k]`, each tick lasts `tick_s[k]` seconds."""

    tick: Int64[np.ndarray, " k"]
    start_s: Float64[np.ndarray, " k"]
    tick_s: Float64[np.ndarray, " k"]

    @classmethod
    def constant(cls, tick_s: float) -> "_Clock":
        return cls(tick=np.zeros(1, np.int64), start_s=np.zeros(1), tick_s=np.array([tick_s]))

    @classmethod
    def of_tempos(cls, score: ScoreTick) -> "_Clock":
        """Build pretty_midi's clock: the same products and sums in the same order, so equal to the last bit."""
        tempos = score.tempos.numpy()
        tick, tempo = tempos["time"].astype(np.int64), tempos["mspq"].astype(np.float64)
        usable = (tempo > 0) & (tick >= 0)  # ignore zero-length quarter notes
        tick, tempo = tick[usable], tempo[usable]
        first = tempo[tick == 0][-1:] if (tick == 0).any() else [float(MICROSECONDS_PER_QUARTER)]
        tick = np.concatenate([[0], tick[tick > 0]])
        tempo = np.concatenate([first, tempo[len(tempo) - len(tick) + 1 :]])
        tick_s = 60.0 / ((6e7 / tempo) * score.ticks_per_quarter)
        changed = np.concatenate([[True], tick_s[1:] != tick_s[:-1]])
        tick, tick_s = tick[changed], tick_s[changed]
        start_s = np.concatenate([[0.0], np.cumsum(tick_s[:-1] * np.diff(tick))])
        return cls(tick=tick, start_s=start_s, tick_s=tick_s)

    def seconds(self, tick: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        segment = np.searchsorted(self.tick, tick, side="right") - 1
        return self.start_s[segment] + self.tick_s[segment] * (tick - self.tick[segment])


def _read_instrument(track: TrackTick, clock: _Clock) -> Instrument:
    notes, controls = track.notes.numpy(), track.controls.numpy()
    onset = notes["time"].astype(np.int64)
    offset = onset + notes["duration"]
    controls_tick = controls["time"].astype(np.int64)
    ticks = np.concatenate([onset, controls_tick])
    if (ticks < 0).any() or (ticks >= NEVER_TICK).any() or (offset < onset).any():
        raise MidiError(f"at most {NEVER_TICK} ticks are accepted; the delta times of this file are damaged")
    # As in note-seq, zero-length notes and drums are dropped, but a drum track's pedal counts.
    audible = np.flatnonzero((offset > onset) & (not track.is_drum))
    offset = _first_note_off(onset[audible], offset[audible], notes["pitch"][audible])
    released = offset < NEVER_TICK
    audible, offset = audible[released], offset[released]
    pedal = controls["number"] == SUSTAIN_CONTROLLER
    return Instrument(
        onset_s=clock.seconds(onset[audible]),
        offset_s=clock.seconds(offset),
        pitch=notes["pitch"][audible].astype(np.int32),
        velocity=notes["velocity"][audible].astype(np.int32),
        pedal_s=clock.seconds(controls_tick[pedal]),
        pedal_down=controls["value"][pedal] >= PEDAL_DOWN_VALUE,
    )


def _first_note_off(
    onset: Int64[np.ndarray, " n"], offset: Int64[np.ndarray, " n"], pitch: Int8[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """Offsets by pretty_midi's pairing: a note-off ends all notes of its pitch, not only the oldest."""
    lane = pitch * np.int64(2**32)  # lane + tick sorts by pitch, then by tick
    note_offs = np.sort(lane + offset)
    return note_offs[np.searchsorted(note_offs, lane + onset, side="right")] - lane


def write_midi(performance: Performance, target: str | os.PathLike[str] | BinaryFile, *, pedal: bool = False) -> None:
    """Write a format 1 file of one piano at 120 quarter notes per minute, 0.5 ms per tick.

    A piece that continues a MIDI file keeps the events of that file instead, with its tempos, tracks and pedal (see
    `continuation`). If a file is so odd that this does not give the same notes, the notes alone are written.

    Overlapping notes of one pitch go to separate tracks and channels, since a note-off cannot say which note in its
    channel it ends. So `read_midi` returns the same notes to within half a tick; shorter notes become one tick long.

    Args:
        performance: the notes; at least one, since an empty file could not be read back.
        target: a path, which is replaced atomically, or an open binary file.
        pedal: play the generated notes with the sustain pedal, as a pianist would (see `pedalling`); it sounds the
            same. Without it, keys are held for as long as the notes sound.

    Raises:
        MidiError: there are no notes, or they end too late for MIDI's clock.
        OSError: the target cannot be written.
    """
    data = _continued_bytes(performance, pedal) or _midi_bytes(performance, pedal)
    if isinstance(target, str | os.PathLike):
        write_atomically(Path(target), data)
    else:
        target.write(data)


def _continued_bytes(performance: Performance, pedal: bool) -> bytes | None:
    """The file of the prompt with the new notes; None if there is none, or reading it back would not give the notes."""
    prompt = performance.prompt_file
    if prompt is None:
        return None
    try:
        data = continued(prompt, read_midi(prompt.midi).crop(prompt.start_s), performance, pedal=pedal)
        return data if _sound_alike(read_midi(data), performance) else None
    except MidiError:
        return None


def _sound_alike(a: Performance, b: Performance) -> bool:
    """Whether two performances have the same notes, to within one time step of the event tokens."""
    if len(a) != len(b):
        return False
    a_order, b_order = (np.lexsort((notes.onset_s, notes.pitch)) for notes in (a, b))
    return (
        np.array_equal(a.pitch[a_order], b.pitch[b_order])
        and np.array_equal(a.velocity[a_order], b.velocity[b_order])
        and np.allclose(a.onset_s[a_order], b.onset_s[b_order], rtol=0, atol=_SAME_TIME_S)
        and np.allclose(a.offset_s[a_order], b.offset_s[b_order], rtol=0, atol=_SAME_TIME_S)
    )


def _midi_bytes(performance: Performance, pedal: bool) -> bytes:
    if not len(performance):
        raise MidiError("a performance without notes cannot be written as a MIDI file")
    if performance.duration_s * TICKS_PER_SECOND >= _MAX_WRITTEN_TICKS:
        longest_s = _MAX_WRITTEN_TICKS // TICKS_PER_SECOND
        raise MidiError(f"a written MIDI file lasts at most {longest_s} s, got {performance.duration_s:.1f} s")
    onset = np.rint(performance.onset_s * TICKS_PER_SECOND).astype(np.int32)
    offset = np.maximum(np.rint(performance.offset_s * TICKS_PER_SECOND).astype(np.int32), onset + 1)
    voice = voices(onset, offset, performance.pitch)
    if pedal and voice.max() < len(PIANO_CHANNELS):
        notes = TickNotes(onset.astype(np.int64), offset.astype(np.int64), performance.pitch, performance.velocity)
        return piano_file(notes, ticks_per_quarter=TICKS_PER_QUARTER, ticks_per_s=TICKS_PER_SECOND)
    score = ScoreTick(TICKS_PER_QUARTER)
    score.tempos.append(TempoTick(0, mspq=MICROSECONDS_PER_QUARTER))
    for number in range(int(voice.max()) + 1):
        chosen = voice == number
        track = TrackTick("Piano", ACOUSTIC_GRAND_PIANO)
        track.notes = NoteTickList.from_numpy(
            onset[chosen],
            (offset - onset)[chosen],
            performance.pitch[chosen].astype(np.int8),
            performance.velocity[chosen].astype(np.int8),
        )
        score.tracks.append(track)
    return score.dumps_midi()
