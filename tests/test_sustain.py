"""Controllers act on their channel, in the order of the file: sustain pedal, all notes off, all sound off, reset."""

import pytest
from midi_files import DOWN, PROGRAM, UP, midi, notes, off, on, pedal, track

from music_ar.midi import read_midi


def control(number: int, value: int = 0, channel: int = 0) -> bytes:
    return bytes([0xB0 | channel, number, value])


def end(tick_of_last_event: int) -> bytes:
    """A track that ends later than the notes."""
    return track((tick_of_last_event, b"\xff\x01\x00"))


@pytest.mark.parametrize(
    ("case", "events", "offsets"),
    [
        ("no pedal", [(0, on(60)), (100, off(60))], [0.1]),
        ("held until the pedal comes up", [(0, pedal(DOWN)), (10, on(60)), (20, off(60)), (90, pedal(UP))], [0.09]),
        ("64 is down, 63 is up", [(0, pedal(64)), (10, on(60)), (20, off(60)), (90, pedal(63))], [0.09]),
        ("pedal down after the key came up", [(0, on(60)), (10, off(60)), (20, pedal(DOWN)), (90, pedal(UP))], [0.01]),
        ("key held longer than the pedal", [(0, pedal(DOWN)), (0, on(60)), (50, pedal(UP)), (70, off(60))], [0.07]),
        ("pedal up as the key comes up", [(0, pedal(DOWN)), (0, on(60)), (50, off(60)), (50, pedal(UP))], [0.05]),
        ("key up, then pedal down", [(0, on(60)), (50, off(60)), (50, pedal(DOWN)), (80, pedal(UP))], [0.05]),
        ("pedal down, then key up", [(0, on(60)), (50, pedal(DOWN)), (50, off(60)), (80, pedal(UP))], [0.08]),
        ("pedal down, pedal up, key up", [(0, on(60)), (50, pedal(DOWN)), (50, pedal(UP)), (50, off(60))], [0.05]),
        (
            "pedal up, pedal down, key up",
            [(0, on(60)), (50, pedal(UP)), (50, pedal(DOWN)), (50, off(60)), (80, pedal(UP))],
            [0.08],
        ),
        (
            "a pedal change ends what was held before, and holds what follows",
            [
                *[(0, pedal(DOWN)), (0, on(60)), (40, off(60)), (50, pedal(UP))],
                *[(50, pedal(DOWN)), (50, on(64)), (60, off(64)), (90, pedal(UP))],
            ],
            [0.05, 0.09],
        ),
        (
            "same pitch again cuts",
            [(0, pedal(DOWN)), (0, on(60)), (10, off(60)), (40, on(60)), (50, off(60)), (90, pedal(UP))],
            [0.04, 0.09],
        ),
        (
            "another pitch does not cut",
            [(0, pedal(DOWN)), (0, on(60)), (10, off(60)), (40, on(61)), (50, off(61)), (90, pedal(UP))],
            [0.09, 0.09],
        ),
        (
            "pedal never up: until the last event",
            [(0, pedal(DOWN)), (0, on(60)), (10, off(60)), (70, pedal(100))],
            [0.07],
        ),
    ],
)
def test_sustain_pedal(case, events, offsets):
    assert read_midi(midi(track(*events))).offset_s.round(6).tolist() == offsets, case


@pytest.mark.parametrize(
    ("case", "tracks"),
    [
        (
            "in the track of the other hand",
            [
                track((0, pedal(DOWN)), (0, on(72)), (48, off(72)), (192, pedal(UP))),
                track((0, on(48)), (48, off(48))),
            ],
        ),
        (
            "in a track of its own, before the notes",
            [track((0, pedal(DOWN)), (192, pedal(UP))), track((0, on(48)), (0, on(72)), (48, off(48)), (48, off(72)))],
        ),
        (
            "in a track of its own, after the notes",
            [track((0, on(48)), (0, on(72)), (48, off(48)), (48, off(72))), track((0, pedal(DOWN)), (192, pedal(UP)))],
        ),
        (
            "while the program changes",
            [
                track(
                    (0, pedal(DOWN)), (0, on(48)), (10, off(48)), (20, bytes([PROGRAM, 5])),
                    (20, on(72)), (48, off(72)), (60, bytes([PROGRAM, 6])), (192, pedal(UP)),
                )
            ],
        ),
    ],
)  # fmt: skip
def test_the_pedal_acts_on_its_channel_whatever_its_track_and_program(case, tracks):
    read = read_midi(midi(*tracks))
    assert (read.pitch.tolist(), read.offset_s.round(6).tolist()) == ([48, 72], [0.192, 0.192]), case


