"""A live state is what reading the whole piece anew would give; live notes are those of the written file."""

import io
import math

import mido
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from music_ar import MidiError, Performance, decode, encode, read_midi
from music_ar.decoding.interface import shared_options
from music_ar.decoding.live import LiveState, aligned
from music_ar.decoding.sampling import SamplingOptions
from music_ar.midi.live import LiveNotes, Touch, duet_file
from music_ar.tokens import vocabulary

LATENTS = 60
OPTIONS = shared_options(SamplingOptions())
each_decoder = pytest.mark.parametrize(
    "decoder", ["native", pytest.param("jax", marks=pytest.mark.slow)], indirect=True
)
"""In fast runs JAX is used by one test only, since it compiles for long."""


@pytest.fixture(scope="module")
def piece():
    rng = np.random.default_rng(0)
    onset_s = np.cumsum(rng.integers(0, 33, 120)) / 100
    pitch, velocity = rng.integers(30, 100, 120), rng.integers(20, 110, 120)
    notes = Performance(
        onset_s=onset_s, offset_s=onset_s + rng.integers(5, 150, 120) / 100, pitch=pitch, velocity=velocity
    )
    return np.concatenate([[vocabulary.START], encode(notes)]).astype(np.int32)


def next_logits(decoder, live):
    """The logits of the token after the last one, computed from a live state."""
    state = live._state.rows([0])
    return np.asarray(decoder.teacher_force(state, np.array([[vocabulary.NOTE_ON + 60]], np.int32))[1])[0, 0]


def anew(decoder, tokens):
    live = LiveState(decoder, latents=LATENTS)
    live.follow(tokens)
    return live


def test_what_is_appended_gives_the_logits_of_a_fresh_prefill(decoder, piece):
    """As long as the window of latents is not full: afterwards a prefill computes older latents as in training."""
    live = LiveState(decoder, latents=LATENTS)
    for length in (50, 51, 54, 60):
        live.follow(piece[:length])
    assert live.tokens.tolist() == piece[:60].tolist()
    np.testing.assert_allclose(next_logits(decoder, live), next_logits(decoder, anew(decoder, piece[:60])), atol=2e-3)


@each_decoder
def test_only_what_is_new_is_read(decoder, piece):
    live = LiveState(decoder, latents=LATENTS)
    assert live.follow(piece[:50]) == 50
    assert live.follow(piece[:50]) == 0
    assert live.follow(piece[:70]) == 20


@each_decoder
def test_what_was_not_heard_leaves_no_trace(decoder, piece):
    heard, plain = anew(decoder, piece[:50]), anew(decoder, piece[:50])
    heard.mark()
    sampled = [heard.sample(OPTIONS, length=16, until_step=10**6, seed=3) for _ in range(12)]
    tokens = np.concatenate(sampled)
    # It takes longer to read what follows the copies than those at the beginning, so few are read.
    for kept in (len(tokens) - 1, len(tokens) - 60, 0):
        assert heard.follow(np.concatenate([piece[:50], tokens[:kept], piece[50:80]])) <= 30 + 64
    plain.follow(piece[:80])
    np.testing.assert_array_equal(next_logits(decoder, heard), next_logits(decoder, plain))


@each_decoder
def test_decoding_goes_on_from_given_tokens_as_from_its_own(decoder, piece):
    one, other = anew(decoder, piece[:50]), anew(decoder, piece[:50])
    tokens = np.concatenate([one.sample(OPTIONS, length=16, until_step=10**6, seed=1) for _ in range(2)])
    other.follow(np.concatenate([piece[:50], tokens[:9]]))
    assert other.sample(OPTIONS, length=16, until_step=10**6, seed=1).tolist() == tokens[9:25].tolist()


orders = st.lists(st.tuples(st.integers(0, 6), st.integers(60, 63), st.integers(0, 3)), min_size=1, max_size=40)


@given(orders, st.integers(0, 40), st.randoms(use_true_random=False))
def test_the_same_music_in_other_words_is_not_read_again(rows, extra, random):
    """The model may write events of one time step in another order, shifts in parts, and velocities that stay."""
    onsets = np.sort(np.array([row[0] for row in rows])) * 1.37
    notes = Performance(
        onset_s=onsets,
        offset_s=onsets + 0.5 + 0.25 * np.array([row[2] for row in rows]),
        pitch=np.array([row[1] for row in rows]),
        velocity=np.array([40 + 20 * row[2] for row in rows]),
    )
    tokens = np.concatenate([[vocabulary.START], encode(notes)]).astype(np.int32)
    other = [vocabulary.START]
    for token in tokens[1:].tolist():
        if vocabulary.is_shift(token) and token > vocabulary.TIME_SHIFT:
            part = random.randint(vocabulary.TIME_SHIFT, token - 1)
            other += [part, vocabulary.TIME_SHIFT + token - part - 1]
        else:
            other += [token, token] if vocabulary.is_velocity(token) else [token]
    read = np.array([*other[: max(1, len(other) - extra)], *([60, 62] if extra else [])], np.int32)
    found = aligned(read, tokens)
    assert decode(found) == decode(tokens)
    kept = int((np.cumsum(found[: len(read)] != read[: len(found)]) == 0).sum())
    assert kept >= len(other) - extra - 25 if extra else found.tolist() == other


