"""The page's sentences in other languages: each language has each sentence, and the page shows them."""

import ast
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from conftest import noisy_model
from gradio_client import Client
from test_wish_controls import TABLE
from web_browser import fill, needs_browser, status, wait_for_notes, wait_until
from web_client import laid_out

from app.web import page as page_module
from app.web.examples import EXAMPLES
from app.web.manager import SessionManager
from app.web.page import LANGUAGES, Page
from app.web.settings import SAMPLING, Settings
from app.web.warmup import Machine
from music_ar import Generator
from music_ar.features.composers import ERAS
from music_ar.model.config import PRESETS
from music_ar.model.pretrained import save_pretrained

pytestmark = pytest.mark.filterwarnings("ignore")  # from Playwright and Gradio
WEB = Path(page_module.__file__).parent
MUSIC_AR = WEB.parents[1] / "music_ar"
TABLES = {path.stem: json.loads(path.read_text()) for path in LANGUAGES.glob("*.json")}
SCRIPTS = [*(WEB / "player").glob("*.js"), WEB / "conversation.js"]
WISHES = dataclasses.replace(TABLE, sources=("maestro",))
HOLE = re.compile(r"\{\w?\}|\b\d+\b")
# What people see is written in these modules.
SHOWN_BY = (
    "examples", "export", "likeness", "manager", "music_events", "prompt_events", "saved_settings", "session",
    "settings", "takes", "waiting", "warmup", "wish_controls", "player/__init__",
)  # fmt: skip
# They take sentences from these too; the rest there is for programs, or why a file is so odd, which stays English.
ALSO_FROM = (
    *(WEB / f"{name}.py" for name in ("blocks", "conversation", "conversations", "conversation_routes", "limits")),
    WEB / "timeline.py",
    MUSIC_AR / "decoding/budget.py",
    MUSIC_AR / "embedding/search.py",
    MUSIC_AR / "features/wishes.py",
    *(MUSIC_AR / f"midi/{name}.py" for name in ("io", "smf", "recording", "raw_events")),
)
# Gradio's own words, and names that are put together.
GIVEN = {
    "Drop File Here", "- or -", "Click to Upload", "Use via API", "number input for {}", "range slider for {}",
    "{} latents, {} of {} layers", "Error", "Warning", "In numbers", "Clear", "Remove this file", "File upload",
    "Gradio footer navigation", "Language", *EXAMPLES,
}  # fmt: skip
NOT_SENTENCES = {
    # for programs
    "a download must be one of {}, got {}", "a list", "an object", "a number of more than {} digits", "true or false",
    "a text", "name of the prompt", "choice to leave out the prompt (continuation_only)", "minus infinity",
    "choice to make a part of the prompt anew (fill)", "no number (NaN)", "the variation must be {}, got {}",
    "0, since there is only one", "a whole number from 0 to {}", "the number of one that exists; 0 is the first",
    # in files and logs
    "Music AR, seed {}", "seed {}, {} latents", "ended by an error", "left by its client", "{} s, variations: {}",
    "{} s more", "Stopped",
    # names of keys, browsers' features and the like
    "there is no piece: send a MIDI file as piece",
    "Escape", "button, a", "Activity", "Model", "None", "Revision", "Sampling", "Embeds", "Library", "Page",
    "SequenceMatch]", "DownloadURL", "MThd", "MTrk", "POST",
    "Comma", "Period", "Semicolon", "Slash", "Equal", "ArrowLeft",
    # the same in all languages
    "MIDI", "WAV", "MP3", "MIDI ⤓", "Music AR",
}  # fmt: skip


def plain(text):
    """A sentence with its holes and numbers all alike."""
    return HOLE.sub("{}", text)


def parts(text):
    """The sentences of a text, with and without their full stop, as the page looks them up."""
    split = {part.strip() for part in re.split(r"(?<=\.) ", text)}
    return {each for part in split for each in (part, part.removesuffix("."))} - {"", "{}"}


def is_known(text, keys):
    split = [part.strip() for part in re.split(r"(?<=\.) ", text)]
    return text in keys or all(
        part in ("{}", "{}.") or part in keys or part.removesuffix(".") in keys for part in split
    )


def is_sentence(text):
    words = HOLE.sub("", text).strip()
    own = len(words) > 1 and (" " in words or words[0].isupper()) and bool(re.search("[a-z]{2}", words))
    looks_like_code = re.search(r"[#<>=/\\]|=>|\(prefers|\(pointer|sans-serif|^(Key|Digit|Bracket)\w+$|^\w+, \.", text)
    return own and not looks_like_code


