"""Files that differ from the plain case: wrappers, chunks, meta-events, system events. What is read, what refused."""

import pytest
from midi_files import chunk, midi, notes, off, on, tempo, track, wait

from music_ar.midi import MidiError, read_midi

ONE_NOTE = track((0, on(60)), (100, off(60)))
ONE_FILE = midi(ONE_NOTE)
READ = [(0, 0.1, 60, 64)]


def riff(kind: bytes, *chunks: bytes, size: int | None = None) -> bytes:
    body = kind + b"".join(chunks)
    return b"RIFF" + (len(body) if size is None else size).to_bytes(4, "little") + body


def riff_chunk(name: bytes, body: bytes, size: int | None = None) -> bytes:
    return name + (len(body) if size is None else size).to_bytes(4, "little") + body + bytes(len(body) % 2)


INFO = riff_chunk(b"LIST", b"INFO" + riff_chunk(b"INAM", b"A MThd in its name ") + riff_chunk(b"ICMT", b"odd"))


@pytest.mark.parametrize(
    "data",
    [
        riff(b"RMID", riff_chunk(b"data", ONE_FILE)),
        riff(b"RMID", INFO, riff_chunk(b"data", ONE_FILE), INFO),
        riff(b"RMID", riff_chunk(b"DISP", b"odd"), riff_chunk(b"data", ONE_FILE), riff(b"DLS ", b"sounds")),
        riff(b"RMID", riff_chunk(b"data", ONE_FILE), size=0),
        riff(b"RMID", riff_chunk(b"data", ONE_FILE, size=2**31)),
        riff(b"RMID", riff_chunk(b"data", ONE_FILE, size=3)),
        riff(b"RMID", riff_chunk(b"DISP", b"text", size=2**30), riff_chunk(b"data", ONE_FILE)),
        b"\0\x04name" + bytes(122) + ONE_FILE,
    ],
    ids=[
        "RIFF",
        "LIST before",
        "odd chunk",
        "RIFF size 0",
        "data too long",
        "data too short",
        "lying chunk",
        "MacBinary",
    ],
)
def test_wrapped_files_are_opened(data):
    assert notes(read_midi(data)) == READ


def headed(*chunks: bytes, midi_format: int = 1, announced: int = 1) -> bytes:
    return chunk(b"MThd", midi_format.to_bytes(2) + announced.to_bytes(2) + b"\x01\xf4") + b"".join(chunks)


@pytest.mark.parametrize(
    "data",
    [
        headed(ONE_NOTE, chunk(b"XFIH", b"abcd"), announced=2),
        headed(chunk(b"XFIH", b"abcd"), ONE_NOTE, announced=2),
        headed(chunk(b"XFIH", b"abcd"), ONE_NOTE, announced=1),
        headed(ONE_NOTE, midi_format=2),
        headed(chunk(b"XFIH", b"abcd"), ONE_NOTE, midi_format=2, announced=2),
        headed(ONE_NOTE, track(), midi_format=0),
        headed(chunk(b"MTrk", b""), ONE_NOTE, announced=2),
        headed(ONE_NOTE) + b"some words after the end",
        headed(ONE_NOTE) + headed(track((0, on(72)), (50, off(72)))),
        headed(track((0, on(60)), (100, off(60)), end=b"")),
        headed(track((0, on(60)), (100, off(60)), end=b"")) + bytes(9),
        headed(track((0, on(60)), (100, off(60)), end=b"\0\xff\x2f\x01\0")),
        headed(track((0, on(60)), (100, off(60)), end=b"\0\xff\x2f\0" + b"\0\x90\x43\x40\x10\xf5garbage")),
    ],
)
def test_chunks_that_hold_no_notes_and_what_follows_the_end_are_skipped(data):
    assert notes(read_midi(data)) == READ


def test_more_tracks_than_announced_are_read():
    assert read_midi(headed(ONE_NOTE, track((0, on(62)), (100, off(62))))).pitch.tolist() == [60, 62]