def test_the_pedal_acts_on_its_own_channel_alone():
    data = midi(
        track(
            (0, pedal(DOWN, 0)), (0, on(60)), (0, on(70, channel=1)), (10, off(60)), (10, off(70, 1)), (90, pedal(UP))
        )
    )
    assert notes(read_midi(data)) == [(0, 0.09, 60, 64), (0, 0.01, 70, 64)]


PORT_1 = b"\xff\x21\x01\x01"


@pytest.mark.parametrize(
    ("mark", "other_mark", "offset_s"),
    [
        (b"\xff\x01\x00", b"\xff\x01\x00", 0.09),
        (b"\xff\x21\x01\x00", b"\xff\x01\x00", 0.09),
        (PORT_1, PORT_1, 0.09),
        (PORT_1, b"\xff\x01\x00", 0.01),
        (b"\xff\x09\x02P1", b"\xff\x09\x02P1", 0.09),
        (b"\xff\x09\x02P1", b"\xff\x01\x00", 0.09),
        (b"\xff\x09\x02P1", b"\xff\x09\x02P2", 0.01),
    ],
)
def test_every_port_has_its_own_channels(mark, other_mark, offset_s):
    played = track((0, mark), (0, on(60)), (10, off(60)))
    moved = track((0, other_mark), (0, pedal(DOWN)), (90, pedal(UP)))
    assert read_midi(midi(played, moved)).offset_s.round(6).tolist() == [offset_s]
    assert read_midi(midi(moved, played)).offset_s.round(6).tolist() == [offset_s]


def test_drums_of_every_port_are_dropped():
    drums = track((0, PORT_1), (0, on(36, channel=9)), (50, off(36, channel=9)))
    assert notes(read_midi(midi(drums, track((0, on(60)), (10, off(60)))))) == [(0, 0.01, 60, 64)]


@pytest.mark.parametrize("number", [123, 124, 125, 126, 127])
def test_all_notes_off_releases_the_keys_of_its_channel(number):
    events = [(0, on(60)), (0, on(64)), (0, on(67, channel=1)), (50, control(number)), (80, off(67, 1)), (90, off(60))]
    assert notes(read_midi(midi(track(*events)))) == [(0, 0.05, 60, 64), (0, 0.05, 64, 64), (0, 0.08, 67, 64)]


def test_all_notes_off_leaves_to_the_pedal_what_it_holds():
    events = [(0, pedal(DOWN)), (0, on(60)), (50, control(123)), (90, pedal(UP)), (95, off(60))]
    assert notes(read_midi(midi(track(*events)))) == [(0, 0.09, 60, 64)]


def test_all_sound_off_silences_keys_and_pedal():
    held, pressed = [(0, on(60)), (10, off(60))], [(20, on(64))]
    events = [(0, pedal(DOWN)), *held, *pressed, (50, control(120)), (60, on(67)), (70, off(67)), (90, pedal(UP))]
    assert notes(read_midi(midi(track(*events)))) == [(0, 0.05, 60, 64), (0.02, 0.05, 64, 64), (0.06, 0.09, 67, 64)]


def test_resetting_controllers_raises_the_pedal_and_releases_no_key():
    events = [
        (0, pedal(DOWN)),
        (0, on(60)),
        (10, off(60)),
        (20, on(64)),
        (50, control(121)),
        (70, off(64)),
        (90, pedal(UP)),
    ]
    assert notes(read_midi(midi(track(*events)))) == [(0, 0.05, 60, 64), (0.02, 0.07, 64, 64)]