def of_python(path):
    """The texts in a module, but for docstrings and log lines; what they quote is a hole."""
    tree = ast.parse(path.read_text())
    left_out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            left_out.add(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "LOG":
                left_out |= set(ast.walk(node))
        elif isinstance(node, ast.JoinedStr):
            left_out |= {part for value in node.values for part in ast.walk(value) if part not in inner(value)}
    for node in ast.walk(tree):
        if node not in left_out and isinstance(node, ast.JoinedStr):
            yield "".join(str(each.value) if isinstance(each, ast.Constant) else "{}" for each in node.values)
        elif node not in left_out and isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def inner(value):
    """What is quoted within a text, where sentences may be chosen."""
    return set() if isinstance(value, ast.Constant) else set(ast.walk(value.value))


def of_javascript(path):
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    text = re.sub(r"(^|\s)//.*$", "", text, flags=re.MULTILINE)
    for quoted in re.finditer(r"'((?:[^'\\\n]|\\.)*)'|`((?:[^`\\]|\\.)*)`", text):
        yield re.sub(r"\$\{(?:[^{}]|\{[^{}]*\})*\}", "{}", quoted[1] if quoted[1] is not None else quoted[2])
    for nested in re.finditer(r"\?\? '([^']*)'", text):  # in a hole of a text
        yield nested[1]


class Texts(HTMLParser):
    """Texts and names in HTML."""

    def __init__(self):
        super().__init__()
        self.found, self._own_name = [], False

    def handle_starttag(self, tag, attrs):
        del tag
        values = dict(attrs)
        self._own_name = values.get("translate") == "no"
        self.found += [values[name] for name in ("title", "aria-label") if values.get(name)]

    def handle_endtag(self, tag):
        del tag
        self._own_name = False

    def handle_data(self, data):
        if data.strip() and not self._own_name:
            self.found.append(" ".join(data.split()))


def of_html(path):
    texts = Texts()
    texts.feed(path.read_text())
    return [text for text in texts.found if re.search("[A-Za-z]", text) and text[:1] != "$"]


def of_components(folder):
    """What Gradio shows of the page of a model that takes wishes."""
    save_pretrained(noisy_model(dataclasses.replace(PRESETS["tiny"], wishes=WISHES)), folder)
    app = laid_out(Page(SessionManager(Machine(Generator.from_pretrained(folder))), "").layout)
    for block in app.blocks.values():
        component: Any = block
        for name in ("label", "info"):
            yield str(getattr(component, name, None) or "")
        if isinstance(component, gr.Button | gr.UploadButton | gr.DownloadButton):
            yield str(getattr(component, "value", None) or component.label)
        if isinstance(component, gr.Dropdown | gr.CheckboxGroup):
            yield from (str(name) for name, _ in component.choices if name not in (*WISHES.composers, *WISHES.sources))


def sentences(texts):
    """The texts as they are looked up."""
    clean = re.compile(r"\*\*|^(\{\})+ ?(?=[A-Z])|\[|\]\(\{\}\)$")
    return {clean.sub("", plain(part.strip())) for text in texts for part in text.split(" · ")} - {"", "{}"}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Every sentence that people see."""
    texts = [text for name in SHOWN_BY for text in of_python(WEB / f"{name}.py") if is_sentence(text)]
    texts += [text for path in SCRIPTS for text in of_javascript(path) if is_sentence(text)]
    texts += [text for path in (WEB / "player/player.html", WEB / "title.html") for text in of_html(path)]
    texts += [text for text in of_components(tmp_path_factory.mktemp("model")) if re.search("[a-z]", text)]
    titles = [field.title for field in Settings.model_fields.values() if field.title and " (" not in field.title]
    return (sentences(texts) | {*titles}) - {plain(text) for text in NOT_SENTENCES}


@pytest.fixture(scope="module")
def elsewhere():
    """Sentences that people may see, among others that they do not."""
    texts = [text for path in ALSO_FROM for text in of_python(path)]
    texts += [text for name in SHOWN_BY for text in of_python(WEB / f"{name}.py")]
    texts += [text for path in (*SCRIPTS, WEB / "page.js") for text in of_javascript(path)]
    texts += [*ERAS, *(option.metadata["label"].partition(" (")[0].lower() for option in SAMPLING.values())]
    return sentences(texts) | GIVEN


def test_each_language_has_each_sentence(shown, elsewhere):
    assert set(TABLES) == {"de", "fr", "es", "ja"}
    keys = {plain(key) for key in TABLES["de"]}
    assert sorted(text for text in shown if not is_known(text, keys)) == [], "missing"
    written = shown | elsewhere | {part for text in shown | elsewhere for part in parts(text)}
    assert sorted(keys - written) == [], "nowhere in the page"
    for table in TABLES.values():
        assert list(table) == list(TABLES["de"])


@pytest.mark.parametrize("language", TABLES)
def test_translations_keep_numbers_and_names(language):
    for english, other in TABLES[language].items():
        assert sorted(re.findall(r"\{\w\}", english)) == sorted(re.findall(r"\{\w\}", other)), english
        assert other.strip() == other != ""


# The texts that one sees, and the names that a screen reader says. Lists show what was chosen as the value of a field.
VISIBLE = """() => {
  const seen = (element) => element.checkVisibility() && !element.closest('script, style, option, #about .prose');
  const native = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').get;
  const texts = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) if (seen(node.parentElement)) texts.push(node.data);
  for (const element of document.querySelectorAll('[aria-label], [title], [placeholder], [aria-valuetext]'))
    for (const name of ['aria-label', 'title', 'placeholder', 'aria-valuetext'])
      if (seen(element)) texts.push(element.getAttribute(name) ?? '');
  for (const field of document.querySelectorAll('input[role=combobox]')) texts.push(native.call(field));
  return [...new Set(texts.map((text) => text.trim()).filter((text) => /\\p{L}{2}/u.test(text)))].sort();
}"""
CLIPPED = """() => [...document.querySelectorAll('button, .label-wrap span:first-child, label, a, h1, p, summary')]
  .filter((each) => each.checkVisibility() && each.clientWidth && !each.matches('.spoken, .choose, .label-wrap'))
  .filter((each) => each.scrollWidth > each.clientWidth + 1)
  .map((each) => each.outerHTML.slice(0, 200))"""
ALIKE = {
    "de": {"Music AR", "MIDI", "WAV", "MP3", "MIDI ⤓", "Top-p", "Min-p", "Pause", "Tempo", "Pedal", "Takes"},
    "ja": {"Music AR", "MIDI", "WAV", "MP3", "MIDI ⤓", "Top-p", "Min-p"},
}


def open_all(page):
    page.locator("#more button.label-wrap").click()
    page.locator("#more input[type=range]").first.wait_for()
    page.wait_for_function("document.querySelectorAll('.reset-button[aria-label]').length > 7")


@pytest.fixture
def foreign(browser, address):
    """A page of a German's browser, on a narrow screen; of 320 px, as people enlarge pages to read them."""
    context = browser.new_context(viewport={"width": 320, "height": 800}, locale="de-DE")
    page = context.new_page()
    page.goto(address)
    yield page
    context.close()


