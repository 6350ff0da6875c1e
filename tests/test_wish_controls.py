"""The page's controls for wishes, of a model that takes them and of one that does not."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make_performance, noisy_model
from web_browser import choose_example, fill, needs_browser, wait_until, wait_until_done
from web_client import laid_out, running_page

from app.web.manager import SessionManager
from app.web.settings import Settings
from app.web.warmup import Machine
from app.web.wish_controls import WishControls, only_wished
from music_ar import GenerationError, Generator, encode
from music_ar.features.measured import measure
from music_ar.features.wish_options import NUMBERS, Wishes
from music_ar.features.wishes import WishTable
from music_ar.model.config import PRESETS
from music_ar.model.pretrained import save_pretrained

pytestmark = pytest.mark.filterwarnings("ignore")  # from Playwright and Gradio

TABLE = WishTable(
    edges=((0.3, 5.0, 30.0), (20.0, 60.0, 100.0), (30.0, 60.0, 90.0), (0.0, 0.5, 1.0), (0.0, 0.3, 1.0)),
    composers=("Frédéric Chopin", "Johann Sebastian Bach"),
    eras=("Baroque", "Romantic"),
)
REQUEST: Any = SimpleNamespace(session_hash="someone", headers={})


@pytest.fixture(scope="module")
def wishful(tmp_path_factory):
    """A pretrained model that takes wishes."""
    folder = tmp_path_factory.mktemp("model") / "wishful"
    save_pretrained(noisy_model(dataclasses.replace(PRESETS["tiny"], wishes=TABLE)), folder)
    return folder


def controls_of(manager):
    controls = WishControls(manager)
    laid_out(controls.layout)
    return controls


@pytest.fixture(scope="module")
def manager(wishful):
    return SessionManager(Machine(Generator.from_pretrained(wishful)))


@pytest.fixture(scope="module")
def controls(manager):
    return controls_of(manager)


def test_a_model_without_wishes_has_no_controls_and_refuses_wishes(tiny_checkpoint):
    controls = controls_of(SessionManager(Machine(Generator.from_pretrained(tiny_checkpoint))))
    assert controls.components == {}
    assert controls.restored(Wishes()) == []
    with pytest.raises(GenerationError, match="takes no wishes, got density"):
        controls.restored(Wishes(density=5.0))


def test_sliders_stay_within_what_the_model_has_heard(controls):
    for name, edges in zip(NUMBERS, TABLE.edges, strict=True):
        slider = controls.components[name]
        assert edges[0] <= slider.minimum <= slider.value <= slider.maximum <= edges[-1]
        assert not slider.visible
    assert [value for _, value in controls.components["composer"].choices] == ["", *TABLE.composers]
    assert "source" not in controls.components, "this model was trained without one"


def test_sliders_begin_at_what_the_prompt_is_like(manager, controls):
    played = make_performance(3, notes=300)
    manager.session("someone").prompt = played
    for end_s in (None, 20.0):
        part = played if end_s is None else played.crop(0, end_s)
        expected = measure(encode(part))
        loudness, density = controls.on_prompt(REQUEST, ["Notes a second"], 0.0, end_s)[1::-1]
        assert loudness["value"] == pytest.approx(expected.loudness, abs=0.51)
        assert "value" not in density, "what is wished for stays"
        density = controls.on_prompt(REQUEST, [], 0.0, end_s)[0]
        assert density["value"] == pytest.approx(expected.density, abs=0.26)


def test_only_numbers_that_are_wished_for_count():
    values = {"seconds": 9, "wished": ["Notes a second"], "density": 5, "loudness": 60, "composer": "", "guidance": 2}
    settings = Settings.read(only_wished(values))
    assert settings.wishes == Wishes(density=5.0, guidance=2.0)
    assert Settings.read(only_wished({"seconds": 9})) == Settings(seconds=9)


def test_links_and_files_bring_wishes_back(controls):
    wishes = Wishes(loudness=70.0, composer="bach", guidance=1.5)
    restored = dict(zip(controls.components, controls.restored(wishes), strict=True))
    assert restored["wished"] == ["Loudness"]
    assert restored["composer"] == "Johann Sebastian Bach"
    assert restored["era"] == ""
    known = {name: value for name, value in restored.items() if not isinstance(value, dict)}
    assert Settings.read(only_wished(known)).wishes == dataclasses.replace(wishes, composer="Johann Sebastian Bach")
    for wrong in (Wishes(composer="Nobody"), Wishes(density=80.0)):
        with pytest.raises(GenerationError):
            controls.restored(wrong)


@pytest.mark.slow
@needs_browser
def test_a_pianist_wishes(browser, wishful, tmp_path):
    with running_page(wishful, tmp_path) as served:
        page = browser.new_context().new_page()
        page.goto(served.address)
        page.get_by_text("Wishes: how the music should be").click()
        loudness = page.locator("#wish-loudness input[type=number]")
        page.get_by_label("Loudness").first.check()
        loudness.wait_for()
        assert page.locator("#wish-density").count() == 0 or not page.locator("#wish-density").is_visible()
        middle = loudness.input_value()
        page.get_by_label("Loudness").first.uncheck()
        choose_example(page)
        page.get_by_label("Loudness").first.check()
        wait_until(lambda: loudness.input_value() != middle, "it begins at what the prompt is like")
        fill(page, "wish-loudness", 90)
        page.get_by_label("Composer").click()
        page.get_by_role("option", name="Frédéric Chopin").click()
        fill(page, "seconds", 3)
        page.locator("#generate").click()
        wait_until_done(page)
        link = page.locator("#status a").get_attribute("href")
        assert "loudness=90" in link
        assert "composer=Fr%C3%A9d%C3%A9ric+Chopin" in link
        assert "density" not in link
        other = page.context.new_page()
        other.goto(f"{served.address}/{link}")
        other.get_by_text("Wishes: how the music should be").click()
        wait_until(lambda: other.locator("#wish-loudness input[type=number]").input_value() == "90", "a link has it")
        page.context.close()
