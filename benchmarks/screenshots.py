"""Take screenshots of the web page with the shipped model: `python benchmarks/screenshots.py FOLDER`."""

import sys
from pathlib import Path

from playwright.sync_api import BrowserContext, Page, ViewportSize, sync_playwright
from served import served

SIZES = {"desktop": (1360, 1040), "phone": (390, 844), "narrow": (320, 700)}
LANGUAGES = ("de", "fr", "es", "ja")  # Japanese needs a font: apt-get install fonts-ipafont-gothic


def play_something(page: Page) -> None:
    """Continue an example, and wait until it plays."""
    page.locator("#example input").click()
    page.locator("#example [role=option]").nth(1).click()
    page.wait_for_selector("#player .player[data-notes='139']")
    page.locator("#seconds input").fill("30")
    page.locator("#generate").click()
    page.wait_for_selector("#player .player[data-playing='true']", timeout=120_000)


def take(context: BrowserContext, address: str, path: Path) -> None:
    """Take a screenshot of the page while it plays."""
    page = context.new_page()
    page.goto(address)
    play_something(page)
    page.wait_for_timeout(6000)
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(500)
    page.screenshot(path=path, full_page=True)
    context.close()


def viewport(size: tuple[int, int]) -> ViewportSize:
    """A size as Playwright takes it."""
    return {"width": size[0], "height": size[1]}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with served(measure=False) as (address, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for name, size in SIZES.items():
            for scheme in ("light", "dark"):
                context = browser.new_context(viewport=viewport(size), color_scheme=scheme)
                take(context, address, folder / f"{name}-{scheme}.png")
        for language in LANGUAGES:
            context = browser.new_context(viewport=viewport(SIZES["desktop"]), locale=language)
            take(context, address, folder / f"desktop-{language}.png")
        browser.close()


if __name__ == "__main__":
    main()
