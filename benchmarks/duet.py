"""Measure a duet: `python benchmarks/duet.py [--turns N] [--before FILE] [--others N] [--page]`.

Serves the shipped model. In each turn, a client plays a phrase in time, pauses, and asks for an answer; after some
seconds it plays again. Measured at the client: from the end of the pause until the answer's first note can be heard
(when it arrives, or when it is due, whichever is later), when it arrived, and from the next key until the last message
of the answer that is silenced. The pause itself is not counted: the client's own clock ends it.

With `--page` it is then played through the page in Chromium too. There, what is heard is measured, sample by sample:
from the end of the pause to the first sound of the answer, and from a key to its last sound above -50 dB. Both have
what the output of the browser takes, which stands in a row of its own.
"""

import argparse
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from gradio_client import Client
from served import served
from websockets.sync.client import ClientConnection, connect

from app.commands.timing import cpu_name
from app.console import print_table
from music_ar import read_midi

PAUSE_S = 1.0
HEARD_S = 3.0
NOTES = 16


class Player:
    """A client that plays in time.

    Args:
        socket: connected to the server.
        began_s: the start of its conversation, by the monotonic clock.
    """

    def __init__(self, socket: ClientConnection, began_s: float):
        self._socket, self._began_s = socket, began_s

    @property
    def now_s(self) -> float:
        """The time in the conversation."""
        return time.monotonic() - self._began_s

    def say(self, **message: Any) -> None:
        """Send a message."""
        self._socket.send(json.dumps(message))

    def hear(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """The next message."""
        message = json.loads(self._socket.recv(timeout=timeout_s))
        if message["type"] == "error":
            raise SystemExit(message["message"])
        return message

    def phrase(self, rng: np.random.Generator) -> None:
        """Play some notes, four a second, each with a key that comes up before the next."""
        for pitch in 60 + rng.choice([0, 2, 4, 5, 7, 9, 11, 12], NOTES):
            self.say(type="play", events=[[round(self.now_s, 4), "on", int(pitch), int(rng.integers(50, 90))]])
            time.sleep(0.2)
            self.say(type="play", events=[[round(self.now_s, 4), "off", int(pitch)]])
            time.sleep(0.05)

    def answer(self, number: int, seed: int) -> tuple[float, float]:
        """Ask for an answer; seconds until its first note arrives, and until it can be heard."""
        asked_s = self.now_s
        self.say(type="answer", id=number, seconds=60, seed=seed, **{"from": round(asked_s, 4)})
        while True:
            message = self.hear()
            onsets = [event[0] for event in message.get("events", []) if event[1] == "on"]
            if onsets:
                arrived_s = self.now_s - asked_s
                return arrived_s, max(arrived_s, onsets[0] - asked_s)
            if message["type"] == "end":
                return float("nan"), float("nan")

    def silence(self) -> float:
        """Play a key into the answer; seconds until the server has fallen silent."""
        self.hear_on(HEARD_S)
        pressed_s = self.now_s
        self.say(type="play", events=[[round(pressed_s, 4), "on", 48, 80]])
        while self.hear()["type"] != "end":
            pass
        silent_s = self.now_s - pressed_s
        self.say(type="play", events=[[round(self.now_s, 4), "off", 48]])
        return silent_s

    def hear_on(self, seconds: float) -> None:
        """Listen for so long."""
        until_s = self.now_s + seconds
        while (left_s := until_s - self.now_s) > 0:
            try:
                self.hear(left_s)
            except TimeoutError:
                return


def through_the_page(address: str, turns: int) -> dict[str, list[float]]:
    """Play in Chromium; what was heard, in seconds."""
    import browser_sound
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        page.evaluate(browser_sound.WATCH)
        browser_sound.connect_keyboard(page)
        found = browser_sound.duet(page, turns)
        browser.close()
    return {name: [turn[name] / 1000 for turn in found] for name in ("began", "silent", "output")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--others", type=int, default=0, help="clients that generate two variations meanwhile")
    parser.add_argument("--before", type=Path, help="a MIDI file with which the duet begins")
    parser.add_argument("--page", action="store_true", help="play through the page in Chromium, too")
    arguments = parser.parse_args()
    arrivals_s, first_s, silent_s = [], [], []
    rng = np.random.default_rng(0)
    with (
        served(measure=False) as (address, _),
        connect(re.sub("^http", "ws", address.rstrip("/")) + "/conversation") as socket,
    ):
        others = [Client(address, verbose=False) for _ in range(arguments.others)]
        jobs = [other.submit(seconds=1800, variations=2, api_name="/generate") for other in others]
        notes, length_s = [], 0.0
        if arguments.before:
            piece = read_midi(arguments.before)
            columns = (piece.onset_s, piece.offset_s, piece.pitch, piece.velocity)
            notes = [list(note) for note in zip(*(column.tolist() for column in columns), strict=True)]
            length_s = piece.duration_s
        player = Player(socket, time.monotonic() - length_s - 1)
        player.say(type="open", session=None, timeline={"notes": notes})
        latents = player.hear()["latents"]
        for turn in range(arguments.turns):
            player.phrase(rng)
            time.sleep(PAUSE_S)
            arrived, heard = player.answer(turn + 1, seed=turn)
            arrivals_s.append(arrived)
            first_s.append(heard)
            silent_s.append(player.silence())
            time.sleep(0.3)
        heard = through_the_page(address, arguments.turns) if arguments.page else {}
        for job in jobs:
            job.cancel()
    rows = [
        (name, f"{1000 * statistics.median(times):.0f}", f"{1000 * max(times):.0f}")
        for name, times in (
            ("from the pause to the first note: it arrives", arrivals_s),
            ("… it can be heard", first_s),
            ("from a key to the answer's last message", silent_s),
            ("in the page, from the pause to the first sound", heard.get("began")),
            ("in the page, from a key to silence", heard.get("silent")),
            ("… of both, the output of the browser", heard.get("output")),
        )
        if times
    ]
    print(
        f"{cpu_name()}, {latents} latents, {len(notes)} notes before, "
        f"others: {arguments.others}, turns: {arguments.turns}"
    )
    print_table(("", "median, ms", "longest, ms"), rows)
    result = {"arrivals_s": arrivals_s, "first_s": first_s, "silent_s": silent_s, "page": heard}
    print(json.dumps({"cpu": cpu_name(), "latents": latents} | result))


if __name__ == "__main__":
    main()
