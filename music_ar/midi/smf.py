"""Check the chunks of a Standard MIDI File and rebuild them, so that symusic can parse every usable file.

symusic trusts the header, rejects SMPTE time, and drops a note whose note-off is missing. This module checks and
rewrites the header, skips unknown chunks, and ends every track with note-offs for all keys.
"""

from music_ar.midi.performance import MidiError

MAX_TRACKS = 4096
"""Most tracks that a file may have: each costs time and memory, even an empty one."""

NEVER_TICK = 2**28 - 1
"""Tick of the added note-offs: the longest delta time that MIDI can express. Music ends days before it."""

_SMPTE_FRAME_RATES = {24: 24.0, 25: 25.0, 29: 30_000 / 1001, 30: 30.0}
_SMPTE_DIVISION = 1000  # placeholder ticks per quarter note for files that count frames; never read
_HEADER_BYTES = 14
_END_OF_TRACK = b"\xff\x2f\x00"
_EMPTY_META_EVENT = b"\xff\x7f\x00"
# Data of eight note-offs for each of the 128 keys, in running status: enough for eight missing note-offs of one pitch.
_ALL_KEYS_OFF = b"\x00".join(bytes([key, 0]) for key in range(128) for _ in range(8))


def normalize(data: bytes) -> tuple[bytes, float | None]:
    """Check the chunks of a file and rebuild it with a plain header and nothing but track chunks.

    Returns:
        The bytes to parse, and the seconds per tick for SMPTE time, or None if tempos set them.

    Raises:
        MidiError: `data` is not a complete MIDI file of format 0 or 1.
    """
    if data[:4] != b"MThd":
        raise MidiError(f"not a MIDI file: expected it to begin with b'MThd', got {data[:4]!r}")
    if len(data) < _HEADER_BYTES:
        raise MidiError(f"the file is truncated: a MIDI header has {_HEADER_BYTES} bytes, but the file has {len(data)}")
    header_length = int.from_bytes(data[4:8])
    midi_format, track_count = int.from_bytes(data[8:10]), int.from_bytes(data[10:12])
    if header_length < 6:
        raise MidiError(f"damaged MIDI header: expected a length of at least 6, got {header_length}")
    if midi_format not in (0, 1):
        raise MidiError(f"expected MIDI format 0 or 1, got format {midi_format}")
    division, tick_s = _read_division(data[12:14])
    tracks = _read_tracks(data, 8 + header_length)
    if len(tracks) < track_count:
        raise MidiError(f"the file is truncated: its header announces {track_count} tracks, but it has {len(tracks)}")
    if not tracks:
        raise MidiError("the MIDI file has no tracks")
    fields = b"".join(field.to_bytes(2) for field in (midi_format, len(tracks), division))
    return b"MThd" + len(fields).to_bytes(4) + fields + b"".join(tracks), tick_s


def _read_division(field: bytes) -> tuple[int, float | None]:
    """Ticks per quarter note, and seconds per tick if the file counts SMPTE frames instead of beats."""
    if field[0] < 128:
        ticks_per_quarter = int.from_bytes(field)
        if ticks_per_quarter == 0:
            raise MidiError("damaged MIDI header: 0 ticks per quarter note")
        return ticks_per_quarter, None
    frames, ticks_per_frame = 256 - field[0], field[1]
    frame_rate = _SMPTE_FRAME_RATES.get(frames)
    if frame_rate is None or ticks_per_frame == 0:
        raise MidiError(
            "damaged MIDI header: expected SMPTE time of 24, 25, 29 or 30 frames per second and 1..255 ticks per "
            f"frame, got {frames} and {ticks_per_frame}"
        )
    return _SMPTE_DIVISION, 1.0 / (frame_rate * ticks_per_frame)


def _read_tracks(data: bytes, position: int) -> list[bytes]:
    tracks = []
    while len(data) - position >= 8:
        name, length = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8])
        end = position + 8 + length
        if name == b"MTrk":
            if end > len(data):
                raise MidiError(
                    f"the file is truncated: a track of {length} bytes begins at byte {position}, "
                    f"{len(data) - position - 8} bytes are left"
                )
            if len(tracks) == MAX_TRACKS:
                raise MidiError(f"at most {MAX_TRACKS} tracks are accepted, but the file has more")
            tracks.append(_with_final_note_offs(data[position + 8 : end]))
        position = end
    return tracks


def _with_final_note_offs(events: bytes) -> bytes:
    """Build a track chunk from `events`, followed by note-offs for all keys, `NEVER_TICK` after the last event.

    symusic pairs note-ons with note-offs first in, first out. If a note-off is missing, the last note of that pitch has
    none and would be dropped. The added note-offs drain every queue; `io` then finds the true ends.
    """
    body = events.removesuffix(_END_OF_TRACK)
    if len(body) < len(events):
        body += _EMPTY_META_EVENT  # carries the delta time of the removed end-of-track event
    delta = b"\xff\xff\xff\x7f"
    for channel in range(16):
        if bytes([0x90 | channel]) in events:  # otherwise the channel has no note-ons
            body += delta + bytes([0x80 | channel]) + _ALL_KEYS_OFF
            delta = b"\x00"
    body += b"\x00" + _END_OF_TRACK
    return b"MTrk" + len(body).to_bytes(4) + body
