"""`read_midi` equals a slow player that follows the events one by one, on files of every grammar."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from midi_files import chunk, midi, wait
from midi_player import Damaged, play

from music_ar.midi import MidiError, read_midi

PITCHES = st.sampled_from([60, 61])
CHANNELS = st.sampled_from([0, 0, 0, 1, 9])
CONTROLLERS = st.sampled_from([64, 64, 64, 64, 7, 66, 120, 121, 123, 126])
VALUES = st.sampled_from([0, 63, 64, 127])
NOISE = st.sampled_from(
    [
        b"\xf0\x03\x43\x12\x00", b"\xf7\x02\x90\x3c", b"\xf7\x00", b"\xf8", b"\xf2\x01\x02", b"\xf3\x05", b"\xf6",
        b"\xff\x01\x03abc", b"\xff\x51\x01\x07", b"\xff\x21\x01\x01", b"\xff\x21\x01\x00",
        b"\xff\x7f\x81\x00" + bytes(128),
    ]
)  # fmt: skip


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """Status byte and data of one event."""
    kind = draw(st.sampled_from([0x80, 0x90, 0x90, 0xB0, 0xB0, 0xC0, 0xE0, 0xFF]))
    if kind == 0xFF:
        return draw(NOISE)
    status = bytes([kind | draw(CHANNELS)])
    if kind == 0xB0:
        return status + bytes([draw(CONTROLLERS), draw(VALUES)])
    if kind == 0xC0:
        return status + bytes([draw(PITCHES)])
    return status + bytes([draw(PITCHES), draw(st.sampled_from([0, 1, 100]))])


@st.composite
def tracks(draw: st.DrawFn) -> bytes:
    """The contents of a track: many events at few ticks, often under running status."""
    data, running = b"", None
    for message in draw(st.lists(messages(), max_size=24)):
        data += wait(draw(st.sampled_from([0, 0, 1, 3, 200])))
        status = message[0]
        data += message[1:] if status == running and draw(st.booleans()) else message
        if status not in (0xF8, 0xFF):
            running = status if status < 0xF0 else None
    if draw(st.booleans()):
        data += wait(draw(st.sampled_from([0, 5]))) + b"\xff\x2f\x00" + draw(st.sampled_from([b"", b"\0\x90\x3c\x40"]))
    return data


def check(*contents: bytes) -> None:
    """Compare what is read in ticks of 1 ms with what the player plays."""
    try:
        expected = play(list(contents))
    except Damaged:
        expected = None
    data = midi(*(chunk(b"MTrk", content) for content in contents))
    if not expected:
        with pytest.raises(MidiError):
            read_midi(data)
        return
    read = read_midi(data)
    onset, end = np.rint(read.onset_s * 1000).astype(int), np.rint(read.offset_s * 1000).astype(int)
    rows = zip(onset.tolist(), end.tolist(), read.pitch.tolist(), read.velocity.tolist(), strict=True)
    assert sorted(rows) == expected


@settings(max_examples=300)
@given(st.lists(tracks(), min_size=1, max_size=3))
def test_reading_equals_playing(contents):
    check(*contents)


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=2))
def test_any_track_is_refused_exactly_if_the_player_stumbles(contents):
    check(*contents)


@settings(max_examples=200)
@given(tracks(), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=3))
def test_damaged_tracks_are_refused_exactly_if_the_player_stumbles(content, changes):
    damaged = bytearray(content)
    for position, value in changes:
        if damaged:
            damaged[position % len(damaged)] = value
    check(bytes(damaged))
