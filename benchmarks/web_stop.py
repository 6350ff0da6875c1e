"""Measure how soon Stop stops eight variations at the largest latent budget: `python benchmarks/web_stop.py [RUNS]`.

Serves the shipped model and presses Stop in Chromium while another client waits in the queue. Measured from the press:
when the page says that it has stopped, and when the other client has its first notes, which takes a free device and one
chunk.
"""

import json
import statistics
import sys
import time

from gradio_client import Client
from playwright.sync_api import sync_playwright
from served import served

from app.console import print_table

# Records when Stop is pressed and when the page says so.
WATCH = """() => {
  window.stopped = {};
  document.querySelector('#stop').addEventListener('click', () => { window.stopped.pressed ??= Date.now(); });
  const status = document.querySelector('#status');
  new MutationObserver(() => { if (status.innerText.includes('Stopped')) window.stopped.said ??= Date.now(); })
    .observe(status, {childList: true, subtree: true, characterData: true});
}"""


def main() -> None:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    said_s, freed_s = [], []
    with served() as (address, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        other = Client(address, verbose=False)
        other.predict(seconds=1, latents=64, api_name="/generate")
        for _ in range(number):
            page = browser.new_page()
            page.goto(f"{address}?latents=2048&variations=8&seconds=600")
            page.wait_for_function("document.querySelector('#seconds input')?.value === '600'")
            page.locator("#generate").click()
            page.locator("#player .player:not([data-notes='0'])").wait_for(timeout=120_000)
            page.wait_for_timeout(1500)
            job = other.submit(seconds=30, latents=64, api_name="/generate")
            page.wait_for_timeout(1500)
            page.evaluate(WATCH)
            page.locator("#stop").click()
            while not any(progress["notes"][0] for progress, _ in job.outputs()):
                time.sleep(0.01)
            freed_at_ms = 1000 * time.time()
            page.wait_for_function("window.stopped.said !== undefined")
            stopped = page.evaluate("window.stopped")
            said_s.append((stopped["said"] - stopped["pressed"]) / 1000)
            freed_s.append((freed_at_ms - stopped["pressed"]) / 1000)
            job.cancel()
            page.close()
        browser.close()
    rows = [(f"{statistics.median(times):.2f}", f"{max(times):.2f}") for times in (said_s, freed_s)]
    print_table(
        ("", "median, s", "longest, s"), [("the page says so", *rows[0]), ("first notes of the next client", *rows[1])]
    )
    print(json.dumps({"said_s": said_s, "freed_s": freed_s}))


if __name__ == "__main__":
    main()
