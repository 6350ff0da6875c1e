"""A prompt comes back as it was: its file's own events, then the continuation."""

import dataclasses
import io

import mido
import numpy as np
import pytest
from event_tokens import off, on, shift, tokens_of, velocity
from hypothesis import given, settings
from hypothesis import strategies as st
from midi_playback import Message, assert_sounds_alike, messages, played

from music_ar.decoding.request import Request
from music_ar.decoding.sequence import Sequence
from music_ar.midi import Performance, read_midi, read_prompt, write_midi

NEW_NOTES = tokens_of(velocity(20), shift(20), on(72), shift(30), off(72), on(76), on(79), shift(60), off(76), off(79))


def continued(
    data: bytes, tokens: np.ndarray = NEW_NOTES, *, prompt_seconds: float | None = None, start_s: float = 0.0
) -> Performance:
    """The piece that a model gives which generates these tokens."""
    prompt = read_prompt(data)
    request = Request(prompt=prompt.crop(start_s) if start_s else prompt, prompt_seconds=prompt_seconds)
    assert isinstance(request.prompt, Performance)
    sequence = Sequence(request.prompt_tokens(), request.prompt)
    sequence.add(tokens)
    return sequence.notes().performance()


def written(piece: Performance, *, pedal: bool = False) -> bytes:
    buffer = io.BytesIO()
    write_midi(piece, buffer, pedal=pedal)
    return buffer.getvalue()


def of_file(piece: Performance, midi: bytes) -> Performance:
    """The same notes, said to continue another file."""
    assert piece.prompt_file is not None
    return dataclasses.replace(piece, prompt_file=dataclasses.replace(piece.prompt_file, midi=midi))


def file_of(*tracks: list[tuple[int, Message]], ticks_per_beat: int = 480, kind: int = 1) -> bytes:
    """A file of messages with their ticks."""
    file = mido.MidiFile(ticks_per_beat=ticks_per_beat, type=kind)
    for rows in tracks:
        track, last = mido.MidiTrack(), 0
        for tick, message in sorted(rows, key=lambda row: row[0]):
            track.append(message.copy(time=tick - last))
            last = tick
        file.tracks.append(track)
    buffer = io.BytesIO()
    file.save(file=buffer)
    return buffer.getvalue()


def note(start: int, end: int, pitch: int, force: int = 77, channel: int = 0) -> list[tuple[int, Message]]:
    """Its two messages."""
    return [
        (start, mido.Message("note_on", note=pitch, velocity=force, channel=channel)),
        (end, mido.Message("note_off", note=pitch, velocity=11, channel=channel)),
    ]


def pedal(tick: int, value: int, channel: int = 0) -> tuple[int, Message]:
    return tick, mido.Message("control_change", control=64, value=value, channel=channel)


def ticked(data: bytes) -> list[list[tuple[int, Message]]]:
    """The messages of each track with their ticks, without the ends of the tracks."""
    tracks = []
    for track in mido.MidiFile(file=io.BytesIO(data)).tracks:
        tick, rows = 0, []
        for message in track:
            tick += message.time
            if message.type != "end_of_track":
                rows.append((tick, message.copy(time=0)))
        tracks.append(rows)
    return tracks


SONG = file_of(
    [
        (0, mido.MetaMessage("track_name", name="Nocturne")),
        (0, mido.MetaMessage("set_tempo", tempo=600_000)),
        (0, mido.MetaMessage("time_signature", numerator=3, denominator=4)),
        (0, mido.MetaMessage("key_signature", key="Eb")),
        (720, mido.MetaMessage("set_tempo", tempo=450_000)),
        (960, mido.MetaMessage("marker", text="B")),
    ],
    [
        (0, mido.MetaMessage("track_name", name="Right hand")),
        (0, mido.Message("program_change", program=1)),
        pedal(0, 101),
        *note(7, 240, 72, 83),
        *note(480, 701, 75, 64),
        pedal(717, 3),
        pedal(731, 90),
        *note(725, 1201, 79, 51),
        pedal(1431, 0),
    ],
    [
        (0, mido.MetaMessage("track_name", name="Left hand")),
        *note(0, 1440, 48, 42, channel=1),
    ],
    [*note(0, 30, 36, 100, channel=9), *note(480, 510, 38, 99, channel=9)],
)  # fmt: skip
"""Two staves with their own pedals, a tempo change, drums, and names; it ends at tick 1440."""


@pytest.mark.parametrize("with_pedal", [False, True])
def test_every_event_of_the_prompt_comes_back(with_pedal):
    tracks = ticked(written(continued(SONG), pedal=with_pedal))
    assert tracks[:-1] == ticked(SONG)
    assert tracks[-1][0] == (0, mido.MetaMessage("track_name", name="Continuation"))
    assert min(tick for tick, message in tracks[-1] if message.type == "note_on") > 1440


