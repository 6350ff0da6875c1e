"""What the tests in a browser share: the page of a tiny model in a process of its own, and ways to use it."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[1]
CHROMIUM = Path("/usr/bin/chromium")
BROWSER = os.environ.get("MUSIC_AR_BROWSER", "chromium")
"""The engine in which the tests run: chromium, firefox or webkit."""

needs_browser = pytest.mark.skipif(
    BROWSER == "chromium" and not CHROMIUM.exists() and "CI" not in os.environ,
    reason=f"no browser: apt-get install chromium gives {CHROMIUM}",
)


@pytest.fixture(scope="session")
def address(tiny_checkpoint, tmp_path_factory):
    """The address of the page of a tiny model."""
    command = [sys.executable, "-m", "app.cli", "web", "--checkpoint", str(tiny_checkpoint), "--no-measure"]
    log = tmp_path_factory.mktemp("log") / "log.txt"
    slow = os.environ | {"MUSIC_AR_CPU": "portable"}  # otherwise an hour of music is made before one can press Stop
    with log.open("w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True, env=slow)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://\S+", line)
    if found is None:
        process.kill()
        pytest.fail(log.read_text())
    yield found[0]
    process.terminate()
    process.wait(timeout=20)
    process.stdout.close()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = launch(playwright)
        yield launched
        launched.close()


def launch(playwright):
    """Start the browser of `MUSIC_AR_BROWSER`: an installed Chromium or Firefox, or else Playwright's own build."""
    engine = getattr(playwright, BROWSER)
    if BROWSER == "chromium" and CHROMIUM.exists():
        return engine.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    if BROWSER == "firefox" and (shutil.which("firefox-esr") or shutil.which("firefox")):
        python = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        program = Path(__file__).with_name("firefox.py")
        preferences = {"browser.download.alwaysOpenPanel": False}  # it would take the focus
        return engine.launch(
            channel="moz-firefox", executable_path=program, env=os.environ | python, firefox_user_prefs=preferences
        )
    return engine.launch()


@pytest.fixture
def page(browser, address):
    """A fresh page. The test fails if the page reports an error or sends a request to another machine."""
    context = browser.new_context(viewport={"width": 1300, "height": 1100})
    page = context.new_page()
    requests, errors = [], []

    def note_error(text, place=""):
        # One test uploads a file that is refused: the browser reports it, and Gradio prints the response.
        refused = "/upload" in place or text.startswith("Response")
        # Gradio's requests fail when the page is left, and Gradio says so.
        left = text.startswith("AbortError") or "Connection errored out" in text
        left |= BROWSER == "firefox" and (text == "Error" or "NetworkError" in text)
        if not refused and not left:
            errors.append(f"{text} {place}")

    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: note_error(str(error)))
    page.on("console", lambda said: note_error(said.text, said.location["url"]) if said.type == "error" else None)
    page.goto(address)
    page.wait_for_selector("#player .player")
    yield page
    context.close()
    assert errors == [], errors
    hosts = {urlsplit(url).netloc for url in requests if urlsplit(url).scheme in ("http", "https", "ws", "wss")}
    assert hosts == {urlsplit(address).netloc}


def state(page, name):
    return page.locator("#player .player").get_attribute(f"data-{name}")


def shown(page, name):
    return float(state(page, name))


def wait_until(condition, what, timeout_s=90):
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"waited {timeout_s} s until {what}"
        time.sleep(0.05)


def wait_for_notes(page, number):
    page.wait_for_selector(f'#player .player[data-notes="{number}"]')


def type_over(box, value):
    """Replace what a field holds by typing. Playwright's own `fill` only appends to numbers in Firefox."""
    box.focus()
    box.press("ControlOrMeta+a")
    box.press_sequentially(str(value))


def fill(page, element, value):
    """Type a value until it stays: a part that has just opened may be drawn again."""
    box = page.locator(f"#{element} input, #{element} textarea").first

    def stays():
        type_over(box, value)
        box.press("Tab")
        time.sleep(0.2)
        return box.input_value() == str(value)

    wait_until(stays, f"{element} is {value}")


def upload(page, path):
    page.locator("#file input[type=file]").set_input_files(path)


def choose_example(page):
    page.get_by_label("Begin with").click()
    page.get_by_role("option", name="Bach").click()
    wait_for_notes(page, 139)


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
