"""MIDI files built from events, for tests."""

from music_ar.midi import Performance

ON, OFF, PEDAL, PROGRAM = 0x90, 0x80, 0xB0, 0xC0
DOWN, UP = 127, 0


def wait(ticks: int) -> bytes:
    """Encode a delta time as a variable-length quantity."""
    digits = [ticks & 127]
    while ticks := ticks >> 7:
        digits.append(ticks & 127 | 128)
    return bytes(reversed(digits))


def chunk(kind: bytes, body: bytes) -> bytes:
    return kind + len(body).to_bytes(4) + body


def track(*events: tuple[int, bytes], end: bytes = b"\x00\xff\x2f\x00") -> bytes:
    """Build a track chunk from (tick, event bytes) in time order."""
    ticks = [0] + [tick for tick, _ in events]
    body = b"".join(wait(tick - last) + data for last, (tick, data) in zip(ticks, events, strict=False))
    return chunk(b"MTrk", body + end)


def midi(*chunks: bytes, midi_format: int = 1, division: bytes = b"\x01\xf4") -> bytes:
    """Build a MIDI file; by default a tick is 1 ms (500 ticks per quarter note at 120 quarter notes per minute)."""
    tracks = sum(piece[:4] == b"MTrk" for piece in chunks)
    return chunk(b"MThd", midi_format.to_bytes(2) + tracks.to_bytes(2) + division) + b"".join(chunks)


def tempo(microseconds: int) -> bytes:
    return b"\xff\x51\x03" + microseconds.to_bytes(3)


def pedal(value: int, channel: int = 0) -> bytes:
    return bytes([PEDAL | channel, 64, value])


def on(pitch: int, velocity: int = 64, channel: int = 0) -> bytes:
    return bytes([ON | channel, pitch, velocity])


def off(pitch: int, channel: int = 0) -> bytes:
    return bytes([OFF | channel, pitch, 0])


def notes(performance: Performance) -> list[tuple[float, float, int, int]]:
    """Rows of (onset, offset, pitch, velocity), times rounded to 1 µs."""
    onset_s, offset_s = performance.onset_s.round(6).tolist(), performance.offset_s.round(6).tolist()
    return list(zip(onset_s, offset_s, performance.pitch.tolist(), performance.velocity.tolist(), strict=True))
