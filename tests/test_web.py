"""The web page of a tiny model, served by the command in a process of its own, in a real browser and by its API."""

import dataclasses
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from typing import Any

import numpy as np
import pytest
import soundfile
from web_browser import (
    ROOT,
    choose_example,
    download,
    fill,
    needs_browser,
    shown,
    state,
    status,
    type_over,
    upload,
    wait_for_notes,
    wait_until,
    wait_until_done,
)

from app.web.calls import DEVICE
from music_ar import SamplingOptions, read_midi, write_midi
from music_ar.audio.synthesis import TAIL_S

pytestmark = pytest.mark.filterwarnings("ignore")  # from Gradio's client and Playwright


def ask_for_hours(page):
    """Ask for so much music that Stop can be pressed before it is made."""
    fill(page, "seconds", 3600)
    type_over(page.get_by_label("number input for Variations"), 4)
    page.get_by_label("number input for Variations").press("Tab")


@needs_browser
def test_from_a_file_to_a_longer_piece(page, midi_file, tmp_path):
    prompt = read_midi(midi_file)
    upload(page, midi_file)
    wait_for_notes(page, len(prompt))

    roll = page.locator("#player .roll")
    box = roll.bounding_box()
    page.mouse.move(box["x"] + 2, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 40, steps=5)
    page.mouse.up()
    to = page.locator("#end input")
    wait_until(lambda: abs(float(to.input_value()) - prompt.duration_s / 4) < 1, "the selection is shown in numbers")

    ask_for_hours(page)
    page.locator("#generate").click()
    cropped = len(prompt.crop(0, float(to.input_value())))
    wait_until(lambda: shown(page, "notes") > cropped and state(page, "kind") == "piece", "there are new notes")
    assert page.locator("#player .player").get_attribute("data-generating") == "true"
    early = shown(page, "notes")
    wait_until(lambda: shown(page, "notes") > early, "the roll grows")
    wait_until(lambda: page.locator("#player .player").get_attribute("data-playing") == "true", "it plays")
    position = shown(page, "position")
    wait_until(lambda: shown(page, "position") > position + 0.3, "the playhead moves")

    page.locator("#stop").click()
    wait_until(lambda: "Stopped" in status(page), "it stops", timeout_s=5)
    kept = shown(page, "notes")
    time.sleep(1)
    assert shown(page, "notes") == kept
    piece = read_midi(download(page, "mid", tmp_path))
    assert len(piece) == kept

    page.locator("#extend").click()
    wait_until_done(page)
    wait_until(lambda: shown(page, "notes") > kept, "the extension is shown")
    longer = read_midi(download(page, "mid", tmp_path))
    assert longer.duration_s > piece.duration_s
    page.locator("#undo").click()
    wait_for_notes(page, int(kept))


@needs_browser
def test_variations_from_nothing_with_a_seed_and_their_files(page, address, tmp_path):
    page.locator("#seconds").wait_for()
    page.get_by_text("More settings").click()
    fill(page, "seed", 7)
    fill(page, "seconds", 4)
    type_over(page.get_by_label("number input for Variations"), 3)
    page.get_by_label("number input for Variations").press("Tab")
    page.locator("#generate").click()
    strips = page.get_by_role("radiogroup", name="Takes").get_by_role("radio")
    strips.nth(2).click()  # while nothing has been generated yet
    wait_until_done(page)
    assert strips.nth(2).get_attribute("aria-checked") == "true", "what was chosen stays chosen"
    assert "seeds 7 to 9" in status(page)
    lengths = re.findall(r"(?<= )\d+:\d\d(?= / | of )", status(page))
    assert page.locator("#player .time").inner_text().endswith(f"/ {lengths[2]}"), "status and player agree"
    assert strips.count() == 3
    strips.nth(1).click()
    page.keyboard.press("ArrowDown")
    wait_until(lambda: strips.nth(2).get_attribute("aria-checked") == "true", "the third is chosen")
    wait_until(lambda: "9" in download(page, "mid", tmp_path).name, "the server knows it too")

    path = download(page, "mid", tmp_path)
    assert len(read_midi(path)) == shown(page, "notes")
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
    wait_for_notes(other, 139)
    assert [float(other.locator(f"#{limit} input").input_value()) for limit in ("start", "end")] == [2, 9]
    other.close()

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
    for name, (content, explanation) in bad.items():
        path = tmp_path / name
        path.write_bytes(content)
        upload(page, path)
        page.locator(".toast-body", has_text=re.compile(explanation)).first.wait_for()
        page.locator(".toast-close").evaluate_all("buttons => buttons.forEach(button => button.click())")
    karaoke = tmp_path / "song.KAR"
    whole = read_midi(midi_file)
    write_midi(dataclasses.replace(whole, onset_s=whole.onset_s + 300, offset_s=whole.offset_s + 300), karaoke)
    upload(page, karaoke)
    wait_for_notes(page, len(whole))
    start = float(page.locator("#start input").input_value())
    assert start == pytest.approx(300 + whole.onset_s[0], abs=0.1), "the silence before the first note is not selected"
    choose_example(page)