@pytest.mark.parametrize(
    ("tempo_event", "onset_s"),
    [
        (b"\xff\x51\x00", 0.1),
        (b"\xff\x51\x01\x10", 0.1),
        (b"\xff\x51\x02\x10\x00", 0.1),
        (tempo(0), 0.1),
        (tempo(1_000_000), 0.2),
        (b"\xff\x51\x04" + (1_000_000).to_bytes(3) + b"\xff", 0.2),
    ],
)
def test_tempos_that_are_too_short_are_ignored_and_further_bytes_too(tempo_event, onset_s):
    assert read_midi(midi(track((0, tempo_event), (100, on(60)), (200, off(60))))).onset_s.tolist() == [onset_s]


@pytest.mark.parametrize("kind", [0x00, 0x01, 0x03, 0x09, 0x20, 0x21, 0x2E, 0x51, 0x54, 0x58, 0x59, 0x7F])
def test_empty_and_unknown_meta_events_are_ignored(kind):
    for contents in (b"", b"\x83\x73\x83\x41", bytes(300)):
        if kind == 0x51 and len(contents) > 2:
            continue
        event = bytes([0xFF, kind]) + wait(len(contents)) + contents
        assert notes(read_midi(midi(track((0, event), (0, on(60)), (100, off(60)))))) == READ


@pytest.mark.parametrize(
    "event",
    [
        b"\xf0\x05\x7e\x7f\x09\x01\xf7",
        b"\xf0\x00",
        b"\xf7\x03\x90\x3c\x40",
        b"\xf7\x00",
        b"\xf1\x05",
        b"\xf2\x10\x3c",
        b"\xf3\x05",
        b"\xf6",
        *[bytes([status]) for status in (0xF8, 0xFA, 0xFB, 0xFC, 0xFE)],
    ],
)
def test_system_events_take_no_time_and_play_no_note(event):
    assert notes(read_midi(midi(track((0, on(60)), (50, event), (100, off(60)))))) == READ


def test_system_exclusive_in_packets():
    packets = [
        (0, b"\xf0\x03\x43\x12\x00"),
        (50, b"\xf7\x06\x43\x12\x00\x43\x12\x00"),
        (100, b"\xf7\x04\x43\x12\x00\xf7"),
    ]
    assert notes(read_midi(midi(track(*packets, (100, on(60)), (200, off(60)))))) == [(0.1, 0.2, 60, 64)]


@pytest.mark.parametrize("event", [b"\xff\x01\x01a", b"\xf8"])
def test_running_status_goes_on_after_meta_events_and_real_time_messages(event):
    events = [(0, on(60)), (50, event), (100, bytes([60, 0])), (110, bytes([62, 1])), (120, bytes([62, 0]))]
    assert notes(read_midi(midi(track(*events)))) == [*READ, (0.11, 0.12, 62, 1)]


def test_running_status_of_messages_with_one_data_byte():
    programs = [(0, b"\xc0\x05"), (1, b"\x06"), (2, b"\xff\x01\x00"), (3, b"\x07"), (4, b"\xd0\x07"), (5, b"\x60")]
    assert notes(read_midi(midi(track(*programs, (50, on(60)), (60, off(60)))))) == [(0.05, 0.06, 60, 64)]


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([(0, b"\x3c\x40")], "no status byte"),
        ([(0, on(60)), (50, b"\xf0\x01\xf7"), (100, bytes([60, 0]))], "no status byte"),
        ([(0, on(60)), (50, b"\xf6"), (100, bytes([60, 0]))], "no status byte"),
        ([(0, bytes([0x90, 60, 128]))], "above 127"),
        ([(0, bytes([0x90, 128, 60]))], "above 127"),
        ([(0, bytes([0xC0, 128]))], "above 127"),
        ([(0, on(60)), (1, bytes([60, 200]))], "above 127"),
        ([(0, b"\xf4")], "no meaning"),
        ([(0, b"\xfd")], "no meaning"),
        ([(0, on(60)), (5, b"\xff\x01\x80\x80\x80\x80\x00")], "length has more than four bytes"),
        ([(0, on(60)), (5, b"\xf0\x50")], "runs over the end of its track"),
    ],
)
def test_damaged_events_are_refused(events, message):
    with pytest.raises(MidiError, match=f"the file is damaged: .*({message}).*; export it again"):
        read_midi(midi(track(*events)))