def test_new_notes_follow_in_the_prompts_last_tempo_on_its_first_channel():
    piece = continued(SONG)
    join_s = 720 / 480 * 0.6 + 720 / 480 * 0.45
    new = piece.select(piece.onset_s > join_s)
    np.testing.assert_allclose(new.onset_s, [1.78, 2.08, 2.08])  # 0.2 s and 0.5 s after 1.58, the rounded end
    rows = [row for row in ticked(written(piece))[-1] if row[1].type == "note_on"]
    ticks_per_s = 480 / 0.45
    expected = [720 + round((onset_s - 0.9) * ticks_per_s) for onset_s in new.onset_s.tolist()]
    assert [(tick, message.note, message.channel) for tick, message in rows] == [
        (expected[0], 72, 0),
        (expected[1], 76, 0),
        (expected[2], 79, 0),
    ]


def test_velocities_and_times_are_the_prompts_own():
    read, piece = read_midi(SONG), continued(SONG)
    assert piece.select(np.arange(len(piece)) < len(read)) == read


def test_notes_that_sound_at_the_cut_end_where_the_model_ends_them():
    """The key of one is still down, that of the other is not, since the pedal holds it; both end at their times."""
    data = file_of([pedal(0, 127), *note(0, 100, 60), *note(0, 2000, 64), *note(480, 500, 67), pedal(3000, 0)])
    tokens = tokens_of(shift(30), off(64), shift(20), off(60), off(67), shift(10), on(60), shift(50), off(60))
    piece = continued(data, tokens, prompt_seconds=0.6)
    assert dict(zip(piece.pitch[:3].tolist(), piece.offset_s[:3].tolist(), strict=True)) == {60: 1.0, 64: 0.8, 67: 1.0}
    for with_pedal in (False, True):
        back = written(piece, pedal=with_pedal)
        assert_sounds_alike(played(back), piece, within_s=0.003)
        kept = [row for row in ticked(data)[0] if row[0] <= 500 and row[1].type != "note_off"]
        assert [row for row in ticked(back)[0] if row[1].type != "note_off"] == [*kept, pedal(480, 0)]


def test_a_note_that_is_never_released_and_a_held_pedal_end_with_the_prompt():
    data = file_of([*note(0, 480, 60), pedal(240, 127), *note(240, 360, 64)])
    piece = continued(data)
    back = written(piece, pedal=True)
    assert_sounds_alike(played(back), piece, within_s=0.003)
    assert pedal(480, 0) in ticked(back)[0]


def test_a_note_that_ends_just_after_the_last_step_is_not_cut_by_the_next_of_its_pitch():
    """It ends 4 ms after the step to which its end is rounded, at which the model strikes it again."""
    data = file_of(note(0, 484, 60))
    piece = continued(data, tokens_of(on(60), shift(40), off(60)))
    assert piece.offset_s[0] > piece.onset_s[1] == 0.5
    back = ticked(written(piece))
    assert back[0] == ticked(data)[0]
    assert [tick for tick, message in back[1] if message.type == "note_on"] == [484]


def test_a_cropped_prompt_keeps_what_holds_at_its_beginning():
    """As the page crops it: names, instrument, and the tempo; notes that began before are left out."""
    piece = continued(SONG, start_s=0.902)
    back = written(piece)
    assert_sounds_alike(played(back), piece, within_s=0.003)
    tracks = ticked(back)
    assert (0, mido.MetaMessage("set_tempo", tempo=450_000)) in tracks[0]
    assert (0, mido.MetaMessage("track_name", name="Right hand")) in tracks[1]
    assert (0, mido.Message("program_change", program=1)) in tracks[1]
    assert [message.text for _, message in tracks[0] if message.type == "marker"] == ["B"]


def test_the_continuation_alone_has_nothing_of_the_prompts_file():
    data = SONG
    prompt = read_prompt(data)
    sequence = Sequence(Request(prompt=prompt).prompt_tokens(), prompt)
    sequence.add(NEW_NOTES)
    alone = sequence.notes().performance(continuation_only=True)
    assert b"Nocturne" not in written(alone)
    assert_sounds_alike(read_midi(written(alone)), alone, within_s=0.001)


def test_a_continued_piece_can_be_continued():
    first = continued(SONG)
    tokens = Request(prompt=first).prompt_tokens()
    sequence = Sequence(tokens, first)
    sequence.add(NEW_NOTES)
    piece = sequence.notes().performance()
    assert ticked(written(piece))[:-1] == ticked(SONG)
    assert_sounds_alike(read_midi(written(piece)), piece, within_s=0.003)


