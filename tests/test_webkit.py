"""The page in WebKitGTK, whose engine is Safari's: it plays, records, answers and keeps."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from web_browser import wait_until

MINI_BROWSERS = sorted(Path("/usr/lib").glob("*/webkit2gtk-4.1/MiniBrowser"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (
            MINI_BROWSERS and shutil.which("WebKitWebDriver") and (shutil.which("xvfb-run") or "DISPLAY" in os.environ)
        ),
        reason="no WebKit: apt-get install webkit2gtk-driver xvfb xauth gstreamer1.0-plugins-good",
    ),
]
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # how WebDriver marks an element
_NOTE_ERRORS = """
window.errors = [];
window.addEventListener('error', (event) => errors.push(event.message));
window.addEventListener('unhandledrejection', (event) => errors.push(String(event.reason)));
const { error } = console;
console.error = (...values) => { errors.push(values.join(' ')); error(...values); };
"""


class Browser:
    """WebKit with a page.

    Args:
        session: address of a WebDriver session.
    """

    def __init__(self, session: str):
        self._session = session

    def ask(self, path: str, values: dict | None = None):
        """Send a command of WebDriver; its answer."""
        return _ask("POST", f"{self._session}{path}", values or {})

    def run(self, script: str):
        """Run a script in the page; what it returns."""
        return self.ask("/execute/sync", {"script": script, "args": []})

    def state(self, name: str) -> str:
        """An attribute of the player's state; empty before it is there."""
        return self.run(f"return document.querySelector('#player .player')?.dataset.{name} ?? ''")

    def said(self) -> str:
        """What stands below the piano."""
        return self.run("return document.querySelector('#player .say').innerText")

    def click(self, selector: str) -> None:
        """Click on an element, once nothing moves in front of it: the page may still be laid out."""
        found = self.ask("/element", {"using": "css selector", "value": selector})[_ELEMENT]

        def clicked() -> bool:
            try:
                self.ask(f"/element/{found}/click")
            except AssertionError as error:
                if "click intercepted" in str(error):
                    return False
                raise
            return True

        wait_until(clicked, f"{selector} can be clicked")

    def press(self, *keys: str) -> None:
        """Press keys, one after the other, on the piano."""
        self.run("document.querySelector('#player .keys').focus()")
        actions = []
        for key in keys:
            actions += [
                {"type": "keyDown", "value": key},
                {"type": "pause", "duration": 60},
                {"type": "keyUp", "value": key},
            ]
        self.ask("/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})


def _ask(method: str, url: str, values: dict | None = None):
    body = None if values is None else json.dumps(values).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from error


@pytest.fixture
def webkit(address):
    """The page in WebKit."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    screen = [] if "DISPLAY" in os.environ else ["xvfb-run", "--auto-servernum"]
    driver = subprocess.Popen([*screen, "WebKitWebDriver", f"--port={port}"], start_new_session=True)
    root = f"http://127.0.0.1:{port}"
    try:

        def answers():
            with contextlib.suppress(OSError):
                return _ask("GET", f"{root}/status")["ready"]

        wait_until(answers, "the driver answers")
        options = {"webkitgtk:browserOptions": {"binary": str(MINI_BROWSERS[0]), "args": ["--automation"]}}
        session = _ask("POST", f"{root}/session", {"capabilities": {"alwaysMatch": options}})["sessionId"]
        browser = Browser(f"{root}/session/{session}")
        browser.ask("/url", {"url": address})
        browser.run(_NOTE_ERRORS)
        wait_until(lambda: browser.state("stored"), "it is there")
        yield browser
        assert browser.run("return window.errors ?? []") == []
        _ask("DELETE", f"{root}/session/{session}")
    finally:
        os.killpg(driver.pid, signal.SIGTERM)
        driver.wait()


def test_it_plays_records_answers_and_keeps_in_webkit(webkit):
    webkit.click("#player .connect")
    wait_until(lambda: "cannot use MIDI keyboards" in webkit.said(), "it says that there is no Web MIDI")
    webkit.click("#player .record")
    webkit.press("z", "c", "q")
    wait_until(lambda: webkit.state("notes") == "3", "the keys play")
    webkit.click("#player .record")
    wait_until(lambda: webkit.state("kind") == "prompt", "they are the prompt")

    webkit.click("#generate")
    wait_until(lambda: webkit.state("kind") == "piece" and int(webkit.state("notes")) > 3, "it is continued")
    wait_until(lambda: float(webkit.state("position")) > 1, "it sounds: the samples could be read")
    whole = float(webkit.state("span"))
    webkit.run(
        """const roll = document.querySelector('#player .roll');
        const middle = roll.getBoundingClientRect().left + roll.clientWidth / 2;
        for (const [name, scale] of [['gesturestart', 1], ['gesturechange', 2]])
          roll.dispatchEvent(Object.assign(new Event(name, { cancelable: true }), { scale, clientX: middle }));"""
    )
    wait_until(lambda: float(webkit.state("span")) == pytest.approx(whole / 2, abs=0.01), "a pinch zooms")

    wait_until(lambda: webkit.state("generating") == "false", "it is finished")
    webkit.click("#player .duet")
    wait_until(lambda: "When you pause" in webkit.said(), "the server listens")
    before = int(webkit.state("notes"))
    webkit.press("z")
    wait_until(lambda: int(webkit.state("notes")) > before + 2, "it answers")
    webkit.click("#player .duet")
    wait_until(lambda: webkit.state("take").startswith("duet-"), "the duet is a take")
    take = webkit.state("take")
    assert webkit.run("return errors") == []
    webkit.ask("/refresh")
    wait_until(lambda: webkit.state("take") == take, "it is there after a reload")