def toast(page, *, contains):
    """Wait for a message that contains this, and close it."""
    shown = page.locator(".toast-body", has_text=contains)
    shown.first.wait_for()
    text = shown.first.inner_text()
    while page.locator(".toast-body").count():
        page.locator(".toast-close").evaluate_all("buttons => buttons.forEach(button => button.click())")
        time.sleep(0.1)
    return text


@needs_browser
def test_settings_files_and_links_that_cannot_be_used_are_explained(page, address, tmp_path):
    contents = {
        b"[" * 100_000: "holds no settings of this page",
        b'{"seconds": -5}': "length must be",
        b'{"top_k": 1' + 300 * b"0" + b"}": "top-k must be",
        b'{"start_s": 9, "end_s": 3}': "must end after it starts",
        b'{"prompt": "<b>mine</b>\\ud800.mid", "start_s": 3}': "“<b>mine</b>?.mid”, which they do not contain",
    }
    page.get_by_text("More settings").click()
    for number, (content, explanation) in enumerate(contents.items()):
        path = tmp_path / f"{number}.json"
        path.write_bytes(content)
        page.locator("input[type=file][accept='.json']").set_input_files(path)
        assert len(toast(page, contains=re.compile(re.escape(explanation), re.IGNORECASE))) < 300
    path = tmp_path / "settings.json"
    path.write_text('{"seconds": 7}')
    page.locator("input[type=file][accept='.json']").set_input_files(path)
    wait_until(lambda: float(page.locator("#seconds input").input_value()) == 7, "the page still takes settings")

    opened = page
    for link, explanation in {
        "seconds=abc": "length must be",
        "latents=99999": "latent budget must be",
        "prompt=mine.mid&start_s=3": "“mine.mid”, which they do not contain. Upload it, and select the part from 3 s",
        "prompt=Bach+prelude+in+f+minor&start_s=500": "prompt is 24.0 s long",
    }.items():
        opened = page.context.new_page()
        opened.goto(f"{address}?{link}")
        toast(opened, contains=explanation)
    wait_for_notes(opened, 139)
    fill(opened, "start", 9)
    fill(opened, "end", 3)
    toast(opened, contains="must end after it starts, got 9 s to 3 s")