@each_decoder
def test_a_state_that_was_freed_reads_everything_anew(decoder, piece):
    live = anew(decoder, piece[:50])
    live.mark()
    live.free()
    assert live.follow(piece[:60]) == 60


@each_decoder
def test_sampling_stops_at_a_time(decoder, piece):
    live = anew(decoder, piece[:50])
    live.follow(piece[:60])
    before = sum(int(token) - 255 for token in piece[:60] if 256 <= token < 356)
    while len(tokens := live.sample(OPTIONS, length=16, until_step=before + 300, seed=2)):
        assert vocabulary.END not in tokens
    steps = sum(int(token) - 255 for token in live.tokens if 256 <= token < 356)
    assert before + 300 <= steps < before + 400


def midi_events(data):
    """Channel messages as (milliseconds, track name, type, number, value)."""
    found = []
    for track in mido.MidiFile(file=io.BytesIO(data)).tracks:
        tick, name = 0, ""
        for message in track:
            tick += message.time
            if message.type == "track_name":
                name = message.name
            elif message.type == "control_change":
                found.append((tick / 2, name, "pedal", message.control, message.value))
            elif message.type in ("note_on", "note_off"):
                found.append((tick / 2, name, message.type, message.note, message.velocity))
    return found


def _touch(time, kind, pitch, velocity):
    number = velocity if kind == "pedal" else pitch
    return Touch(time / 100, kind, number, velocity if kind == "on" else 0)


touches = st.lists(
    st.tuples(
        st.integers(0, 400),
        st.sampled_from(["on", "on", "off", "off", "pedal"]),
        st.integers(60, 64),
        st.integers(1, 127),
    ),
    min_size=1,
    max_size=60,
).map(lambda rows: [_touch(*row) for row in sorted(rows, key=lambda row: row[0])])


@given(touches)
def test_what_was_played_is_written_as_it_was(played):
    if not any(touch.kind == "on" for touch in played):
        with pytest.raises(MidiError, match="nothing has been played"):
            duet_file(Performance.empty(), played, Performance.empty())
        return
    kinds = {"on": "note_on", "off": "note_off", "pedal": "pedal"}
    found = midi_events(duet_file(Performance.empty(), played, Performance.empty()))
    for touch, (milliseconds, name, kind, number, value) in zip(played, found, strict=False):
        assert (name, kind) == ("Played", kinds[touch.kind])
        assert abs(milliseconds - 1000 * touch.time_s) <= 0.5
        if touch.kind == "pedal":
            assert (number, value) == (64, touch.number)
        else:
            assert number == touch.number
            assert value == touch.velocity or touch.kind == "off"
    down = {touch.number for touch in played if touch.kind == "on"}
    assert {number for *_, kind, number, _ in found[len(played) :] if kind != "pedal"} <= down


@given(touches)
def test_live_notes_sound_like_the_file(played):
    """For keys that are struck again only after they came up, and moments at which only one thing happens."""
    notes, events, down, last_s = LiveNotes(), [], set(), -1.0
    for touch in played:
        is_odd = touch.kind == "on" and touch.number in down
        if touch.time_s == last_s or is_odd:
            continue
        last_s = touch.time_s
        if touch.kind != "pedal":
            (down.add if touch.kind == "on" else down.discard)(touch.number)
        notes.add(touch)
        events.append(touch)
    if not notes.pitch:
        return
    events += [Touch(9.0, "off", pitch) for pitch in sorted(down)] + [Touch(9.01, "pedal", 0)]
    for touch in events[-len(down) - 1 :]:
        notes.add(touch)
    assert all(math.isfinite(end_s) for end_s in notes.offset_s)
    read = read_midi(duet_file(Performance.empty(), events, Performance.empty()))
    live = Performance(
        onset_s=np.array(notes.onset_s),
        offset_s=np.array(notes.offset_s),
        pitch=np.array(notes.pitch),
        velocity=np.array(notes.velocity),
    )
    assert read.pitch.tolist() == live.pitch.tolist()
    np.testing.assert_allclose(read.onset_s, live.onset_s, atol=1e-6)
    np.testing.assert_allclose(read.offset_s, live.offset_s, atol=1e-6)


def test_the_parts_of_a_duet_have_tracks_of_their_own():
    before = Performance(onset_s=np.zeros(1), offset_s=np.ones(1), pitch=np.array([40]), velocity=np.array([50]))
    played = [Touch(2.0, "on", 60, 80), Touch(2.5, "off", 60)]
    answers = before.shift(3)
    found = midi_events(duet_file(before, played, answers))
    assert {name for _, name, *_ in found} == {"Before", "Played", "Answers"}
    assert read_midi(duet_file(before, played, answers)).onset_s.tolist() == [0.0, 2.0, 3.0]
