"""Settings, sessions, revisions and files, without a page."""

import dataclasses
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl

import pytest
from conftest import make_performance, noisy_model

from app.console import clock
from app.web.export import write_file
from app.web.manager import SessionManager
from app.web.player import piece_value
from app.web.saved_settings import read_settings_file
from app.web.session import Session
from app.web.settings import Settings, WebError
from app.web.warmup import Machine
from music_ar import GenerationError, Generator, Request, SamplingOptions, read_midi
from music_ar.decoding.budget import Setting
from music_ar.features.wish_options import Wishes
from music_ar.model.config import PRESETS
from music_ar.model.pretrained import save_pretrained


@pytest.fixture(scope="module")
def manager(tiny_checkpoint):
    return SessionManager(Machine(Generator.from_pretrained(tiny_checkpoint)))


def make(manager, session, **settings):
    """The finished revision of these settings."""
    return list(manager.generate(session, Settings.read({"latents": 8, **settings})))[-1]


def with_prompt(path):
    session = Session()
    session.set_prompt(path.read_bytes(), "mine.mid")
    return session


def test_a_link_restores_the_settings():
    settings = Settings.read(
        {
            "seconds": 12.5, "latents": 128, "variations": 3, "seed": 7, "end_s": 4.0, "continuation_only": True,
            "prompt": "Bach & söhne.mid", "temperature": 0.5, "top_k": 9,
        }
    )  # fmt: skip
    assert Settings.read(dict(parse_qsl(settings.link()[1:]))) == settings
    assert Settings.read(settings.flat()) == settings
    assert Settings.read({}) == Settings() == Settings.read({"unknown": 1, "end_s": None, "seed": ""})


def test_settings_and_links_of_version_0_1_are_read():
    saved = {
        "seconds": 4.0, "latents": 0, "variations": 3, "temperature": 0.9, "top_p": 0.97, "top_k": 5, "min_p": 0.1,
        "steadiness": 0.5, "seed": 7, "start_s": 2.0, "end_s": None, "continuation_only": True, "prompt": "mine.mid",
        "latents_used": 32, "seeds": [7, 8, 9],
    }  # fmt: skip
    settings = Settings.read(saved)
    assert {
        name: settings.flat()[name] for name in saved if name not in ("latents_used", "seeds")
    }.items() <= saved.items()
    assert settings.sampling == SamplingOptions(temperature=0.9, top_k=5, min_p=0.1, steadiness=0.5)
    link = "seconds=12.5&latents=128&steadiness=0.4&seed=7&end_s=4.0&continuation_only=True&prompt=mine.mid"
    from_link = Settings.read(dict(parse_qsl(link)))
    assert from_link == Settings.read(
        {"seconds": 12.5, "latents": 128, "steadiness": 0.4, "seed": 7, "end_s": 4, "continuation_only": True,
         "prompt": "mine.mid"}
    )  # fmt: skip
    assert dict(parse_qsl(from_link.link()[1:])) == dict(parse_qsl(link))


@pytest.mark.parametrize("field", dataclasses.fields(SamplingOptions), ids=lambda field: field.name)
def test_every_sampling_option_is_a_setting(field):
    name = field.name
    assert Settings().flat()[name] == getattr(SamplingOptions(), name)
    value: Any = next(
        value for value in (field.metadata["minimum"], field.metadata["maximum"]) if value != field.default
    )
    assert Settings.read({name: str(value)}).sampling == SamplingOptions(**{name: value})
    assert dict(parse_qsl(Settings.read({name: value}).link()[1:])) == {name: str(value)}
    title = field.metadata["label"].partition(" (")[0].lower()
    for wrong, got in (("much", "“much”"), (-1, "-1"), (10**50, "a number of more than 40 digits")):
        with pytest.raises(WebError, match=f"the {title} must be a .*number from .* to .*, got {got}"):
            Settings.read({name: wrong})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seconds": "long"}, "the length must be a number of seconds from 1 to 3600, got “long”"),
        ({"seconds": None}, "the length must be a number of seconds from 1 to 3600, got nothing"),
        ({"seconds": float("nan")}, "the length must be a number of seconds"),
        ({"seconds": 1e9}, "length must be a number of seconds from 1 to 3600, got 1000000000"),
        ({"variations": 9}, "variations must be a whole number from 1 to 8, got 9"),
        ({"seed": 1.5}, "the seed must be a whole number"),
        (
            {"seed": 2**31},
            "the seed must be a whole number from 0 to 2147483639, or empty for a random one, got 2147483648",
        ),
        ({"start_s": 5, "end_s": 4}, "must end after it starts"),
        (
            {"end_s": "late"},
            "the end of the prompt must be a number of seconds from 0 to 3600, or empty .*, got “late”",
        ),
        ({"continuation_only": "perhaps"}, "leave out the prompt .* must be true or false, got “perhaps”"),
    ],
)
def test_impossible_settings_are_refused_in_words(values, message):
    with pytest.raises(WebError, match=message):
        Settings.read(values)


