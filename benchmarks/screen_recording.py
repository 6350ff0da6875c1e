"""Record a duet on the page with the shipped model: `python benchmarks/screen_recording.py FILE.webp`.

Plays two phrases with the computer's keys, and hears the answers. The picture is an animated WebP, which README and
documentation show as they show images; a recording of the browser as a video would need ffmpeg.
"""

import argparse
import base64
import io
import time
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, ViewportSize, sync_playwright
from served import served

SIZE: ViewportSize = {"width": 960, "height": 840}
LEAST_FRAME_S = 0.1
FIRST = "qetiptipqwyo[yo["  # C E G C E …, as in a prelude; each is a key of the piano
SECOND = "ueoueoui"
KEY_S = 0.17
HEARD_S = (4.0, 2.5)
LAST_FRAME_S = 1.5


class Recorder:
    """The frames that the browser shows, with their times.

    Args:
        page: to record.
    """

    def __init__(self, page: Page):
        self._frames: list[tuple[float, bytes]] = []
        self._browser = page.context.new_cdp_session(page)
        self._browser.on("Page.screencastFrame", self._take)
        self._browser.send("Page.startScreencast", {"format": "png"})

    def _take(self, frame: dict[str, Any]) -> None:
        self._frames.append((frame["metadata"]["timestamp"], base64.b64decode(frame["data"])))
        self._browser.send("Page.screencastFrameAck", {"sessionId": frame["sessionId"]})

    def write(self, path: Path) -> float:
        """Write what was recorded; its length in seconds."""
        kept = self._frames[:1]
        for time_s, png in self._frames[1:]:
            if time_s - kept[-1][0] >= LEAST_FRAME_S:
                kept.append((time_s, png))
        ends_s = [*(time_s for time_s, _ in kept[1:]), kept[-1][0] + LAST_FRAME_S]
        first, *others = [Image.open(io.BytesIO(png)).convert("RGB") for _, png in kept]
        durations_ms = [round(1000 * (end_s - time_s)) for (time_s, _), end_s in zip(kept, ends_s, strict=True)]
        first.save(
            path, save_all=True, append_images=others, duration=durations_ms, loop=0, quality=75, method=4, kmax=400
        )
        return sum(durations_ms) / 1000


def play(page: Page, keys: str) -> None:
    """Play keys of the computer in time, each a little longer than the next begins."""
    began_s = time.monotonic()
    for number, key in enumerate(keys):
        page.wait_for_timeout(max(0.0, 1000 * (began_s + number * KEY_S - time.monotonic())))
        page.keyboard.down(key)
        if number > 1:
            page.keyboard.up(keys[number - 2])
    for key in keys[-2:]:
        page.keyboard.up(key)


def hear(page: Page, seconds: float) -> None:
    """Wait until the model answers, and listen for so long."""
    page.locator("#player .say", has_text="It answers").wait_for(timeout=30_000)
    page.wait_for_timeout(1000 * seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path
    path.parent.mkdir(parents=True, exist_ok=True)
    with served(measure=False) as (address, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        page.goto(address)
        page.wait_for_selector("#player .player")
        page.get_by_role("button", name="Duet", exact=True).click()
        page.locator("#player .say", has_text="When you pause").wait_for(timeout=30_000)
        recorder = Recorder(page)
        page.wait_for_timeout(500)
        for keys, heard_s in zip((FIRST, SECOND), HEARD_S, strict=True):
            play(page, keys)
            hear(page, heard_s)
        page.get_by_role("button", name="■ End the duet").click()
        page.wait_for_timeout(1000)
        length_s = recorder.write(path)
        browser.close()
    print(f"{path}: {length_s:.1f} s, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
