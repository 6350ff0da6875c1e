"""The web page of a tiny model, served by the command in a process of its own, in a real browser and by its API."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import soundfile

from music_ar.audio.synthesis import TAIL_S
from music_ar.midi.io import read_midi

ROOT = Path(__file__).parents[1]
CHROMIUM = Path("/usr/bin/chromium")

pytestmark = pytest.mark.filterwarnings("ignore")  # of Gradio's client and of Playwright, which are not ours to mend
needs_browser = pytest.mark.skipif(
    not CHROMIUM.exists() and "CI" not in os.environ, reason=f"no browser: apt-get install chromium gives {CHROMIUM}"
)


@pytest.fixture(scope="module")
def address(tiny_checkpoint):
    """The address of the page of a tiny model."""
    command = [sys.executable, "-m", "app.cli", "web", "--checkpoint", str(tiny_checkpoint), "--no-measure"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://\S+", line)
    if found is None:
        process.kill()
        pytest.fail(process.communicate()[1])
    yield found[0]
    process.terminate()
    process.wait(timeout=20)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    """A fresh page that must stay without errors and ask no other machine for anything."""
    context = browser.new_context(viewport={"width": 1300, "height": 1100})
    page = context.new_page()
    requests, errors = [], []

    def note_error(message):
        # One test has an upload refused: the browser says so, and Gradio prints the response.
        refused = "/upload" in message.location["url"] or message.text.startswith("Response")
        if message.type == "error" and not refused:
            errors.append(f"{message.text} {message.location}")

    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", note_error)
    page.goto(address)
    page.wait_for_selector("#piece-player .player")
    yield page
    context.close()
    assert errors == []
    hosts = {urlsplit(url).netloc for url in requests if urlsplit(url).scheme in ("http", "https", "ws", "wss")}
    assert hosts == {urlsplit(address).netloc}


def shown(page, player, name):
    return float(page.locator(f"#{player}-player .player").get_attribute(f"data-{name}"))


def wait_until(condition, what, timeout_s=90):
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"waited {timeout_s} s until {what}"
        time.sleep(0.05)


def wait_for_notes(page, player, number):
    page.wait_for_selector(f'#{player}-player .player[data-notes="{number}"]')


def fill(page, element, value):
    """Types as a person does, who looks whether it stands there: what has just opened may still be drawn anew."""
    box = page.locator(f"#{element} input, #{element} textarea").first

    def stands_there():
        box.fill(str(value))
        box.press("Tab")
        time.sleep(0.2)
        return box.input_value() == str(value)

    wait_until(stands_there, f"{element} is {value}")


def upload(page, path):
    page.locator("#file input[type=file]").set_input_files(path)


def choose_example(page):
    page.get_by_label("Begin with").click()
    page.get_by_role("option", name="Bach").click()
    wait_for_notes(page, "prompt", 139)


def status(page):
    return page.locator("#status").inner_text()


def wait_until_done(page):
    wait_until(lambda: "Done" in status(page) and page.locator("#extend").is_enabled(), "it is done")


def download(page, kind, folder):
    with page.expect_download(timeout=60_000) as waiting:
        page.locator(f"#download-{kind}").click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


@needs_browser
def test_from_a_file_to_a_longer_piece(page, midi_file, tmp_path):
    prompt = read_midi(midi_file)
    upload(page, midi_file)
    wait_for_notes(page, "prompt", len(prompt))

    roll = page.locator("#prompt-player .roll")
    box = roll.bounding_box()
    page.mouse.move(box["x"] + 2, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 40, steps=5)
    page.mouse.up()
    to = page.locator("#end input")
    wait_until(lambda: abs(float(to.input_value()) - prompt.duration_s / 4) < 1, "the crop is told")

    fill(page, "seconds", 3000)
    page.locator("#generate").click()
    cropped = len(prompt.crop(0, float(to.input_value())))
    wait_until(lambda: shown(page, "piece", "notes") > cropped, "notes are made")
    assert page.locator("#piece-player .player").get_attribute("data-making") == "true"
    early = shown(page, "piece", "notes")
    wait_until(lambda: shown(page, "piece", "notes") > early, "the roll grows")
    wait_until(lambda: page.locator("#piece-player .player").get_attribute("data-playing") == "true", "it sounds")
    heard = shown(page, "piece", "position")
    wait_until(lambda: shown(page, "piece", "position") > heard + 0.3, "the playhead moves")

    page.locator("#stop").click()
    wait_until(lambda: "Stopped" in status(page), "it stops", timeout_s=5)
    kept = shown(page, "piece", "notes")
    time.sleep(1)
    assert shown(page, "piece", "notes") == kept
    piece = read_midi(download(page, "mid", tmp_path))
    assert len(piece) == kept

    page.locator("#extend").click()
    wait_until_done(page)
    wait_until(lambda: shown(page, "piece", "notes") > kept, "the extension is shown")
    longer = read_midi(download(page, "mid", tmp_path))
    assert longer.duration_s > piece.duration_s
    page.locator("#undo").click()
    wait_for_notes(page, "piece", int(kept))


@needs_browser
def test_variations_from_nothing_with_a_seed_and_their_files(page, address, tmp_path):
    page.locator("#seconds").wait_for()
    page.get_by_text("More settings").click()
    fill(page, "seed", 7)
    fill(page, "seconds", 4)
    page.get_by_label("number input for Variations").fill("3")
    page.get_by_label("number input for Variations").press("Tab")
    page.locator("#generate").click()
    wait_until_done(page)
    assert "seeds 7 to 9" in status(page)
    strips = page.get_by_role("radio")
    assert strips.count() == 3
    strips.nth(1).click()
    page.keyboard.press("ArrowDown")
    wait_until(lambda: strips.nth(2).get_attribute("aria-checked") == "true", "the third is chosen")
    wait_until(lambda: "9" in download(page, "mid", tmp_path).name, "the server knows it too")

    path = download(page, "mid", tmp_path)
    assert len(read_midi(path)) == shown(page, "piece", "notes")
    piece = read_midi(path)
    for kind in ("wav", "mp3"):
        sound, rate = soundfile.read(download(page, kind, tmp_path))
        assert abs(len(sound) / rate - (piece.duration_s + TAIL_S)) < 0.1
        first = round(piece.onset_s[0] * rate)
        assert np.abs(sound[first : first + rate]).max() > 0.01
    with zipfile.ZipFile(download(page, "zip", tmp_path)) as archive:
        assert len(archive.namelist()) == 7
        settings = json.loads(archive.read("settings.json"))
        assert read_midi(archive.read("3-seed-9.mid")) == piece
        archive.extract("settings.json", tmp_path)
    assert settings["seed"] == 7

    link = page.locator("#status a").get_attribute("href")
    other = page.context.new_page()
    other.goto(f"{address.rstrip('/')}/{link}&prompt=Bach+prelude+in+f+minor&start_s=2&end_s=9")
    other.get_by_text("More settings").click()
    wait_until(lambda: other.locator("#seed input, #seed textarea").input_value() == "7", "the link brings it back")
    assert float(other.locator("#seconds input").input_value()) == 4
    wait_for_notes(other, "prompt", 139)
    assert [float(other.locator(f"#{limit} input").input_value()) for limit in ("start", "end")] == [2, 9]

    fill(page, "seed", 1)
    fill(page, "seconds", 9)
    page.locator("input[type=file][accept='.json']").set_input_files(tmp_path / "settings.json")
    wait_until(lambda: page.locator("#seed input, #seed textarea").input_value() == "7", "the file brings it back")
    wait_until(lambda: float(page.locator("#seconds input").input_value()) == 4, "the length comes back")
    assert page.get_by_label("number input for Variations").input_value() == "3"


@needs_browser
def test_bad_files_are_explained_and_the_page_lives_on(page, midi_file, tmp_path):
    bad = {
        "text.mid": (b"Dear pianist,", "text.mid” cannot be used"),
        "empty.mid": (b"", "empty"),
        "silent.mid": (b"MThd\0\0\0\6\0\0\0\1\1\xe0MTrk\0\0\0\4\0\xff\x2f\0", "no notes|notes"),
        "truncated.mid": (midi_file.read_bytes()[:300], "truncated"),
        "huge.mid": (bytes(3 * 2**20), "size"),
    }
    choose_example(page)
    page.get_by_text("Drag over the roll").wait_for()
    for name, (content, explanation) in bad.items():
        path = tmp_path / name
        path.write_bytes(content)
        upload(page, path)
        page.locator(".toast-body", has_text=re.compile(explanation)).first.wait_for()
        page.locator(".toast-close").evaluate_all("buttons => buttons.forEach(button => button.click())")
    upload(page, midi_file)
    wait_for_notes(page, "prompt", len(read_midi(midi_file)))
    choose_example(page)


@needs_browser
def test_two_pages_get_their_own_music_and_keys_play(browser, page, address):
    other = browser.new_context().new_page()
    other.goto(address)
    for tab in (page, other):
        fill(tab, "seconds", 20)
        tab.locator("#generate").click()
    for tab in (page, other):
        wait_until_done(tab)
    assert status(page).partition("seed ")[2] != status(other).partition("seed ")[2]
    other.context.close()
    player = page.locator("#piece-player .player")
    page.locator("#piece-player .roll").focus()
    if player.get_attribute("data-playing") == "true":
        page.keyboard.press("Space")
    wait_until(lambda: player.get_attribute("data-playing") == "false", "space pauses")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    wait_until(lambda: shown(page, "piece", "position") == 5, "the arrow seeks")
    page.keyboard.press("Space")
    wait_until(lambda: player.get_attribute("data-playing") == "true", "space plays")


def test_the_api_streams_and_goes_on(address, midi_file):
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False)
    assert client.predict(api_name="/info")["most_latents"] == 32
    job = client.submit(prompt=handle_file(midi_file), seconds=600, seed=7, api_name="/generate")
    progress, files = job.result(timeout=60)
    assert len(job.outputs()) > 2
    assert progress["finished"]
    assert progress["seeds"] == [7]
    piece = read_midi(files[0])
    assert len(piece) == progress["notes"][0]
    prompt = read_midi(midi_file)
    assert piece.duration_s > prompt.duration_s
    _, files = client.predict(seconds=10, api_name="/continue")
    assert read_midi(files[0]).duration_s > piece.duration_s


def test_the_api_explains_what_it_cannot_do(address):
    from gradio_client import Client, exceptions

    client = Client(address, verbose=False)
    with pytest.raises(exceptions.AppError, match="length must lie in 1 to 3600"):
        client.predict(seconds=1e9, api_name="/generate")
    with pytest.raises(exceptions.AppError, match="temperature must be 0 or more"):
        client.predict(temperature=-1, api_name="/generate")
    with pytest.raises(exceptions.AppError, match="no music yet"):
        client.predict(api_name="/continue")


def test_a_file_of_the_server_is_no_prompt(address):
    """A client may name only what it uploaded, else it could read any MIDI file of this machine."""
    secret = {"path": str(ROOT / "tests/data/bach_885.midi"), "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [secret, 1, 0, 1, 1.0, 0.98, 7, 0, None]}).encode()
    call = f"{address.rstrip('/')}/gradio_api/call/generate"
    request = urllib.request.Request(call, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{call}/{event}") as answer:
        assert "event: error" in answer.read().decode()


def test_only_the_folder_of_the_app_is_served(address):
    for path in (ROOT / "pyproject.toml", "/etc/passwd", ROOT / "music_ar/audio/samples/../synthesis.py"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{address.rstrip('/')}/gradio_api/file={path}")
