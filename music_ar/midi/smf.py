"""Open a Standard MIDI File: find its track chunks and its unit of time, and refuse what is none, in words."""

from typing import NamedTuple

from music_ar.midi.performance import MidiError

MAX_TRACKS = 2**16 - 1
"""Most tracks that a file may have: as many as its header can count."""

_SMPTE_FRAME_RATES = {24: 24.0, 25: 25.0, 29: 30_000 / 1001, 30: 30.0}
_HEADER_BYTES = 14
_END_OF_TRACK = b"\xff\x2f"
_MAC_BINARY_BYTES = 128

_OTHER_FILES = {
    b"PK\x03\x04": "a zip archive; unpack it, or if it is a score (.mxl), export MIDI from it",
    b"<?xml": "an XML file, perhaps a score (MusicXML); export MIDI from the program that made it",
    b"WAVE": "a sound file (WAV); MIDI files hold notes instead of sound",
    b"ID3": "a sound file (MP3); MIDI files hold notes instead of sound",
    b"OggS": "a sound file (Ogg); MIDI files hold notes instead of sound",
    b"fLaC": "a sound file (FLAC); MIDI files hold notes instead of sound",
    b"%PDF": "a PDF document; export MIDI from the program that made the score",
    b"\x1f\x8b": "compressed with gzip; unpack it",
}


class MidiFile(NamedTuple):
    """A file's tracks and its unit of time.

    Attributes:
        tracks: contents of the track chunks.
        ticks_per_quarter: resolution; None if the ticks are parts of a second.
        tick_s: seconds per tick; None if tempos set them.
        division: the two bytes of the header that say so.
    """

    tracks: list[memoryview]
    ticks_per_quarter: int | None
    tick_s: float | None
    division: bytes


def open_file(data: bytes) -> MidiFile:
    """Find the tracks of a MIDI file, which may be wrapped in RIFF or MacBinary.

    Chunks of unknown kinds are skipped, but counted, since some writers count them in the header. What follows the last
    announced track is ignored unless it is another track.

    Raises:
        MidiError: `data` is not a complete MIDI file of format 0, 1, or 2 with one track.
    """
    data = _unwrap(data)
    if not data.startswith(b"MThd"):
        raise MidiError(_what_it_is(data))
    if len(data) < _HEADER_BYTES:
        raise MidiError(f"the file is truncated: a MIDI header has {_HEADER_BYTES} bytes, but the file has {len(data)}")
    header_bytes = int.from_bytes(data[4:8])
    midi_format, announced = int.from_bytes(data[8:10]), int.from_bytes(data[10:12])
    if header_bytes < 6:
        raise MidiError(f"the MIDI header is damaged: expected a length of at least 6 bytes, got {header_bytes}")
    if midi_format > 2:
        raise MidiError(f"the file has MIDI format {midi_format}; formats 0, 1 and 2 exist")
    ticks_per_quarter, tick_s = read_division(data[12:14])
    tracks = _read_tracks(data, 8 + header_bytes, announced)
    if midi_format == 2 and len(tracks) > 1:
        raise MidiError(
            f"the file is a collection of {len(tracks)} separate pieces (MIDI format 2); save each as a file of its own"
        )
    return MidiFile(tracks, ticks_per_quarter, tick_s, data[12:14])


def _unwrap(data: bytes) -> bytes:
    """The MIDI file inside a RIFF file (.rmi) or after the header of a MacBinary file."""
    if data[:4] == b"RIFF" and data[8:12] == b"RMID":
        position = 12
        while position + 8 <= len(data):
            if data[position : position + 4] == b"data" and data[position + 8 : position + 12] == b"MThd":
                return data[position + 8 :]
            size = int.from_bytes(data[position + 4 : position + 8], "little")
            position += 8 + size + size % 2
        start = data.find(b"MThd")  # the sizes of the chunks are wrong
        return data[max(start, 0) :]
    if data[:1] == b"\0" and data[_MAC_BINARY_BYTES : _MAC_BINARY_BYTES + 4] == b"MThd":
        return data[_MAC_BINARY_BYTES:]
    return data


def _what_it_is(data: bytes) -> str:
    """Say that a file is not a MIDI file, and what it is instead, as far as its first bytes tell."""
    kind = data[8:12] if data.startswith(b"RIFF") else data[:5]
    for start, what in _OTHER_FILES.items():
        if kind.startswith(start):
            return f"this is not a MIDI file, but {what}"
    text = data[:4].decode("ascii", errors="replace")
    begins = f"“{text}”" if text.isprintable() and text.isascii() else f"the bytes {data[:4].hex(' ')}"
    return f"this is not a MIDI file: a MIDI file begins with the letters MThd, but this one with {begins}"


def read_division(field: bytes) -> tuple[int | None, float | None]:
    """Ticks per quarter note, or seconds per tick if the file counts SMPTE frames instead of beats."""
    if field[0] < 128:
        ticks_per_quarter = int.from_bytes(field)
        if ticks_per_quarter == 0:
            raise MidiError("the MIDI header is damaged: it gives a quarter note 0 ticks")
        return ticks_per_quarter, None
    frames, ticks_per_frame = 256 - field[0], field[1]
    frame_rate = _SMPTE_FRAME_RATES.get(frames)
    if frame_rate is None or ticks_per_frame == 0:
        raise MidiError(
            "the MIDI header is damaged: expected SMPTE time of 24, 25, 29 or 30 frames per second and 1 to 255 ticks "
            f"per frame, got {frames} and {ticks_per_frame}"
        )
    return None, 1.0 / (frame_rate * ticks_per_frame)


def _read_tracks(data: bytes, position: int, announced: int) -> list[memoryview]:
    """The contents of the track chunks from `position` on."""
    tracks, chunks, view = [], 0, memoryview(data)
    while len(data) - position >= 8:
        name, length = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8])
        if not name.isascii() or not name.decode().isprintable() or (name == b"MThd" and chunks >= announced):
            break  # no chunk, or another file
        end = position + 8 + length
        if name == b"MTrk":
            if end > len(data):
                raise MidiError(
                    f"the file is truncated: a track should have {length:,} bytes, "
                    f"but only {len(data) - position - 8:,} are left; get another copy"
                )
            if len(tracks) == MAX_TRACKS:
                raise MidiError(f"at most {MAX_TRACKS:,} tracks are accepted, but the file has more")
            tracks.append(view[position + 8 : end])
        chunks += 1
        position = end
    if chunks < announced:
        raise MidiError(
            f"the file is truncated: its header announces {announced} tracks, but it has {len(tracks)}; "
            "get another copy"
        )
    if not tracks:
        raise MidiError("the MIDI file has no tracks")
    if data[position:].strip(b"\0") and _END_OF_TRACK not in bytes(tracks[-1]):
        raise MidiError("the file is damaged: it has more bytes than its last track says; export it again")
    return tracks