def test_a_delta_time_of_five_bytes_is_refused():
    with pytest.raises(MidiError, match="a delta time has more than four bytes"):
        read_midi(midi(chunk(b"MTrk", b"\x80\x80\x80\x80\x00\x90\x3c\x40\x10\x80\x3c\x40\0\xff\x2f\0")))


@pytest.mark.parametrize("cut", [1, 2])
def test_an_event_that_runs_into_the_next_track_is_refused(cut):
    short = chunk(b"MTrk", track((0, on(60)), (100, off(60)), end=b"")[8:-cut])
    with pytest.raises(MidiError, match="runs over the end of its track"):
        read_midi(midi(short, ONE_NOTE))


def test_running_status_does_not_go_on_in_the_next_track():
    with pytest.raises(MidiError, match="no status byte"):
        read_midi(midi(track((0, on(60)), (50, bytes([60, 0])), end=b""), chunk(b"MTrk", b"\0\x3e\x40\x10\x3e\0")))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"This is a letter", "begins with the letters MThd, but this one with “This”$"),
        (b"\xff\xfb\x90\0" * 9, "but this one with the bytes ff fb 90 00$"),
        (riff(b"WAVE", riff_chunk(b"fmt ", bytes(16))), r"not a MIDI file, but a sound file \(WAV\)"),
        (b"PK\x03\x04" + bytes(40), "a zip archive; unpack it"),
        (b"<?xml version='1.0'?>", "MusicXML"),
        (riff(b"RMID"), "begins with the letters MThd"),
        (headed(ONE_NOTE, announced=2), "announces 2 tracks, but it has 1"),
        (headed(ONE_NOTE[:-1]), "a track should have .* only .* are left"),
        (headed(ONE_NOTE, ONE_NOTE, midi_format=2, announced=2), "a collection of 2 separate pieces"),
        (headed(ONE_NOTE, midi_format=3), "MIDI format 3"),
        (headed(track((0, on(60)), (50, off(60)), end=b"")) + wait(10) + on(62), "more bytes than its last track says"),
        (chunk(b"MThd", b"\0\1\0\1") + ONE_NOTE, "length of at least 6 bytes, got 4"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(data, message):
    with pytest.raises(MidiError, match=message) as refused:
        read_midi(data)
    assert not any(python in str(refused.value) for python in ("b'", "max_", "0x", "\\x"))


def test_ten_thousand_tracks_of_every_channel_and_program_are_read():
    events = b"".join(bytes([0, 0xC0 | channel, channel, 0, 0x90 | channel, 60, 1]) for channel in range(16))
    tracks = [chunk(b"MTrk", events + b"\x10\xff\x2f\x00")] * 10_000
    assert len(read_midi(midi(*tracks))) == 150_000


@pytest.mark.parametrize("shift", range(4))
def test_running_status_goes_on_in_long_tracks(shift):
    """Of one data byte, then of two: also where the reader goes from one part of the file to the next."""
    text = (0, b"\xff\x01" + bytes([shift]) + bytes(shift))
    programs = [(tick, b"\xc0\x05" if tick == 1 else b"\x06") for tick in range(1, 30_000)]
    played = [(30_000 + tick, on(60) if tick == 0 else bytes([60, 0 if tick % 2 else 64])) for tick in range(70_000)]
    read = read_midi(midi(track(text, *programs, *played)))
    assert len(read) == 35_000
    assert (read.onset_s[0], read.onset_s[-1]) == (30.0, 99.998)