@pytest.mark.parametrize(
    "content",
    [
        "Dear pianist", "", "[]", '[["seconds", 5]]', "7", "null", '"seconds"', "[" * 100_000, '{"a":' * 100_000, "{}",
        '{"a": 1}', '{"seconds": 1' + 5000 * "0" + "}", bytes(range(256)), '{"seconds": 5, "x": "' + 10**6 * "a" + '"}',
    ],
)  # fmt: skip
def test_files_without_settings_are_refused(tmp_path, content):
    path = tmp_path / "settings.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(WebError, match=r"“settings\.json” holds no settings of this page"):
        read_settings_file(path)


def test_downloaded_settings_are_read(tmp_path):
    settings = Settings(seconds=5, seed=7, sampling=SamplingOptions(top_k=3), prompt="mine.mid")
    assert settings.rows == 1
    guided = settings.model_copy(update={"variations": 2, "choices": 3, "wishes": Wishes(density=5.0, guidance=2.0)})
    assert guided.rows == 12  # each phrase is made three times, with and without the wishes
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings.flat() | {"latents_used": 32}))
    assert Settings.read(read_settings_file(path)) == settings


def test_the_prompt_is_cropped_and_may_be_left_out(manager, midi_file):
    session = with_prompt(midi_file)
    assert session.prompt is not None
    part = session.prompt.crop(5, 9)
    with_it = make(manager, session, seconds=3, seed=1, start_s=5, end_s=9)
    without = make(manager, session, seconds=3, seed=1, start_s=5, end_s=9, continuation_only=True)
    assert sorted(with_it.pieces[0].crop(0, 3.505).pitch) == sorted(part.crop(0, 3.505).pitch)
    assert without.shown(0) == with_it.pieces[0].crop(with_it.join_s)
    with pytest.raises(WebError, match=r"no note begins between 5 s and 5\.001 s"):
        make(manager, session, seconds=3, start_s=5, end_s=5.001)
    with pytest.raises(WebError, match=r"the prompt is 35\.2 s long, and the chosen part starts at 1000 s"):
        make(manager, session, seconds=3, start_s=1000)


def test_the_prompt_is_shown_while_it_is_read(manager, midi_file):
    session = with_prompt(midi_file)
    settings = Settings(latents=8, seconds=60, end_s=9, seed=1)
    reading, first, *_, last = manager.generate(session, settings)
    assert reading.join_s == pytest.approx(first.join_s, abs=0.5)
    until_s = reading.join_s - 2  # no note is cut off there
    assert reading.pieces[0].crop(0, until_s) == last.pieces[0].crop(0, until_s)
    assert session.revisions == [last]
    assert session.reading is None


def test_a_prompt_that_is_left_out_is_read_before_an_empty_roll(manager, midi_file):
    session = with_prompt(midi_file)
    run = manager.generate(session, Settings(latents=8, seconds=1, seed=1, continuation_only=True))
    reading = next(run)
    assert session.status == "Reading the prompt …"
    assert not len(reading.shown(0))
    list(run)
    assert session.revision.settings.prompt == "mine.mid"


def test_a_run_that_is_stopped_or_fails_while_it_reads_leaves_nothing(manager, midi_file):
    session = with_prompt(midi_file)
    run = manager.generate(session, Settings(latents=8))
    next(run)
    session.stop()
    assert list(run) == []
    with pytest.raises(GenerationError, match="latents must"):
        list(manager.generate(session, Settings(latents=10**6)))
    assert session.reading is None
    assert not session.revisions
    assert not session.generating
    assert session.status == ""


def test_the_latest_choice_counts_in_whichever_order_they_arrive(manager):
    session = Session()
    make(manager, session, seconds=1, seed=3, variations=3)
    for variation, at_ms, chosen in [(1, 10.0, 1), (2, 12.0, 2), (0, 11.0, 2), (5, 13.0, 2), (0, 14.0, 0)]:
        session.choose(variation, at_ms)
        assert session.chosen == chosen
    session.choose(1)  # by a program, which has no clock
    assert session.chosen == 1


