"""Sessions, settings and takes, without a page."""

import threading
from pathlib import Path
from urllib.parse import parse_qsl

import pytest

from app.web.session import Session, Settings, Studio, StudioError, write_file
from music_ar import Generator
from music_ar.generator import GenerationError
from music_ar.midi.io import read_midi


@pytest.fixture(scope="module")
def studio(tiny_checkpoint):
    return Studio(Generator.from_pretrained(tiny_checkpoint))


def make(studio, session, **settings):
    return list(studio.generate(session, Settings(latents=8, **settings)))[-1]


def test_a_link_brings_the_settings_back():
    settings = Settings(
        seconds=12.5, latents=128, variations=3, seed=7, end_s=4.0, continuation_only=True, prompt="Bach & söhne.mid"
    )
    assert Settings.read(dict(parse_qsl(settings.link()[1:]))) == settings
    assert Settings.read({}) == Settings() == Settings.read({"unknown": 1, "end_s": None, "seed": ""})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seconds": "long"}, "the length must be a number, got 'long'"),
        ({"seconds": None}, "the length must be a number, got nothing"),
        ({"seconds": float("nan")}, "the length must be a number"),
        ({"seconds": 1e9}, "length must lie in 1 to 3600 seconds"),
        ({"variations": 9}, "variations must lie in 1 to 8"),
        ({"seed": 1.5}, "the seed must be a whole number"),
        ({"start_s": 5, "end_s": 4}, "must end after it starts"),
    ],
)
def test_impossible_settings_are_told(values, message):
    with pytest.raises(StudioError, match=message):
        Settings.read(values)


def test_the_prompt_is_cropped_and_may_be_left_out(studio, midi_file):
    session = Session()
    session.set_prompt(midi_file.read_bytes(), "mine.mid")
    assert session.prompt is not None
    part = session.prompt.crop(5, 9)
    with_it = make(studio, session, seconds=3, seed=1, start_s=5, end_s=9)
    without = make(studio, session, seconds=3, seed=1, start_s=5, end_s=9, continuation_only=True)
    assert sorted(with_it.pieces[0].crop(0, 3.505).pitch) == sorted(part.crop(0, 3.505).pitch)
    assert without.shown(0) == with_it.pieces[0].crop(with_it.join_s)
    with pytest.raises(StudioError, match="no note begins between"):
        make(studio, session, seconds=3, start_s=1000, end_s=1001)


def test_the_prompt_is_heard_while_it_is_read(studio, midi_file):
    session = Session()
    session.set_prompt(midi_file.read_bytes(), "mine.mid")
    reading, first, *_, last = studio.generate(session, Settings(latents=8, seconds=60, end_s=9, seed=1))
    assert reading.join_s == pytest.approx(first.join_s, abs=0.5)
    until_s = reading.join_s - 2  # nothing is cut here
    assert reading.pieces[0].crop(0, until_s) == last.pieces[0].crop(0, until_s)
    assert session.takes == [last]
    assert session.reading is None


def test_a_prompt_that_is_left_out_is_read_before_an_empty_roll(studio, midi_file):
    session = Session()
    session.set_prompt(midi_file.read_bytes(), "mine.mid")
    runs = studio.generate(session, Settings(latents=8, seconds=1, seed=1, continuation_only=True))
    reading = next(runs)
    assert session.status == "Reading the prompt …"
    assert not len(reading.shown(0))
    list(runs)
    assert session.take.settings.prompt == "mine.mid"


def test_a_run_that_is_stopped_or_fails_while_it_reads_leaves_nothing(studio, midi_file):
    session = Session()
    session.set_prompt(midi_file.read_bytes(), "mine.mid")
    takes = studio.generate(session, Settings(latents=8))
    next(takes)
    session.stop()
    assert list(takes) == []
    with pytest.raises(GenerationError, match="latents must lie in"):
        list(studio.generate(session, Settings(latents=10**6)))
    assert session.reading is None
    assert not session.takes
    assert not session.making


def test_the_latest_choice_counts_in_whichever_order_they_come(studio):
    session = Session()
    make(studio, session, seconds=1, seed=3, variations=3)
    for variation, at, chosen in [(1, 10.0, 1), (2, 12.0, 2), (0, 11.0, 2), (5, 13.0, 2), (0, 14.0, 0)]:
        session.choose(variation, at)
        assert session.chosen == chosen
    session.choose(1)  # by a program, which has no clock
    assert session.chosen == 1


def test_extending_keeps_what_was_there_with_caches_and_without(studio):
    for evicted in (False, True):
        session = Session()
        take = make(studio, session, seconds=4, seed=3, variations=2)
        session.choose(1)
        if evicted:
            studio._let_go(session)
        longer = list(studio.extend(session, 4))[-1]
        assert len(longer.pieces) == 1
        before = take.pieces[1].crop(0, 3)
        assert (longer.pieces[0].pitch[: len(before)] == before.pitch).all()
        assert longer.until_s[0] > take.until_s[1]
        session.undo()
        assert session.take == take
        with pytest.raises(StudioError, match="nothing to undo"):
            session.undo()


def test_stopping_keeps_what_was_shown(studio, tmp_path):
    session = Session()
    takes = studio.generate(session, Settings(latents=8, seconds=1000, seed=3))
    assert not len(next(takes).pieces[0])
    first = next(takes)
    session.stop()
    assert list(takes) == []
    assert session.take is first
    assert not session.making
    assert read_midi(write_file(session, "mid", tmp_path)).pitch.tolist() == first.pieces[0].pitch.tolist()


def test_more_variations_are_measured_while_nobody_plays(tiny_checkpoint, monkeypatch):
    studio = Studio(Generator.from_pretrained(tiny_checkpoint))
    assert "real time" in studio.cost(8)
    assert studio.cost(8, 2) == "What 2 variations at once cost here is being measured …"
    let_go = []
    for name, value in {"_LIKELY_NOTES": (), "_LIKELY_VARIATIONS": (2,), "_MOST_PROGRAMS": 1}.items():
        monkeypatch.setattr(f"app.web.session.{name}", value)
    monkeypatch.setattr("app.web.session.jax.clear_caches", lambda: let_go.append(len(studio._programs)))
    session = studio.session("somebody")
    takes = studio.generate(session, Settings(seconds=600, latents=8))
    next(takes)
    ended = threading.Event()
    measuring = threading.Thread(target=studio.warm_up_further, args=[[], ended])
    measuring.start()
    assert len(list(zip(takes, range(3), strict=False))) == 3
    assert not studio.knows(2)
    session.stop()
    measuring.join(timeout=60)
    assert studio.warm
    assert "in each of 2 variations" in studio.cost(8, 2)
    assert let_go
    ended.set()
    studio.warm = False
    studio.warm_up_further([], ended)
    assert not studio.warm


def test_caches_are_bounded_and_go_with_their_session(studio):
    sessions = [studio.session(f"tab {number}") for number in range(6)]
    for session in sessions:
        make(studio, session, seconds=1, seed=1)
    assert len(studio._live) == 4
    for number in range(6):
        studio.forget(f"tab {number}")
    assert not studio._live


def test_nothing_made_is_nothing_to_save():
    with pytest.raises(StudioError, match="press Generate first"):
        write_file(Session(), "mid", Path())