@needs_browser
def test_keys_focus_and_spoken_status(page, tmp_path):
    def focused(name):
        return page.evaluate("name => document.activeElement.getAttribute(name)", name)

    choose_example(page)
    start, end = (page.get_by_role("slider", name=f"{limit} of the selected part") for limit in ("Start", "End"))
    end.focus()
    page.keyboard.press("PageDown")
    page.keyboard.press("ArrowLeft")
    start.focus()
    page.keyboard.press("Shift+ArrowRight")
    wait_until(lambda: start.get_attribute("aria-valuetext") == "1.0 of 24.0 seconds", "the edge says where it is")
    limits = [page.locator(f"#{limit} input") for limit in ("start", "end")]
    wait_until(lambda: [float(limit.input_value()) for limit in limits] == [1, 22.9], "the part moves by keys")
    page.locator("#example input").focus()
    page.keyboard.press("ArrowDown")
    page.locator("#example [role=option]").first.wait_for()
    page.keyboard.press("Tab")
    wait_until(lambda: page.locator("#example [role=option]").count() == 0, "Tab closes the list")
    assert [float(limit.input_value()) for limit in limits] == [1, 22.9], "the part stays as it was"

    page.get_by_text("More settings").click()
    page.get_by_role("button", name="Reset Temperature").wait_for()
    names = [button.get_attribute("aria-label") for button in page.locator("button.reset-button").all()]
    assert len(set(names)) == len(names) > 5
    page.keyboard.press("Tab")  # focus is marked for those who use the keyboard
    unmarked = page.evaluate(
        """() => [...document.querySelectorAll('input:not([type=file]), textarea, button, a, summary, [tabindex="0"]')]
          .filter((each) => {
            each.focus();
            return document.activeElement === each && getComputedStyle(each).outlineStyle !== 'solid';
          }).map((each) => each.outerHTML)"""
    )
    assert unmarked == []

    ask_for_hours(page)
    spoken, player = page.locator("#spoken-status"), page.locator("#player .player")
    assert spoken.get_attribute("role") == "status"
    page.locator("#generate").click()
    wait_until(lambda: "of 1:00:00 of music" in spoken.inner_text(), "the beginning is told")
    wait_until(lambda: player.get_attribute("data-playing") == "true", "it plays")
    page.keyboard.press("Space")
    wait_until(lambda: player.get_attribute("data-playing") == "false", "space pauses after a click on Generate")
    page.locator("#stop").click()
    wait_until(lambda: spoken.inner_text().startswith("Stopped"), "the end is told")
    assert focused("aria-label").startswith("Timeline")
    piece = spoken.inner_text()
    page.locator("#generate").focus()
    page.keyboard.press("Space")
    wait_until(lambda: player.get_attribute("data-playing") == "true", "space plays, with the focus on Generate")
    wait_until(lambda: status(page).startswith(piece), "nothing new is made")

    notes = shown(page, "notes")
    assert len(read_midi(download(page, "mid", tmp_path))) == notes
    page.reload()
    wait_until(lambda: shown(page, "notes") == notes, "the music is still there after a reload")
    wait_until(lambda: page.locator("#extend").is_enabled(), "the server knows it again")
    assert len(read_midi(download(page, "mid", tmp_path))) == notes


@needs_browser
def test_two_pages_get_their_own_music_and_keys_play(browser, page, address):
    from gradio_client import Client

    other = browser.new_context().new_page()
    other.goto(address)
    for tab in (page, other):
        fill(tab, "seconds", 20)
        tab.locator("#generate").click()
    for tab in (page, other):
        wait_until_done(tab)
    places = DEVICE["concurrency_limit"]
    # Some wait: a fast machine has soon done the first.
    clients = [Client(address, verbose=False) for _ in range(4 * places)]
    jobs = [client.submit(seconds=3600, variations=8, latents=32, api_name="/generate") for client in clients]
    wait_until(lambda: sum(bool(job.outputs()) for job in jobs) >= places, "all places are taken")
    other.locator("#generate").click()
    wait_until(lambda: "Other pieces come first: " in status(other), "the waiting see their place")
    other.locator("#stop").click()
    wait_until(lambda: "Done" in status(other), "one may stop waiting")
    for job in jobs:
        job.cancel()
    assert status(page).partition("seed ")[2] != status(other).partition("seed ")[2]
    other.context.close()
    player = page.locator("#player .player")
    page.locator("#player .roll").focus()
    if player.get_attribute("data-playing") == "true":
        page.keyboard.press("Space")
    wait_until(lambda: player.get_attribute("data-playing") == "false", "space pauses")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    wait_until(lambda: shown(page, "position") == 5, "the arrow seeks")
    page.keyboard.press("Space")
    wait_until(lambda: player.get_attribute("data-playing") == "true", "space plays")