def test_a_choice_counts_while_the_prompt_is_read_and_returns_with_undo(manager, midi_file):
    session = with_prompt(midi_file)
    run = manager.generate(session, Settings(latents=8, seconds=1, seed=3, variations=3))
    next(run)
    session.choose(2)
    list(run)
    assert session.chosen == 2
    list(manager.extend(session, 1.0))
    assert session.chosen == 0
    session.undo()
    assert session.chosen == 2


@pytest.mark.parametrize("continuation_only", [False, True])
def test_the_length_shown_is_the_length_of_the_music(manager, midi_file, continuation_only):
    session = with_prompt(midi_file)
    settings = Settings(latents=8, seconds=20, end_s=9, seed=7, variations=4, continuation_only=continuation_only)
    *_, last = manager.generate(session, settings)
    shown = [last.shown(n).duration_s for n in range(4)]
    assert [last.length_s(n) for n in range(4)] == pytest.approx(shown)
    assert [each["until"] for each in piece_value(session)["variations"]] == pytest.approx(shown)
    assert " / ".join(map(clock, shown)) in session.status


def test_variations_that_wait_for_the_slowest_do_not_grow_beyond_what_was_asked_for(manager, monkeypatch):
    """They go on in their caches, and their notes are cut at the length asked for."""
    notes = make_performance(3).crop(0, 15)
    chunk = SimpleNamespace(
        performances=(notes, notes.crop(0, 6)), final_s=(28.0, 7.0), seeds=(7, 8), tokens=9, tokens_per_s=9.0,
        seconds_made=7.0, seconds_wanted=15.0, eta_s=1.0, finished=False,
    )  # fmt: skip
    last = SimpleNamespace(**vars(chunk) | {"performances": (notes, notes), "final_s": (31.0, 16.0), "finished": True})
    options = {"prompt_s": 0.0, "setting": Setting(8, 2), "close": lambda: None}
    generation = SimpleNamespace(**options, extend=lambda _: iter([chunk, last]))
    monkeypatch.setattr(manager.machine.generator, "session", lambda _: generation)
    _, growing, finished = manager.generate(Session(), Settings(latents=8, seconds=15, variations=2))
    assert growing.until_s == (15.0, 7.0)
    assert finished.until_s == (notes.duration_s, notes.duration_s)


@pytest.mark.parametrize("freed", [False, True], ids=["with caches", "without caches"])
def test_extending_keeps_the_music(manager, freed):
    session = Session()
    revision = make(manager, session, seconds=4, seed=3, variations=2)
    session.choose(1)
    if freed:
        manager.free_caches(session)
    longer = list(manager.extend(session, 4.0))[-1]
    assert len(longer.pieces) == 1
    before = revision.pieces[1].crop(0, 3)
    assert (longer.pieces[0].pitch[: len(before)] == before.pitch).all()
    assert longer.until_s[0] > revision.until_s[1]
    session.undo()
    assert session.revision == revision
    with pytest.raises(WebError, match="nothing to undo"):
        session.undo()


def test_stopping_keeps_what_was_shown(manager, tmp_path):
    session = Session()
    run = manager.generate(session, Settings(latents=8, seconds=1000, seed=3))
    assert not len(next(run).pieces[0])
    first = next(run)
    session.stop()
    assert list(run) == []
    assert session.revision == first.ended()
    assert session.revision.until_s == (first.pieces[0].duration_s,)
    assert clock(first.pieces[0].duration_s) in session.status
    assert not session.generating
    assert read_midi(write_file(session, "mid", tmp_path)).pitch.tolist() == first.pieces[0].pitch.tolist()


def test_more_variations_are_measured_while_nobody_generates(tiny_checkpoint, monkeypatch):
    generator = Generator.from_pretrained(tiny_checkpoint)
    machine = Machine(generator, prompt_notes=(), variations=(2,), max_programs=1)
    manager = SessionManager(machine)
    assert "as fast as it plays" in machine.cost(8)
    assert machine.cost(8, 2) == "Measuring how fast 2 pieces at once are on this machine …"
    asking = Session()
    waiting = [asking.status for _ in zip(range(2), manager.generate(asking, Settings(variations=2)), strict=False)]
    assert waiting[1].startswith("Timing 2 pieces at once on this machine")
    asking.stop()
    dropped = []
    monkeypatch.setattr(generator.decoder, "free_programs", lambda: dropped.append(True))
    session = manager.session("somebody")
    run = manager.generate(session, Settings(seconds=600, latents=8))
    next(run)
    ended = threading.Event()
    measuring = threading.Thread(target=machine.warm_up_further, args=[[], ended, manager.activity])
    measuring.start()
    assert len(list(zip(run, range(3), strict=False))) == 3
    assert not machine.knows(2)
    session.stop()
    measuring.join(timeout=60)
    assert machine.warm
    assert "in each of 2 at once" in machine.cost(8, 2)
    assert dropped


