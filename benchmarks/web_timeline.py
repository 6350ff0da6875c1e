"""Measure the page as an instrument: key to sound, pause to answer, key to silence, and an hour of music that scrolls.

`python benchmarks/web_timeline.py [--checkpoint FOLDER]` serves a model, plays in Chromium and prints medians and worst
values. Sound counts from the event to the first sample, as the browser's output plays it; the part of it that this
output takes, as it states itself, stands in a row of its own. Silence counts to the last sample above -50 dB.
"""

import argparse
import statistics

from browser_sound import WATCH, connect_keyboard, duet, key_to_sound
from playwright.sync_api import Page, sync_playwright
from served import served

from app.console import print_table

_MINUTES = 60
_NOTES_PER_S = 8
FRAMES = """async (act) => {
  const roll = document.querySelector('#player .roll'), box = roll.getBoundingClientRect(), spent = [];
  let last = 0;
  for (let n = 0; n < 240; n++) {
    const wheel = { bubbles: true, cancelable: true, clientX: box.left + box.width / 2, clientY: box.top + 20 };
    roll.dispatchEvent(new WheelEvent('wheel', act === 'scroll' ? { ...wheel, deltaX: 25 }
      : { ...wheel, deltaY: n < 120 ? -8 : 8, ctrlKey: true }));
    const now = await new Promise(requestAnimationFrame);
    if (last) spent.push(now - last);
    last = now;
  }
  return spent;
}"""


def hour(page: Page) -> None:
    """Put an hour of music on the timeline, as a take of the browser's storage."""
    notes = "".join(
        f"{1000 * n // _NOTES_PER_S},{300 + 37 * n % 900},{30 + 7 * n % 70},{40 + n % 60};"
        for n in range(_MINUTES * 60 * _NOTES_PER_S)
    )
    page.evaluate(
        """(notes) => new Promise((resolve) => {
          const opening = indexedDB.open('music-ar', 1);
          opening.onsuccess = () => {
            const change = opening.result.transaction('takes', 'readwrite');
            change.objectStore('takes').put({ id: 'hour', kind: 'made', made: Date.now() + 1e6, notes, pedals: [],
              join: 60, until: 3600, seed: 1, latents: 0, settings: '', starred: false, turns: [] });
            change.oncomplete = resolve;
          };
        })""",
        notes,
    )
    page.reload()
    page.wait_for_selector(f"#player .player[data-notes='{_MINUTES * 60 * _NOTES_PER_S}']")
    page.wait_for_timeout(2000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint")
    parser.add_argument("--turns", type=int, default=8, help="of the duet")
    given = parser.parse_args()
    with served(measure=False, checkpoint=given.checkpoint) as (address, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 1360, "height": 900}).new_page()
        page.goto(address)
        page.evaluate(WATCH)
        connect_keyboard(page)
        rows = {}
        rows["MIDI message to sound"], _ = key_to_sound(page, "midi", 20)
        rows["key of the computer to sound"], output = key_to_sound(page, "key", 20)
        turns = duet(page, given.turns)
        rows["pause to the answer's first sound"] = [turn["began"] for turn in turns]
        rows["key to the answer's silence"] = [turn["silent"] for turn in turns]
        rows["of all these, the browser's output"] = output
        hour(page)
        rows["frame while an hour scrolls"] = page.evaluate(FRAMES, "scroll")
        rows["frame while it zooms"] = page.evaluate(FRAMES, "zoom")
        browser.close()
    shown = []
    for name, found in rows.items():
        most = statistics.quantiles(found, n=20, method="inclusive")[-1]
        shown.append((name, *(f"{each:.1f}" for each in (statistics.median(found), most, max(found)))))
    print_table(("what", "median, ms", "95 %, ms", "at worst, ms"), shown)


if __name__ == "__main__":
    main()
