"""Measure the page as an instrument: key to sound, pause to answer, chunk to roll, and an hour of music that scrolls.

`python benchmarks/web_timeline.py [--checkpoint FOLDER]` serves a model, plays in Chromium and prints medians and worst
values. Sound counts from the event to the moment at which the browser has been told to begin it; what its output then
takes, as it states itself, stands in a row of its own.
"""

import argparse
import statistics

from playwright.sync_api import Page, sync_playwright
from served import served

from app.console import print_table

_MINUTES = 60
_NOTES_PER_S = 8
KEYBOARD = """(() => {
  const input = { type: 'input', state: 'connected', name: 'A piano', onmidimessage: null };
  navigator.requestMIDIAccess = async () => ({ inputs: new Map([['1', input]]), onstatechange: null });
  window.send = (...data) => input.onmidimessage({ data: Uint8Array.from(data), timeStamp: performance.now() });
  window.begun = [];
  const start = AudioBufferSourceNode.prototype.start;
  AudioBufferSourceNode.prototype.start = function (when) {
    const late = Math.max(0, when - this.context.currentTime);
    window.begun.push({ at: performance.now() + 1000 * late, output: this.context.outputLatency || 0 });
    return start.call(this, when);
  };
})()"""
KEYS = """async (times) => {
  const found = [];
  for (let n = 0; n < times; n++) {
    const pressed = performance.now();
    window.begun = [];
    send(0x90, 60 + (n % 12), 80);
    found.push([window.begun[0].at - pressed, 1000 * window.begun[0].output]);
    await new Promise((resolve) => setTimeout(resolve, 80));
    send(0x80, 60 + (n % 12), 0);
  }
  return found;
}"""
PHRASE = """async () => {
  for (const pitch of [60, 64, 67, 72]) {
    send(0x90, pitch, 80);
    await new Promise((resolve) => setTimeout(resolve, 200));
    send(0x80, pitch, 0);
  }
  const released = performance.now();
  window.begun = [];
  while (!window.begun.length) await new Promise((resolve) => setTimeout(resolve, 2));
  await new Promise((resolve) => setTimeout(resolve, 1500));
  return window.begun[0].at - released;
}"""
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


def key_to_sound(page: Page) -> tuple[list[float], list[float]]:
    """Milliseconds from a MIDI message to its sound in the browser, and those of the browser's output after that."""
    begun, output = zip(*page.evaluate(KEYS, 40), strict=True)
    return list(begun), list(output)


def pause_to_answer(page: Page, turns: int) -> list[float]:
    """Milliseconds from the last key up to the first note of the answer, without the pause itself."""
    page.get_by_role("button", name="Duet", exact=True).click()
    page.locator("#player .say", has_text="When you pause").wait_for(timeout=60_000)
    pause_ms = 1000 * float(page.get_by_label("Answers after").input_value())
    found = [page.evaluate(PHRASE) - pause_ms for _ in range(turns)]
    page.get_by_role("button", name="End the duet").click()
    return found


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
    given = parser.parse_args()
    with served(measure=False, checkpoint=given.checkpoint) as (address, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 1360, "height": 900}).new_page()
        page.goto(address)
        page.evaluate(KEYBOARD)
        page.get_by_role("button", name="MIDI keyboard").click()
        page.wait_for_timeout(3000)
        begun, output = key_to_sound(page)
        rows = {"key to sound": begun, "output of the browser": output, "pause to answer": pause_to_answer(page, 8)}
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
