"""Markdown extension of the documentation site: pages made of what is said elsewhere, so that it is said once.

`{{ music-ar generate --help }}` on a line of its own becomes the help that the command prints, and
`{{ include CONTRIBUTING.md }}` the text of a file of the repository.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

ROOT = Path(__file__).parents[1]
_COLUMNS = 88  # fits the width of a page
_HELP = re.compile(r"\{\{ music-ar (.*--help) \}\}")
_INCLUDE = re.compile(r"\{\{ include (\S+) \}\}")


class Insertions(Preprocessor):
    """Replaces lines in double braces by what they name."""

    def run(self, lines: list[str]) -> list[str]:
        """Return the lines of a page with the insertions in them."""
        return [text for line in lines for text in _expand(line)]


def _expand(line: str) -> list[str]:
    if found := _HELP.fullmatch(line):
        return ["```text", *command_help(found[1].split()).splitlines(), "```"]
    if found := _INCLUDE.fullmatch(line):
        text = (ROOT / found[1]).read_text(encoding="utf-8")
        return text.replace("](docs/", "](../").splitlines()  # pages that include are one folder below docs/
    return [line]


def command_help(arguments: list[str]) -> str:
    """Return what `music-ar` prints with these arguments."""
    environment = os.environ | {"COLUMNS": str(_COLUMNS), "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(
        [sys.executable, "-m", "app.cli", *arguments],
        cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=True,
    )  # fmt: skip
    return result.stdout


class InsertionsExtension(Extension):
    """Adds `Insertions` to Python-Markdown, before code blocks are found."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Register the preprocessor."""
        md.preprocessors.register(Insertions(md), "insertions", 100)


def makeExtension(**options: object) -> InsertionsExtension:
    """Return the extension; Python-Markdown calls this."""
    return InsertionsExtension(**options)
