"""Pictures of the web page with the shipped model: `python benchmarks/screenshots.py FOLDER [ADDRESS]`.

Without the address of a page that is served already, it serves one. It prints how long the first sound took.
"""

import json
import sys
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

SIZES = {"desktop": (1360, 1040), "phone": (390, 844)}


def play_something(page: Page) -> float:
    """Goes on from an example; returns the seconds from Generate to the first sound."""
    page.get_by_label("Begin with").click()
    page.get_by_role("option", name="Bach").click()
    page.wait_for_selector("#prompt-player .player[data-notes='139']")
    page.locator("#seconds input").fill("30")
    page.locator("#generate").click()
    began_s = time.monotonic()
    page.wait_for_selector("#piece-player .player[data-playing='true']", timeout=120_000)
    return time.monotonic() - began_s


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    address = sys.argv[2] if len(sys.argv) > 2 else served()
    first_sound_s = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for size, (width, height) in SIZES.items():
            for scheme in ("light", "dark"):
                context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
                page = context.new_page()
                page.goto(address)
                first_sound_s.append(play_something(page))
                page.wait_for_timeout(6000)
                page.evaluate("window.scrollTo(0, 0)")
                page.wait_for_timeout(500)
                page.screenshot(path=folder / f"{size}-{scheme}.png", full_page=True)
                context.close()
        browser.close()
    print(json.dumps({"first_sound_s": [round(seconds, 2) for seconds in first_sound_s]}))


def served() -> str:
    """Serves the shipped model from this process."""
    from app.studio import Studio
    from app.web import build_app, example_prompts, serve
    from music_ar import Generator
    from music_ar.checkpoint import read_beside

    generator = Generator.from_pretrained()
    Studio(generator).warm_up(example_prompts())
    return serve(build_app(generator, about=read_beside(None, "MODEL_CARD.md")), prevent_thread_lock=True)


if __name__ == "__main__":
    main()