@needs_browser
def test_every_sampling_option_has_a_slider(page):
    page.get_by_text("More settings").click()
    for option in dataclasses.fields(SamplingOptions):
        number = page.get_by_label(f"number input for {option.metadata['label']}")
        assert float(number.input_value()) == option.default
        limits = [float(number.get_attribute(name)) for name in ("min", "max", "step")]
        assert limits == [option.metadata[name] for name in ("minimum", "maximum", "step")]


def test_the_api_has_every_sampling_option_and_keeps_its_order(address):
    from gradio_client import Client

    described: Any = Client(address, verbose=False).view_api(return_format="dict")
    endpoints = described["named_endpoints"]
    assert set(endpoints) == {"/generate", "/continue", "/info", "/similar"}
    defaults = {each["parameter_name"]: each["parameter_default"] for each in endpoints["/generate"]["parameters"]}
    assert list(defaults)[:12] == [
        "prompt", "seconds", "latents", "variations", "temperature", "top_p", "seed", "start_s", "end_s", "steadiness",
        "top_k", "min_p",
    ]  # fmt: skip
    assert dataclasses.asdict(SamplingOptions()).items() <= defaults.items()
    assert [each["parameter_name"] for each in endpoints["/continue"]["parameters"]] == ["seconds", "variation"]


def test_an_api_option_changes_the_music(address):
    from gradio_client import Client

    client = Client(address, verbose=False)
    notes = [
        client.predict(seconds=10, seed=7, api_name="/generate", **option)[0]["notes"]
        for option in ({}, {"top_k": 1, "min_p": 0.5}, {})
    ]
    assert notes[0] == notes[2] != notes[1]


def test_the_api_streams_and_continues(address, midi_file):
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
    with pytest.raises(exceptions.AppError, match="length must be a number of seconds from 1 to 3600"):
        client.predict(seconds=1e9, api_name="/generate")
    with pytest.raises(exceptions.AppError, match="temperature must be a number from 0 to 2, got -1"):
        client.predict(temperature=-1, api_name="/generate")
    with pytest.raises(exceptions.AppError, match="no music yet"):
        client.predict(api_name="/continue")


def upload_by_http(address, path):
    """Upload a file as a client does; the path that the server gave it."""
    boundary = "boundary-of-this-upload"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n\r\n'.encode()
    body = head + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    content_type = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    request = urllib.request.Request(f"{address.rstrip('/')}/gradio_api/upload", body, content_type)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)[0]


def call_generate(address, prompt):
    """Post to `/generate` as a client does, with this prompt and otherwise defaults; the kind of the last event."""
    root = f"{address.rstrip('/')}/gradio_api"
    with urllib.request.urlopen(f"{root}/info") as answer:
        parameters = json.load(answer)["named_endpoints"]["/generate"]["parameters"]
    values = {each["parameter_name"]: each["parameter_default"] for each in parameters} | {
        "prompt": prompt,
        "seconds": 1,
    }
    body = json.dumps({"data": list(values.values())}).encode()
    request = urllib.request.Request(f"{root}/call/generate", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{root}/call/generate/{event}") as answer:
        return re.findall(r"^event: (\w+)", answer.read().decode(), re.MULTILINE)[-1]


def test_a_file_of_the_server_cannot_be_a_prompt(address, midi_file):
    """A client may name only what it uploaded. Otherwise it could read any MIDI file of the server."""

    def file_at(path):
        return {"path": str(path), "meta": {"_type": "gradio.FileData"}}

    assert call_generate(address, None) == "complete"
    assert call_generate(address, file_at(upload_by_http(address, midi_file))) == "complete"
    assert call_generate(address, file_at(ROOT / "tests/data/bach_885.midi")) == "error"


def test_the_example_generates_and_continues(address, tmp_path):
    output = tmp_path / "piece.mid"
    command = [sys.executable, ROOT / "examples/web_api.py", address, output, "--seconds", "5"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    piece = read_midi(output)
    assert 5 < piece.duration_s <= 10
    assert f"{len(piece)} notes" in printed
    assert '"most_latents": 32' in printed


def test_only_the_samples_are_served(address):
    for path in (ROOT / "pyproject.toml", "/etc/passwd", ROOT / "music_ar/audio/samples/../synthesis.py"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{address.rstrip('/')}/gradio_api/file={path}")
