"""MIDI bytes <-> `Performance`: piano notes in seconds, with the sustain pedal folded into them.

Files are parsed with symusic, whose clock we do not use: ticks become seconds with the very float64 operations
of pretty_midi 0.2, because note-seq reads through pretty_midi and a last-bit difference in a time moves an event
to the next 10 ms step. What a pedal does to a note is `apply_sustain_control_changes` of note-seq 0.0.5, written
here as array operations (see `_fold_sustain`).
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int8, Int32, Int64
from symusic.core import NoteTickList, ScoreTick, TempoTick, TrackTick

from music_ar.files import write_atomically
from music_ar.midi.performance import MidiError, Performance

if TYPE_CHECKING:
    pass

# `io.BytesIO` is a BinaryIO to type checkers alone: at run time it lacks some of what that lists.
BinaryFile = BinaryIO | io.BufferedIOBase

MAX_BYTES = 16 * 2**20
MAX_NOTES = 1_000_000
MAX_SECONDS = 6 * 3600.0
MAX_TRACKS = 4096  # each costs time and memory of its own, whatever it holds

SUSTAIN_CONTROLLER = 64
PEDAL_DOWN_VALUE = 64  # a sustain controller value of 64..127 is a pressed pedal
DEFAULT_MICROSECONDS_PER_QUARTER = 500_000

# Written files: 0.5 ms a tick, so that the 10 ms grid of the events lies exactly on ticks.
TICKS_PER_QUARTER = 1000
TICKS_PER_SECOND = TICKS_PER_QUARTER * 1_000_000 // DEFAULT_MICROSECONDS_PER_QUARTER
ACOUSTIC_GRAND_PIANO = 0

_SMPTE_FRAME_RATES = {24: 24.0, 25: 25.0, 29: 30_000 / 1001, 30: 30.0}
_HEADER_BYTES = 14
_NEVER_TICK = 2**28 - 1  # the longest wait that MIDI can write; real music ends days before
_END_OF_TRACK = b"\xff\x2f\x00"
# The data of a note-off for every key, in running status; eight each, for as many lost note-offs of one pitch.
_ALL_KEYS_OFF = b"\x00".join(bytes([key, 0]) for key in range(128) for _ in range(8))


def read_midi(
    source: str | os.PathLike[str] | bytes | BinaryFile,
    *,
    max_bytes: int = MAX_BYTES,
    max_notes: int = MAX_NOTES,
    max_seconds: int | float = MAX_SECONDS,
) -> Performance:
    """Reads the piano performance in a MIDI file.

    Formats 0 and 1, any number of tracks, tempo changes, SMPTE time. Drums (channel 10) are dropped, every other
    instrument is played by the piano. As in note-seq the sustain pedal acts on the notes of its own track,
    channel and program, and a note still held when its track ends is dropped, since nothing says how long it is.

    Args:
      source: a path, the bytes themselves, or an open binary file.
      max_bytes: largest accepted file.
      max_notes: most accepted notes, drums not counted.
      max_seconds: latest accepted end of a note.

    Raises:
      MidiError: there is no usable MIDI file in `source`, or it is over a limit; nothing else is raised.
    """
    data = _read_bytes(source, max_bytes)
    midi, fixed_tick_s = _normal_form(data)
    try:
        score = ScoreTick.from_midi(midi)
    except Exception as error:  # symusic raises several kinds, all of which mean the same here
        raise MidiError(f"the MIDI events cannot be parsed: {error}") from error
    note_count = sum(len(track.notes) for track in score.tracks if not track.is_drum)
    if note_count > max_notes:
        raise MidiError(f"at most {max_notes} notes are accepted, the file has {note_count}; raise max_notes or cut it")
    clock = _Clock.of_tempos(score) if fixed_tick_s is None else _Clock.constant(fixed_tick_s)
    performance = _play([_instrument(track, clock) for track in score.tracks])
    if not len(performance):
        raise MidiError("the MIDI file holds no notes that a piano can play (drums do not count)")
    if performance.duration_s > max_seconds:
        raise MidiError(
            f"at most {max_seconds:g} s are accepted, the last note ends at {performance.duration_s:.1f} s;"
            " raise max_seconds or cut the file"
        )
    return performance


def _read_bytes(source: str | os.PathLike[str] | bytes | BinaryFile, max_bytes: int) -> bytes:
    if isinstance(source, bytes):
        data = source
    elif isinstance(source, str | os.PathLike):
        try:
            with Path(source).open("rb") as file:
                data = file.read(max_bytes + 1)
        except (OSError, ValueError) as error:  # ValueError: a path with a null character
            why = error.strerror if isinstance(error, OSError) else error
            raise MidiError(f"cannot read {os.fspath(source)!r}: {why}") from error
    else:
        try:
            data = source.read(max_bytes + 1)
        except Exception as error:
            raise MidiError(f"cannot read from {source!r}: {error}") from error
    if not isinstance(data, bytes):
        raise MidiError(f"a MIDI file is read from bytes, got {type(data).__name__}; open it in binary mode")
    if not data:
        raise MidiError("the file is empty")
    if len(data) > max_bytes:
        raise MidiError(f"at most {max_bytes} bytes are accepted, the file is larger; raise max_bytes if it is music")
    return data


def _normal_form(data: bytes) -> tuple[bytes, float | None]:
    """The same music with a plain header and nothing but track chunks, and the length of a tick if it is fixed.

    symusic refuses SMPTE time and trusts the header, so the file's frame is checked and rebuilt here.

    Returns:
      The bytes to parse, and seconds per tick for SMPTE time or None where tempos set it.
    """
    if data[:4] != b"MThd":
        raise MidiError(f"not a MIDI file: it should begin with b'MThd', it begins with {data[:4]!r}")
    if len(data) < _HEADER_BYTES:
        raise MidiError(f"the file is truncated: a MIDI header has {_HEADER_BYTES} bytes, the file {len(data)}")
    header_length = int.from_bytes(data[4:8])
    midi_format, track_count = int.from_bytes(data[8:10]), int.from_bytes(data[10:12])
    if header_length < 6:
        raise MidiError(f"broken MIDI header: its length should be 6 or more, it is {header_length}")
    if midi_format not in (0, 1):
        raise MidiError(f"MIDI formats 0 and 1 are read, this file is of format {midi_format}")
    division, fixed_tick_s = _read_division(data[12:14])
    tracks = _track_chunks(data, 8 + header_length)
    if len(tracks) < track_count:
        raise MidiError(f"the file is truncated: its header promises {track_count} tracks, {len(tracks)} are there")
    if not tracks:
        raise MidiError("the MIDI file holds no tracks")
    counts = [midi_format, len(tracks), division]
    header = b"MThd" + (6).to_bytes(4) + b"".join(count.to_bytes(2) for count in counts)
    return header + b"".join(tracks), fixed_tick_s


def _read_division(field: bytes) -> tuple[int, float | None]:
    """Ticks per quarter note, and seconds per tick where the file counts SMPTE frames instead of beats."""
    if field[0] < 128:
        ticks_per_quarter = int.from_bytes(field)
        if ticks_per_quarter == 0:
            raise MidiError("broken MIDI header: 0 ticks per quarter note")
        return ticks_per_quarter, None
    frame_rate = _SMPTE_FRAME_RATES.get(256 - field[0])
    if frame_rate is None or field[1] == 0:
        raise MidiError(
            f"broken MIDI header: SMPTE time is 24, 25, 29 or 30 frames a second in 1..255 parts,"
            f" got {256 - field[0]} in {field[1]}"
        )
    return TICKS_PER_QUARTER, 1.0 / (frame_rate * field[1])


def _track_chunks(data: bytes, position: int) -> list[bytes]:
    tracks = []
    while len(data) - position >= 8:
        kind, length = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8])
        end = position + 8 + length
        if kind == b"MTrk":
            if end > len(data):
                raise MidiError(
                    f"the file is truncated: a track of {length} bytes begins at byte {position},"
                    f" {len(data) - position - 8} bytes are left"
                )
            if len(tracks) == MAX_TRACKS:
                raise MidiError(f"at most {MAX_TRACKS} tracks are accepted, the file has more")
            tracks.append(_release_all(data[position + 8 : end]))
        position = end
    return tracks


def _release_all(events: bytes) -> bytes:
    """The track chunk of these events, with note-offs for every key long after the last of them.

    symusic pairs note-ons and note-offs first in, first out. Where a note-off is lost, the last note of that pitch
    would be left without one and vanish; so every queue is emptied at `_NEVER_TICK` and `_first_release` finds the
    true end, or that there is none.
    """
    body = events.removesuffix(_END_OF_TRACK)
    if len(body) < len(events):
        body += b"\xff\x7f\x00"  # an event that says nothing, for the wait that led to the end of the track
    wait = b"\xff\xff\xff\x7f"
    for channel in range(16):
        if bytes([0x90 | channel]) in events:  # else no note-on of the channel can be there
            body += wait + bytes([0x80 | channel]) + _ALL_KEYS_OFF
            wait = b"\x00"
    body += b"\x00" + _END_OF_TRACK
    return b"MTrk" + len(body).to_bytes(4) + body


@dataclass(frozen=True, kw_only=True)
class _Clock:
    """Ticks to seconds: from `tick[k]` on, which is at `start_s[k]`, a tick lasts `tick_s[k]` seconds."""

    tick: Int64[np.ndarray, " k"]
    start_s: Float64[np.ndarray, " k"]
    tick_s: Float64[np.ndarray, " k"]

    @classmethod
    def constant(cls, tick_s: float) -> "_Clock":
        return cls(tick=np.zeros(1, np.int64), start_s=np.zeros(1), tick_s=np.array([tick_s]))

    @classmethod
    def of_tempos(cls, score: ScoreTick) -> "_Clock":
        """The clock of pretty_midi: the same products and sums in the same order, so the same last bits."""
        tempos = score.tempos.numpy()
        tick, tempo = tempos["time"].astype(np.int64), tempos["mspq"].astype(np.float64)
        usable = (tempo > 0) & (tick >= 0)  # a quarter note of no length: such an event says nothing
        tick, tempo = tick[usable], tempo[usable]
        first = tempo[tick == 0][-1:] if (tick == 0).any() else [float(DEFAULT_MICROSECONDS_PER_QUARTER)]
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


class _Instrument(NamedTuple):
    """What one instrument plays, before its pedal is folded in; times in seconds. Drums keep their pedal alone."""

    onset_s: Float64[np.ndarray, " n"]
    offset_s: Float64[np.ndarray, " n"]
    pitch: Int32[np.ndarray, " n"]
    velocity: Int32[np.ndarray, " n"]
    pedal_s: Float64[np.ndarray, " p"]
    pedal_down: Bool[np.ndarray, " p"]


def _instrument(track: TrackTick, clock: _Clock) -> _Instrument:
    notes, controls = track.notes.numpy(), track.controls.numpy()
    onset = notes["time"].astype(np.int64)
    offset = onset + notes["duration"]
    controls_tick = controls["time"].astype(np.int64)
    ticks = np.concatenate([onset, controls_tick])
    if (ticks < 0).any() or (ticks >= _NEVER_TICK).any() or (offset < onset).any():
        raise MidiError(f"a MIDI file of at most {_NEVER_TICK} ticks is read; the delta times of this one are broken")
    # note-seq knows neither notes of no length nor drums, but it hears the pedal of a drummer.
    audible = np.flatnonzero((offset > onset) & (not track.is_drum))
    offset = _first_release(onset[audible], offset[audible], notes["pitch"][audible])
    released = offset < _NEVER_TICK
    audible, offset = audible[released], offset[released]
    pedal = controls["number"] == SUSTAIN_CONTROLLER
    return _Instrument(
        onset_s=clock.seconds(onset[audible]),
        offset_s=clock.seconds(offset),
        pitch=notes["pitch"][audible].astype(np.int32),
        velocity=notes["velocity"][audible].astype(np.int32),
        pedal_s=clock.seconds(controls_tick[pedal]),
        pedal_down=controls["value"][pedal] >= PEDAL_DOWN_VALUE,
    )


def _first_release(
    onset: Int64[np.ndarray, " n"], offset: Int64[np.ndarray, " n"], pitch: Int8[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """Offsets as pretty_midi pairs them: a note-off ends all notes of its pitch, not the oldest alone."""
    lane = pitch * np.int64(2**32)  # lane + tick sorts by pitch, then by tick
    releases = np.sort(lane + offset)
    return releases[np.searchsorted(releases, lane + onset, side="right")] - lane


def _play(instruments: Sequence[_Instrument]) -> Performance:
    """All instruments on one piano, each under its own pedal."""
    ends = [time for player in instruments for time in (player.offset_s, player.pedal_s)]
    last_event_s = max((float(time.max(initial=0.0)) for time in ends), default=0.0)
    folded = [_fold_sustain(player, last_event_s) for player in instruments if len(player.pitch)]
    if not folded:
        return Performance.empty()
    onset_s, offset_s, pitch, velocity = (np.concatenate(column) for column in zip(*folded, strict=True))
    return Performance(onset_s=onset_s, offset_s=offset_s, pitch=pitch, velocity=velocity)


def _fold_sustain(instrument: _Instrument, last_event_s: float) -> tuple[np.ndarray, ...]:
    """Extends the notes that end under a pressed pedal, as note-seq's `apply_sustain_control_changes`.

    Events of one time are taken in the order pedal down, pedal up, note on, note off. A note that ends while the
    pedal is down sounds until the pedal next comes up (after its end), or until the file's last event. With the
    pedal down, a note-on cuts every sounding note of its pitch; of two that begin together the later one stays.

    Args:
      instrument: notes and pedal of one instrument.
      last_event_s: time of the last note or pedal event of all instruments.

    Returns:
      The columns of `Performance`, without the notes that were cut to nothing.
    """
    pedal_order = np.lexsort((~instrument.pedal_down, instrument.pedal_s))
    pedal_s, pedal_down = instrument.pedal_s[pedal_order], instrument.pedal_down[pedal_order]
    pedal_up_s = np.append(pedal_s[~pedal_down], last_event_s)

    def is_down(time_s: np.ndarray) -> np.ndarray:
        return np.append(pedal_down, False)[np.searchsorted(pedal_s, time_s, side="right") - 1]

    order = np.argsort(instrument.onset_s, kind="stable")
    order = order[np.argsort(instrument.pitch[order].astype(np.int8), kind="stable")]  # int8: a radix sort
    onset_s, offset_s = instrument.onset_s[order], instrument.offset_s[order]
    pitch, velocity = instrument.pitch[order], instrument.velocity[order]

    release = np.searchsorted(pedal_s[~pedal_down], offset_s, side="right")
    ring_s = np.where(is_down(offset_s), pedal_up_s[release], offset_s)
    cut_s = _next_struck(onset_s, pitch, is_down(onset_s))
    kept = cut_s > onset_s
    return onset_s[kept], np.minimum(ring_s, cut_s)[kept], pitch[kept], velocity[kept]


def _next_struck(
    onset_s: Float64[np.ndarray, " n"], pitch: Int32[np.ndarray, " n"], cuts: Bool[np.ndarray, " n"]
) -> Float64[np.ndarray, " n"]:
    """For notes sorted by (pitch, onset): when the next note of the pitch that cuts begins, infinity if never."""
    n = len(pitch)
    # Index of the first cutting note after each note: a running minimum from the right.
    cutting = np.append(np.where(cuts, np.arange(n), n), n)
    following = np.minimum.accumulate(cutting[::-1])[::-1][1:]
    same_pitch = np.append(pitch, -1)[following] == pitch
    return np.where(same_pitch, np.append(onset_s, np.inf)[following], np.inf)


def write_midi(performance: Performance, target: str | os.PathLike[str] | BinaryFile) -> None:
    """Writes a format 1 file of one piano at 120 beats a minute, 0.5 ms a tick, without pedal events.

    Notes of one pitch that overlap go to further tracks and channels, since within a channel a note-off could not
    say which of them it ends. So `read_midi` gives the same notes back, within half a tick, or one tick long
    where they were shorter.

    Args:
      performance: the notes; at least one, as an empty file could not be read again.
      target: a path, which is replaced at once when the file is complete, or an open binary file.

    Raises:
      MidiError: there are no notes, or they end too late for MIDI's clock.
      OSError: the target cannot be written.
    """
    data = _midi_bytes(performance)
    if not isinstance(target, str | os.PathLike):
        target.write(data)
        return
    write_atomically(Path(target), data)


def _midi_bytes(performance: Performance) -> bytes:
    if not len(performance):
        raise MidiError("a performance without notes cannot be written as a MIDI file")
    if performance.duration_s * TICKS_PER_SECOND >= 2**28:
        longest_s = 2**28 // TICKS_PER_SECOND
        raise MidiError(f"a written MIDI file lasts at most {longest_s} s, got {performance.duration_s:.1f} s")
    onset = np.rint(performance.onset_s * TICKS_PER_SECOND).astype(np.int32)
    offset = np.maximum(np.rint(performance.offset_s * TICKS_PER_SECOND).astype(np.int32), onset + 1)
    voice = _voices(onset, offset, performance.pitch)
    score = ScoreTick(TICKS_PER_QUARTER)
    score.tempos.append(TempoTick(0, mspq=DEFAULT_MICROSECONDS_PER_QUARTER))
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


def _voices(
    onset: Int32[np.ndarray, " n"], offset: Int32[np.ndarray, " n"], pitch: Int32[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """The lowest voice free at each note's pitch and time; all zero where no notes of a pitch overlap."""
    voice = np.zeros(len(pitch), np.int64)
    free_from: dict[int, list[int]] = {}
    for note, (start, end, key) in enumerate(zip(onset.tolist(), offset.tolist(), pitch.tolist(), strict=True)):
        ends = free_from.setdefault(key, [])
        number = next((number for number, free in enumerate(ends) if free <= start), len(ends))
        ends[number : number + 1] = [end]
        voice[note] = number
    return voice