def test_measuring_ends_with_the_server(tiny_checkpoint):
    machine = Machine(Generator.from_pretrained(tiny_checkpoint), variations=(2,))
    ended = threading.Event()
    ended.set()
    machine.warm_up_further([], ended, SessionManager(machine).activity)
    assert not machine.warm
    assert not machine.knows(2)


def test_the_cost_of_a_latent_budget_is_given_in_words(tiny_checkpoint):
    curve = [{"latents": 8, "nats_per_token": 2.0}, {"latents": 32, "nats_per_token": 1.75}]
    machine = Machine(Generator.from_pretrained(tiny_checkpoint), curve)
    assert "Less coherent than with more (0.25 nats per token worse)" in machine.cost(8)
    assert "Best quality." in machine.cost(32)
    assert machine.cost(0).startswith("**Auto** chooses 32 latents: music comes about ")
    assert machine.in_short(0) == "**Auto**: 32 latents fit this machine. Plays at once. Best coherence."
    assert machine.in_short(8) == "Plays at once. Less than the best coherence."
    assert machine.in_short(8, 2) == machine.cost(8, 2)


def test_a_latent_budget_buys_layers_too_if_the_model_has_exits(tmp_path):
    config = dataclasses.replace(PRESETS["tiny"], exits=(1,))
    save_pretrained(noisy_model(config), tmp_path / "model")
    of = {"context": 64, "batch": 1}
    rows = [
        {**of, "latents": 32, "layers": 2, "tolerance": 0.0, "tokens_per_s": 100.0, "nats_per_token": 1.0},
        {**of, "latents": 32, "layers": 2, "tolerance": 0.5, "tokens_per_s": 200.0, "nats_per_token": 1.1},
        {**of, "latents": 8, "layers": 1, "tolerance": 0.0, "tokens_per_s": 500.0, "nats_per_token": 1.5},
    ]
    (tmp_path / "model" / "curve.json").write_text(json.dumps({"rows": rows}))
    machine = Machine(Generator.from_pretrained(tmp_path / "model"), rows)
    full, early, cheap = Setting(32, 2), Setting(32, 2, 0.5), Setting(8, 1)
    expected = {2: cheap, 11: cheap, 12: early, 31: early, 32: full}  # half of the full cost is 0.2 + 0.8 * 12 / 32
    for budget, setting in expected.items():
        spent = machine.spend(Request(latents=budget))
        assert (spent.latents, spent.layers, spent.tolerance) == setting
        assert machine.spend(Request(latents=machine.budget_of(setting))) == spent
    assert "8 latents, 1 of 2 layers: music comes about " in machine.cost(2)
    assert "(0.50 nats per token worse)" in machine.cost(2)
    assert machine.cost(32).endswith("Best quality.")
    assert machine.auto_budget(None, 1) == 32
    manager = SessionManager(machine)
    session = manager.session("tab")
    make(manager, session, seconds=1, seed=1, latents=2)
    assert session.revision.latents == 2
    assert list(manager.extend(session, 1.0))[-1].latents == 2


def test_caches_are_bounded_and_are_freed_with_their_session(tiny_checkpoint, monkeypatch):
    generator = Generator.from_pretrained(tiny_checkpoint)
    manager = SessionManager(Machine(generator))
    begun, begin = [], generator.session
    monkeypatch.setattr(generator, "session", lambda *options: begun.append(begin(*options)) or begun[-1])

    def can_continue(generation):
        try:
            return bool(next(generation.extend(1.0)))
        except GenerationError:  # it is closed
            return False

    for number in range(6):
        make(manager, manager.session(f"tab {number}"), seconds=1, seed=1)
    assert list(map(can_continue, begun)) == [False, False, True, True, True, True]
    for number in range(6):
        manager.forget(f"tab {number}")
    assert not any(map(can_continue, begun))


def test_a_session_that_is_left_stops_and_is_forgotten_unless_it_comes_back(manager, monkeypatch):
    for name in ("gone", "back"):
        session = manager.session(name)
        run = manager.generate(session, Settings(latents=8, seconds=1000, seed=3))
        assert len(list(zip(range(2), run, strict=False))) == 2
        manager.leave(name)
        assert not session.generating
        assert list(run) == []
        assert session.revisions
    manager.forget_left()
    assert manager.session("back").revisions
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s + 300)
    manager.forget_left()
    assert manager.session("back").revisions
    assert not manager.session("gone").revisions


def test_without_music_there_is_nothing_to_save():
    with pytest.raises(WebError, match="press Generate first"):
        write_file(Session(), "mid", Path())