def test_a_coarse_clock_is_divided_for_the_new_notes():
    """24 ticks per beat are 21 ms each; those of the prompt stay where they were."""
    data = file_of(
        [(0, mido.MetaMessage("track_name", name="Old")), *note(0, 24, 60), *note(24, 48, 64)], ticks_per_beat=24
    )
    piece = continued(data)
    back = written(piece)
    assert mido.MidiFile(file=io.BytesIO(back)).ticks_per_beat == 24 * 5
    assert [(tick // 5, message) for tick, message in ticked(back)[0]] == ticked(data)[0]
    assert_sounds_alike(read_midi(back), piece, within_s=0.003)


@pytest.mark.parametrize("division", [b"\xe7\x28", b"\xe8\x04"])
def test_files_that_count_frames_are_continued(division):
    data = file_of([(0, mido.MetaMessage("track_name", name="Film")), *note(0, 40, 60), *note(40, 83, 64)])
    data = data[:12] + division + data[14:]
    piece = continued(data)
    assert b"Film" in written(piece)
    assert_sounds_alike(read_midi(written(piece)), piece, within_s=0.003)


def test_a_single_track_file_and_one_in_a_wrapper():
    smf = file_of([(0, mido.MetaMessage("track_name", name="Solo")), *note(0, 480, 60)], kind=0)
    wrapped = b"RIFF" + (len(smf) + 12).to_bytes(4, "little") + b"RMIDdata" + len(smf).to_bytes(4, "little") + smf
    piece = continued(smf)
    assert ticked(written(piece))[0] == ticked(smf)[0]
    piece = of_file(piece, wrapped)
    assert len(read_midi(written(piece))) == len(piece)


def test_where_the_file_does_not_fit_the_notes_alone_are_written():
    piece = continued(SONG)
    other = file_of([*note(0, 480, 60)])
    piece = of_file(piece, other)
    for with_pedal in (False, True):
        assert_sounds_alike(read_midi(written(piece, pedal=with_pedal)), piece, within_s=0.001)


@st.composite
def prompt_files(draw) -> bytes:
    """Files of several tracks and channels with pedals, tempos and drums; one note of a pitch and channel at a time."""
    tracks = []
    for number in range(draw(st.integers(1, 3))):
        channel, tick, rows = draw(st.sampled_from([0, 0, 1, 5, 9])), 0, []
        channel = (channel + number) % 16 if channel != 9 else 9
        busy: dict[int, int] = {}
        for _ in range(draw(st.integers(1, 15))):
            tick += draw(st.integers(0, 300))
            kind = draw(st.sampled_from(["note", "note", "note", "pedal", "tempo", "text"]))
            if kind == "note" and busy.get(pitch := draw(st.integers(60, 64)), 0) <= tick:
                busy[pitch] = tick + draw(st.integers(1, 900))
                rows += note(tick, busy[pitch], pitch, draw(st.integers(1, 127)), channel)
            elif kind == "pedal":
                rows.append(pedal(tick, draw(st.sampled_from([0, 127])), channel))
            elif kind == "tempo":
                rows.append((tick, mido.MetaMessage("set_tempo", tempo=draw(st.integers(200_000, 1_500_000)))))
            elif kind == "text":
                rows.append((tick, mido.MetaMessage("text", text="dolce")))
        tracks.append(rows)
    tracks.append(note(0, 100, 50, channel=14))  # so that there is a note to continue from
    return file_of(*tracks, ticks_per_beat=draw(st.sampled_from([24, 96, 384, 480, 960])))


@settings(max_examples=40)
@given(
    prompt_files(),
    st.none() | st.floats(0.1, 3.0),
    st.lists(st.tuples(st.integers(0, 150), st.integers(58, 66), st.integers(1, 200)), max_size=12),
    st.booleans(),
)
def test_any_prompt_comes_back_and_is_continued(data, prompt_seconds, new, with_pedal):
    events = []
    time = 0
    for wait, pitch, length in new:
        time += wait
        events += [(time, 1, on(pitch)), (time + length, 0, off(pitch))]
    tokens, now = [], 0
    for step, _, token in sorted(events):
        tokens += [shift(100)] * ((step - now) // 100) + ([shift((step - now) % 100)] if (step - now) % 100 else [])
        tokens, now = [*tokens, token], step
    piece = continued(data, tokens_of(*tokens), prompt_seconds=prompt_seconds)
    back = written(piece, pedal=with_pedal)
    assert_sounds_alike(read_midi(back), piece, within_s=0.01)
    # Each track begins with its own events up to the end of the prompt; only key releases may move.
    assert piece.prompt_file is not None
    end_s = piece.prompt_file.end_s - 0.01

    def lasting(file: bytes) -> list[list[Message]]:
        kept = [row for row in messages(file) if row[0] < end_s and row[2].type not in ("note_off", "end_of_track")]
        return [[message.copy(time=0) for _, number, message in kept if number == track] for track in range(count)]

    count = len(mido.MidiFile(file=io.BytesIO(data)).tracks)
    assert lasting(back) == lasting(data)
