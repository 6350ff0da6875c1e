"""Take screenshots of the web page with the shipped model: `python benchmarks/screenshots.py FOLDER`."""

import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from served import served

SIZES = {"desktop": (1360, 1040), "phone": (390, 844), "narrow": (320, 700)}


def play_something(page: Page) -> None:
    """Continue an example, and wait until it plays."""
    page.get_by_label("Begin with").click()
    page.get_by_role("option", name="Bach").click()
    page.wait_for_selector("#player .player[data-notes='139']")
    page.locator("#seconds input").fill("30")
    page.locator("#generate").click()
    page.wait_for_selector("#player .player[data-playing='true']", timeout=120_000)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with served(measure=False) as (address, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for size, (width, height) in SIZES.items():
            for scheme in ("light", "dark"):
                context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
                page = context.new_page()
                page.goto(address)
                play_something(page)
                page.wait_for_timeout(6000)
                page.evaluate("window.scrollTo(0, 0)")
                page.wait_for_timeout(500)
                page.screenshot(path=folder / f"{size}-{scheme}.png", full_page=True)
                context.close()
        browser.close()


if __name__ == "__main__":
    main()
