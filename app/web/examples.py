"""The prompts that the page offers."""

from pathlib import Path


def example_prompts() -> list[Path]:
    """The MIDI files that the page offers as prompts."""
    return sorted((Path(__file__).parent / "prompts").glob("*.mid"))


EXAMPLES = {path.stem.replace("-", " ").capitalize(): path for path in example_prompts()}
"""The same by the names that the page shows."""
