"""How soon the page sounds, and whether it goes on.

`python benchmarks/web_sound.py [--runs N] [--seconds S] [--variations V]` serves the shipped model, opens the page in
Chromium as a person would, presses Generate at the "auto" budget, and listens until the piece is made. Measured in the
page: the time from the press to the first sound, which is the end of the prompt if there is one, and to the first new
notes; and how often playback ran dry, that is had to wait for music not made yet. Each run is a fresh page with another
seed.
"""

import argparse
import json
import re
import statistics
import time
from typing import Any

from playwright.sync_api import Page, sync_playwright
from served import served

from app.console import print_table

PROMPTS = {"nothing": None, "20 s of Bach": "Bach"}
# Notes the times, by the page's own clock, at which the player begins to sound and at which it falls silent again.
WATCH = """(prompted) => {
  const player = document.querySelector('#piece-player .player');
  window.heard = {pressed: null, notes: null, made: null, began: [], dry: 0, done: null};
  document.querySelector('#generate').addEventListener('click', () => { window.heard.pressed ??= performance.now(); });
  let sounding = false;
  new MutationObserver(() => {
    const {notes, playing, making} = player.dataset, heard = window.heard;
    if (heard.pressed === null) return;
    if (notes > 0) heard.notes ??= Number(notes); // with a prompt, its own at first
    if (heard.notes !== null && notes > (prompted ? heard.notes : 0)) heard.made ??= performance.now() - heard.pressed;
    if (making === 'false' && heard.made) heard.done ??= performance.now() - heard.pressed;
    if (sounding && playing === 'false' && making === 'true') heard.dry++;
    if (!sounding && playing === 'true') heard.began.push(performance.now() - heard.pressed);
    sounding = playing === 'true';
  }).observe(player, {attributes: true});
}"""


def listen(page: Page, prompt: str | None, seconds: float, variations: int, seed: int) -> dict[str, Any]:
    """Presses Generate and waits until all is made; times in seconds from the press."""
    page.wait_for_selector("#piece-player .player")
    if prompt is not None:
        page.get_by_label("Begin with").click()
        page.get_by_role("option", name=prompt).click()
        page.locator("#prompt-player .player:not([data-notes='0'])").wait_for()
        page.locator("#end input").fill("20")
        page.locator("#end input").press("Tab")
    page.get_by_text("More settings").click()
    page.locator("#seed input, #seed textarea").fill(str(seed))
    page.locator("#seconds input").fill(str(seconds))
    page.locator("#seconds input").press("Tab")
    page.get_by_label("number input for Variations").fill(str(variations))
    page.get_by_label("number input for Variations").press("Tab")
    page.wait_for_timeout(1000)
    page.evaluate(WATCH, prompt is not None)
    page.locator("#generate").click()
    while (heard := page.evaluate("window.heard"))["done"] is None or not heard["began"]:
        time.sleep(0.5)
    return {
        "first_sound_s": heard["began"][0] / 1000,
        "first_new_notes_s": heard["made"] / 1000,
        "ran_dry": heard["dry"],
        "made_s": heard["done"] / 1000,
        "latents": int(re.findall(r"(\d+) latents", page.locator("#status").inner_text())[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--variations", type=int, default=1)
    given = parser.parse_args()
    rows, figures = [], {}
    with served() as (address, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for name, prompt in PROMPTS.items():
            runs = []
            for seed in range(given.runs):
                page = browser.new_page()
                page.goto(address)
                runs.append(listen(page, prompt, given.seconds, given.variations, seed))
                print(runs[-1], flush=True)
                page.close()
            figures[name] = runs
            sounds_s, notes_s = ([run[what] for run in runs] for what in ("first_sound_s", "first_new_notes_s"))
            medians = (
                f"{statistics.median(sounds_s):.2f}",
                f"{max(sounds_s):.2f}",
                f"{statistics.median(notes_s):.2f}",
            )
            budgets = " ".join(sorted({str(run["latents"]) for run in runs}))
            rows.append(
                (name, budgets, *medians, f"{sum(run['ran_dry'] for run in runs)} times in {given.runs} pieces")
            )
        browser.close()
    print_table(("prompt", "latents", "first sound after, s", "at worst", "first new notes after, s", "ran dry"), rows)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
