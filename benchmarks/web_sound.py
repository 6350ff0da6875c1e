"""Measure how soon the page plays after Generate is pressed, and whether playback has to wait.

`python benchmarks/web_sound.py [--runs N] [--seconds S] [--variations V]` serves the shipped model, opens the page in
Chromium, presses Generate at the "auto" budget and listens until the piece is finished. Measured in the page: the time
from the press to the first sound, which is the end of the prompt if there is one; the time to the first new notes; and
how often playback had to wait for more music. Each run is a fresh page with another seed.
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
# Records, by the clock of the page, when the player begins to play, when there are new notes and when it has to wait.
WATCH = """(prompted) => {
  const player = document.querySelector('#player .player');
  window.seen = {pressed: null, notes: null, generated: null, began: [], waits: 0, done: null};
  document.querySelector('#generate').addEventListener('click', () => { window.seen.pressed ??= performance.now(); });
  let wasPlaying = false;
  new MutationObserver(() => {
    const {notes, playing, generating} = player.dataset, seen = window.seen;
    if (seen.pressed === null) return;
    if (notes > 0) seen.notes ??= Number(notes); // with a prompt, its own at first
    if (seen.notes !== null && notes > (prompted ? seen.notes : 0)) seen.generated ??= performance.now() - seen.pressed;
    if (generating === 'false' && seen.generated) seen.done ??= performance.now() - seen.pressed;
    if (wasPlaying && playing === 'false' && generating === 'true') seen.waits++;
    if (!wasPlaying && playing === 'true') seen.began.push(performance.now() - seen.pressed);
    wasPlaying = playing === 'true';
  }).observe(player, {attributes: true});
}"""


def listen(page: Page, prompt: str | None, seconds: float, variations: int, seed: int) -> dict[str, Any]:
    """Press Generate and wait until the piece is finished. Times in seconds from the press."""
    page.wait_for_selector("#player .player")
    if prompt is not None:
        page.get_by_label("Begin with").click()
        page.get_by_role("option", name=prompt).click()
        page.locator("#player .player:not([data-notes='0'])").wait_for()
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
    while (seen := page.evaluate("window.seen"))["done"] is None or not seen["began"]:
        time.sleep(0.5)
    return {
        "first_sound_s": seen["began"][0] / 1000,
        "first_new_notes_s": seen["generated"] / 1000,
        "waits": seen["waits"],
        "finished_s": seen["done"] / 1000,
        "latents": int(re.findall(r"(\d+) latents", page.locator("#status").inner_text())[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--variations", type=int, default=1)
    given = parser.parse_args()
    rows, results = [], {}
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
            results[name] = runs
            sounds_s, notes_s = ([run[what] for run in runs] for what in ("first_sound_s", "first_new_notes_s"))
            medians = (
                f"{statistics.median(sounds_s):.2f}",
                f"{max(sounds_s):.2f}",
                f"{statistics.median(notes_s):.2f}",
            )
            budgets = " ".join(sorted({str(run["latents"]) for run in runs}))
            rows.append((name, budgets, *medians, f"{sum(run['waits'] for run in runs)} times in {given.runs} pieces"))
        browser.close()
    print_table(("prompt", "latents", "first sound after, s", "at worst", "first new notes after, s", "waited"), rows)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
