"""`Wishes`: what a request may wish for. Without NumPy, so that the help of the command line is quick."""

import dataclasses
import inspect
import re
from typing import Any

from music_ar.ranges import check_ranges, number, shown


class WishError(ValueError):
    """A wish that a model cannot take; the message says what is possible."""


def _wish(label: str, unit: str, least: int | float, most: int | float, step: int | float) -> Any:
    return number(None, least=least, most=most, label=label, unit=unit, step=step)


# The command line, batch jobs, the page and its API take names, labels, ranges and help texts from this class.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Wishes:
    """How the music should be. For models that were trained with wishes; leave out what does not matter.

    Attributes:
        density: notes a second; 5 is calm, 15 is dense.
        loudness: mean MIDI velocity of the notes, as in 45 for soft and 75 for loud.
        register: mean MIDI pitch of the notes; 60 is middle C.
        pedal_share: share of the time in which the sustain pedal is down, from 0 to 1.
        tempo_stability: how steady the beat is, from 0 (rubato) to 1 (a metronome); real playing seldom exceeds 0.7.
        composer: composer whose music it should resemble, by surname or full name.
        era: Baroque, Classical, Romantic or Modern.
        source: part of the training data that it should resemble, as named in the table of `train --sources`.
        guidance: how strictly the wishes are followed: 1 as in training, more for stricter, at up to twice the time
            (classifier-free guidance).

    Raises:
        WishError: a value is out of any model's range.
    """

    density: float | None = _wish("Notes a second", "notes a second", 0, 100, 0.5)
    loudness: float | None = _wish("Loudness", "of MIDI velocity", 1, 127, 1)
    register: float | None = _wish("Register", "as mean MIDI pitch", 0, 127, 1)
    pedal_share: float | None = _wish("Pedal share", "of the time", 0, 1, 0.05)
    tempo_stability: float | None = _wish("Tempo stability", "of tempo stability", 0, 1, 0.05)
    composer: str | None = None
    era: str | None = None
    source: str | None = None
    guidance: float = number(1.0, least=0, most=10, label="Guidance", step=0.25)

    def __post_init__(self) -> None:
        check_ranges(self, WishError)
        for name in NAMES:
            value = getattr(self, name)
            if not isinstance(value, str | None):
                raise WishError(f"{name} must be a name, got {shown(value)}")

    @property
    def given(self) -> dict[str, float | str]:
        """The wishes that are given, by name, without `guidance`."""
        return {name: getattr(self, name) for name in WISHES if getattr(self, name) is not None}

    @property
    def is_guided(self) -> bool:
        """Whether the model must also be asked without the wishes (see `guidance`)."""
        return self.guidance != 1 and bool(self.given)


NUMBERS = ("density", "loudness", "register", "pedal_share", "tempo_stability")
"""The wishes that are numbers."""
NAMES = ("composer", "era", "source")
"""The wishes that are names."""
WISHES = (*NUMBERS, *NAMES)
"""All wishes, in the order of their ids."""
WISH_OPTIONS = (*WISHES, "guidance")
"""The fields of `Wishes`."""


def wish_help() -> dict[str, str]:
    """The help text of each wish, from the docstring of `Wishes`."""
    text = (inspect.getdoc(Wishes) or "").partition("Attributes:")[2].partition("Raises:")[0]
    entries = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w+: |\Z)", text, re.DOTALL | re.MULTILINE)
    return {name: " ".join(described.split()) for name, described in entries}
