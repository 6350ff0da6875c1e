"""`SamplingOptions`: how tokens are drawn. `processors` applies them. This module does not import JAX."""

import dataclasses
from typing import Any

from music_ar.ranges import check_ranges, number


class SamplingError(ValueError):
    """A sampling option is out of range."""


def _option(
    default: int | float,
    label: str,
    minimum: int | float,
    maximum: int | float,
    step: int | float,
    *,
    above: int | float | None = None,
    most: int | float | None = None,
) -> Any:
    """A field whose metadata describes a control: its label, range and step.

    Args:
        default: the default; a whole one makes a field for whole numbers.
        label: what the control is called.
        minimum: lowest value of the control.
        maximum: highest value of the control.
        step: step of the control.
        above: what a valid value must exceed, if it may be lower than `minimum`.
        most: highest valid value, if it is not `maximum`.
    """
    return number(
        default,
        least=minimum if above is None else None,
        above=above,
        most=maximum if most is None else most,
        whole=isinstance(default, int),
        label=label,
        minimum=minimum,
        maximum=maximum,
        step=step,
    )


# The command line, batch jobs, the web page and its API take names, defaults, ranges and help texts from this class. To
# add an option, add a field, its description, and a logit processor that reads it.
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn. Filters apply within each token type.

    Attributes:
        temperature: lower is safer and plainer, higher is wilder, with more wrong notes; 0 always takes the likeliest
            event.
        top_k: keep only the k likeliest events of each type; 0 keeps all.
        top_p: keep the likeliest events of each type whose probabilities add up to p; lower is safer, 1 keeps all.
        min_p: keep only events at least this likely relative to the likeliest of their type; 0 keeps all.
        steadiness: higher keeps to the key, register and dynamics heard so far, lower wanders; 0 turns it off. It is
            the strength of the history bias.
        lowest_pitch: lowest MIDI pitch to play; raise it for a short keyboard: 61 keys go from 36 to 96.
        highest_pitch: highest MIDI pitch to play; lower it for a short keyboard.

    Raises:
        SamplingError: a value is out of range.
    """

    temperature: float = _option(1.0, "Temperature", 0.0, 2.0, 0.05, most=100.0)
    top_k: int = _option(0, "Top-k (0: all)", 0, 128, 1, most=1000)
    top_p: float = _option(0.97, "Top-p", 0.05, 1.0, 0.01, above=0.0)
    min_p: float = _option(0.0, "Min-p", 0.0, 0.5, 0.01, most=1.0)
    steadiness: float = _option(0.25, "Steadiness", 0.0, 1.0, 0.05)
    lowest_pitch: int = _option(0, "Lowest pitch", 0, 54, 1)
    highest_pitch: int = _option(127, "Highest pitch", 72, 127, 1)

    def __post_init__(self) -> None:
        check_ranges(self, SamplingError)


OPTION_NAMES = tuple(field.name for field in dataclasses.fields(SamplingOptions))
"""Names of all sampling options."""