@needs_browser
def test_germans_and_japanese_see_nothing_english_and_nothing_clipped(page, foreign):
    open_all(page)
    english = set(page.evaluate(VISIBLE))
    assert page.locator("html").get_attribute("lang") in (None, "en")
    assert {"Generate", "Nothing (a new piece)", "Reset Temperature"} <= english

    foreign.wait_for_selector("html[lang=de]")
    open_all(foreign)
    german = foreign.evaluate(VISIBLE)
    assert {"Erzeugen", "Nichts (ein neues Stück)", "Temperatur zurücksetzen"} <= set(german)
    assert english & set(german) - ALIKE["de"] == set()
    foreign.locator("#about button.label-wrap").click()
    foreign.locator("#about .prose[lang=en]").first.wait_for()
    foreign.locator("#about button.label-wrap").click()
    page.get_by_label("Language").select_option("ja")
    page.wait_for_selector("html[lang=ja]")
    page.set_viewport_size({"width": 320, "height": 800})
    assert english & set(page.evaluate(VISIBLE)) - ALIKE["ja"] == set()
    for narrow in (page, foreign):
        assert narrow.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert narrow.evaluate(CLIPPED) == []
    page.get_by_label("言語").select_option("en")
    page.wait_for_selector("html[lang=en]")
    page.set_viewport_size({"width": 1300, "height": 1100})
    assert set(page.evaluate(VISIBLE)) == english, "nothing of the other language is left"


@pytest.mark.slow
@needs_browser
def test_what_the_page_and_the_server_say_is_german_too(foreign, address):
    foreign.wait_for_selector("html[lang=de]")
    said = foreign.locator("#player .say")
    foreign.get_by_role("button", name="● Aufnehmen").click()
    wait_until(lambda: said.inner_text() == "Spiel. Die Aufnahme beginnt mit deinem ersten Ton.", "the page speaks")
    foreign.get_by_role("button", name="■ Aufnahme beenden").click()
    wait_until(lambda: said.inner_text() == "Es wurde nichts gespielt.", "and answers")
    fill(foreign, "seconds", 5000)
    foreign.locator("#generate").click()
    expected = "Länge: erwartet wird eine Zahl von Sekunden von 1 bis 3600, angegeben ist 5000"
    foreign.locator(".toast-body", has_text=expected).wait_for()
    foreign.get_by_label("Beginnen mit").click()
    foreign.get_by_role("option", name="Bach, Präludium f-Moll").click()
    wait_for_notes(foreign, 139)
    assert foreign.locator("#roll-summary").inner_text() == "139 Töne in 0:24."
    fill(foreign, "seconds", 3)
    foreign.locator("#generate").click()
    wait_until(lambda: re.match(r"Fertig in \d.* Musik, 32 Latents, Seed \d+", status(foreign)), "the server speaks")
    assert foreign.locator("#spoken-status").inner_text().startswith("Fertig in")
    link = foreign.locator("#status a")
    assert link.inner_text() == "Link zu diesen Einstellungen"
    assert "prompt=Bach+prelude+in+f+minor" in link.get_attribute("href"), "names are the same in all languages"
    foreign.get_by_label("Sprache").select_option("es")
    foreign.wait_for_selector("html[lang=es]")
    foreign.reload()
    foreign.wait_for_selector("html[lang=es]")
    assert foreign.locator("#generate").inner_text().strip() == "Generar", "the choice is remembered"
    text = Client(address, verbose=False).predict(seconds=1, api_name="/generate")[0]["status"]
    assert text.startswith("Done in"), "programs hear English"
