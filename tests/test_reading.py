"""What a person plays, as the model reads it: the encoding of the notes, which grows at its end."""

import numpy as np
import pytest
from played import PHRASE

from app.web.reading import Reading, rest_tokens
from app.web.timeline import Refused, Timeline
from music_ar import Performance, encode
from music_ar.tokens import vocabulary


def test_a_reading_is_the_encoding_of_the_notes():
    timeline = Timeline.read({"played": PHRASE, "answered": [[2.0, "on", 50, 70], [2.5, "off", 50]]})
    notes = Performance(
        onset_s=np.array([0.5123, 0.7, 2.0]),
        offset_s=np.array([1.5, 1.5, 2.5]),
        pitch=np.array([60, 64, 50]),
        velocity=np.array([80, 70, 70]),
    )
    assert Reading(timeline).tokens.tolist() == [vocabulary.START, *encode(notes).tolist()]


def test_a_reading_grows_at_its_end():
    """So that the model reads each event once: what is settled never changes."""
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.integers(0, 30, 300)) / 1000
    events = []
    for time_s in times.tolist():
        kind = ("on", "off", "pedal")[rng.integers(3)]
        number = int(rng.integers(60, 66)) if kind != "pedal" else 127 * int(rng.integers(2))
        events.append([time_s, kind, number, 70] if kind == "on" else [time_s, kind, number])
    whole, settled = Reading(Timeline.read({"played": events})).tokens.tolist(), []
    for count in range(len(events)):
        settled = Reading(Timeline.read({"played": events[:count]})).settled.tolist()
        assert settled == whole[: len(settled)]
    assert len(settled) > len(whole) - 20


def test_notes_that_sound_are_open_until_the_model_ends_them():
    held = Timeline.read({"played": PHRASE[:4]})
    reading = Reading(held)
    assert reading.sounding == [60, 64]
    assert vocabulary.NOTE_OFF + 60 not in reading.tokens
    released = Timeline.read({"played": PHRASE[:4], "answered": [[2.0, "release", 60]]})
    assert Reading(released).sounding == [64]
    assert Reading(released).tokens[-1] == vocabulary.NOTE_OFF + 60
    assert Reading(Timeline.read({"played": PHRASE, "answered": [[2.0, "release", 60]]})).last_s == 1.5


def test_long_rests_are_shorter_for_the_model():
    events = [[0.0, "on", 60, 80], [0.5, "off", 60], [100.5, "on", 62, 80], [101.0, "off", 62]]
    reading = Reading(Timeline.read({"played": events}))
    assert reading.end_step == 500
    assert reading.step(102.0) == 600
    assert reading.step(1000.0) == 900


@pytest.mark.parametrize("steps", [0, 1, 99, 100, 101, 200, 399, 400])
def test_a_rest_is_written_as_the_encoder_does(steps):
    onset_s = np.array([0.0, 0.01 + steps / 100])
    notes = Performance(onset_s=onset_s, offset_s=onset_s + 0.01, pitch=np.array([60, 60]), velocity=np.array([80, 80]))
    tokens = encode(notes)
    first_off, second_on = np.flatnonzero(tokens == vocabulary.NOTE_OFF + 60)[0], np.flatnonzero(tokens == 60)[1]
    assert rest_tokens(steps).tolist() == tokens[first_off + 1 : second_on].tolist()


def test_a_timeline_is_not_too_long():
    with pytest.raises(Refused, match="at most 20,000 notes"):
        Timeline.read({"notes": [[0, 1, 60, 80]] * 20_001})