def test_a_note_that_begins_after_all_notes_off_at_the_same_tick_sounds():
    events = [(0, on(60)), (50, control(123)), (50, on(60)), (80, off(60))]
    assert notes(read_midi(midi(track(*events)))) == [(0, 0.05, 60, 64), (0.05, 0.08, 60, 64)]


def test_other_controllers_change_no_note():
    events = [(0, on(60)), *[(10, control(number, 127)) for number in (1, 7, 11, 65, 66, 67, 88, 122)], (50, off(60))]
    assert notes(read_midi(midi(track(*events)))) == [(0, 0.05, 60, 64)]


def test_the_samples_of_a_continuous_pedal_at_one_tick_leave_it_up_if_one_is_up():
    """As in note-seq: MAESTRO has such moments."""
    sweep = [(tick, pedal(12 * tick)) for tick in range(11)]
    events = [*sweep, (20, on(60)), (30, off(60)), (50, pedal(40)), (50, pedal(90)), (50, on(64)), (60, off(64))]
    assert notes(read_midi(midi(track(*events, (90, pedal(UP)))))) == [(0.02, 0.05, 60, 64), (0.05, 0.06, 64, 64)]


def test_a_chord_that_is_never_released_sounds_to_the_end_of_the_file():
    chord = track((0, on(60)), (0, on(64)), (100, on(67)), (150, off(67)), end=b"\x83\x60\xff\x2f\x00")
    assert notes(read_midi(midi(chord))) == [(0, 0.63, 60, 64), (0, 0.63, 64, 64), (0.1, 0.15, 67, 64)]
    assert read_midi(midi(chord, end(2000))).offset_s.round(6).tolist() == [2, 2, 0.15]


def test_a_note_that_its_track_never_releases_ends_with_the_next_event_of_its_pitch_and_channel():
    other = track((0, on(60, channel=1)), (70, off(60)), (80, off(60, channel=1)))
    assert notes(read_midi(midi(track((0, on(60, 9))), other, end(500)))) == [(0, 0.07, 60, 9), (0, 0.08, 60, 64)]
    struck_again = midi(track((0, on(60, 1)), (0, on(60, 2)), (30, on(60, 3))), end(500))
    assert notes(read_midi(struck_again)) == [(0, 0.03, 60, 1), (0, 0.03, 60, 2), (0.03, 0.5, 60, 3)]


def test_two_hands_on_one_channel_release_their_own_notes():
    hands = track((0, on(60, 1)), (50, off(60))), track((20, on(60, 2)), (90, off(60)))
    assert notes(read_midi(midi(*hands))) == [(0, 0.05, 60, 1), (0.02, 0.09, 60, 2)]


def test_a_note_that_is_struck_again_before_its_note_off_at_the_same_tick_goes_on():
    repeated = [(0, on(60, 1)), (50, on(60, 2)), (50, off(60)), (90, on(60, 3)), (90, off(60)), (99, off(60))]
    assert notes(read_midi(midi(track(*repeated)))) == [(0, 0.05, 60, 1), (0.05, 0.09, 60, 2), (0.09, 0.099, 60, 3)]


@pytest.mark.parametrize("wedge", [b"\xf0\x03\x43\x12\xf7", b"\xf7\x02\x90\x3c", b"\xff\x01\x00"])
def test_program_changes_and_system_events_do_not_part_a_note_from_its_note_off(wedge):
    events = [(0, on(60)), (10, bytes([PROGRAM, 40])), (20, wedge), (50, off(60))]
    assert notes(read_midi(midi(track(*events)))) == [(0, 0.05, 60, 64)]


def test_many_devices_have_channels_of_their_own():
    """Up to 256, as many as ports have numbers."""
    tracks = [
        track(
            (0, b"\xff\x09\x02" + number.to_bytes(2)),
            (0, pedal(DOWN if number == 7 else UP)),
            (0, on(60)),
            (9, off(60)),
        )
        for number in range(600)
    ]
    read = read_midi(midi(*tracks, track((500, pedal(UP, channel=3)))))
    assert sorted(read.offset_s.round(6).tolist()) == [0.009] * 599 + [0.5]
