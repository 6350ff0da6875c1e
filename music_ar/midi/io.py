"""MIDI bytes <-> `Performance`."""

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from symusic.core import NoteTickList, ScoreTick, TempoTick, TrackTick

from music_ar.files import write_atomically
from music_ar.midi.clock import MICROSECONDS_PER_QUARTER
from music_ar.midi.continuation import continued
from music_ar.midi.performance import MidiError, Performance
from music_ar.midi.prompt_file import PromptFile
from music_ar.midi.recording import read_recording
from music_ar.midi.smf import MAX_TRACKS
from music_ar.midi.tracks import PIANO_CHANNELS, TickNotes, piano_file
from music_ar.midi.voices import voices

# To type checkers `io.BytesIO` is a BinaryIO; at run time it lacks some of its methods.
BinaryFile = BinaryIO | io.BufferedIOBase

MAX_BYTES = 16 * 2**20
MAX_NOTES = 1_000_000
MAX_SECONDS = 36 * 3600.0

TICKS_PER_QUARTER = 1000
"""Resolution of written files: a tick is 0.5 ms, so the 10 ms grid of the event tokens falls exactly on ticks."""
TICKS_PER_SECOND = TICKS_PER_QUARTER * 1_000_000 // MICROSECONDS_PER_QUARTER
ACOUSTIC_GRAND_PIANO = 0

_SAME_TIME_S = 0.01
_MAX_VOICES = MAX_TRACKS - 1  # each is a track; one more has the tempo


def read_midi(
    source: str | os.PathLike[str] | bytes | BinaryFile,
    *,
    max_bytes: int = MAX_BYTES,
    max_notes: int = MAX_NOTES,
    max_seconds: int | float = MAX_SECONDS,
) -> Performance:
    """Read the piano performance in a MIDI file.

    Drums (channel 10) are dropped; all other instruments become piano. The sustain pedal and other controllers act on
    their channel, in the order of the file. A note that is never released sounds to the end of the file. The file may
    have any number of tracks, tempo changes or SMPTE time, and may be wrapped in RIFF (.rmi).

    Args:
        source: a path, the bytes themselves, or an open binary file.
        max_bytes: size of the largest accepted file. Time and memory grow with the size, whatever is in the file.
        max_notes: largest accepted number of notes, not counting drums.
        max_seconds: latest accepted end of a note.

    Raises:
        MidiError: `source` is not a usable MIDI file, or exceeds a limit. Nothing else is raised.
    """
    performance = read_recording(_read_bytes(source, max_bytes), max_notes=max_notes).performance()
    if not len(performance):
        raise MidiError("the MIDI file has no notes for a piano (drums do not count)")
    if performance.duration_s > max_seconds:
        raise MidiError(
            f"at most {max_seconds:,.0f} s of music are accepted, but the last note ends at "
            f"{performance.duration_s:,.1f} s; cut the file into parts"
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
            raise MidiError(f"cannot read {os.fspath(source)}: {why}") from error
    else:
        try:
            data = source.read(max_bytes + 1)
        except Exception as error:
            raise MidiError(f"cannot read the open file: {error}") from error
    if not isinstance(data, bytes):
        raise MidiError(f"expected bytes, got {type(data).__name__}; open the MIDI file in binary mode")
    if not data:
        raise MidiError("the file is empty")
    if len(data) > max_bytes:
        raise MidiError(f"at most {max_bytes:,} bytes are accepted, but the file has more; cut it into parts")
    return data


def write_midi(performance: Performance, target: str | os.PathLike[str] | BinaryFile, *, pedal: bool = False) -> None:
    """Write a format 1 file of one piano at 120 quarter notes per minute, 0.5 ms per tick.

    A piece that continues a MIDI file keeps the events of that file instead, with its tempos, tracks and pedal (see
    `continuation`). If the file is so odd that this would not give the same notes, or larger than 1 MiB, the notes
    alone are written.

    Overlapping notes of one pitch go to separate tracks and channels, since a note-off cannot say which note in its
    channel it ends. So `read_midi` returns the same notes to within half a tick; shorter notes become one tick long.

    Args:
        performance: the notes; at least one, since an empty file could not be read back.
        target: a path, which is replaced atomically, or an open binary file.
        pedal: play the generated notes with the sustain pedal, as a pianist would (see `pedalling`); it sounds the
            same. Without it, keys are held for as long as the notes sound.

    Raises:
        MidiError: there are no notes, or more or later ones than `read_midi` accepts.
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


def _check_size(performance: Performance) -> None:
    """Refuse what `read_midi` would not read back."""
    if len(performance) > MAX_NOTES:
        raise MidiError(f"at most {MAX_NOTES:,} notes fit in a MIDI file, got {len(performance):,}; write it in parts")
    if performance.duration_s > MAX_SECONDS - 1:
        raise MidiError(
            f"a MIDI file lasts at most {MAX_SECONDS - 1:,.0f} s, got {performance.duration_s:,.1f} s; "
            "write it in parts"
        )


def _midi_bytes(performance: Performance, pedal: bool) -> bytes:
    if not len(performance):
        raise MidiError("a performance without notes cannot be written as a MIDI file")
    _check_size(performance)
    onset = np.rint(performance.onset_s * TICKS_PER_SECOND).astype(np.int32)
    offset = np.maximum(np.rint(performance.offset_s * TICKS_PER_SECOND).astype(np.int32), onset + 1)
    voice = voices(onset, offset, performance.pitch)
    if voice.max() >= _MAX_VOICES:
        raise MidiError(
            f"at most {_MAX_VOICES:,} notes of one pitch may overlap in a MIDI file, got {voice.max() + 1:,}"
        )
    if pedal and voice.max() < len(PIANO_CHANNELS):
        notes = TickNotes(onset.astype(np.int64), offset.astype(np.int64), performance.pitch, performance.velocity)
        return piano_file(notes, ticks_per_quarter=TICKS_PER_QUARTER, ticks_per_s=TICKS_PER_SECOND)
    score = ScoreTick(TICKS_PER_QUARTER)
    score.tempos.append(TempoTick(0, mspq=MICROSECONDS_PER_QUARTER))
    by_voice = np.argsort(voice, kind="stable")
    for chosen in np.split(by_voice, np.flatnonzero(np.diff(voice[by_voice])) + 1):
        track = TrackTick("Piano", ACOUSTIC_GRAND_PIANO)
        track.notes = NoteTickList.from_numpy(
            onset[chosen],
            (offset - onset)[chosen],
            performance.pitch[chosen].astype(np.int8),
            performance.velocity[chosen].astype(np.int8),
        )
        score.tracks.append(track)
    return score.dumps_midi()
