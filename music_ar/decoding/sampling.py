"""`SamplingOptions`: how tokens are drawn. `processors` applies them. This module does not import JAX."""

import dataclasses
from typing import Any


class SamplingError(ValueError):
    """A sampling option is out of range."""


def _option(default: int | float, label: str, minimum: int | float, maximum: int | float, step: int | float) -> Any:
    """A field whose metadata describes a control: its label, range and step."""
    metadata = {"label": label, "minimum": minimum, "maximum": maximum, "step": step}
    return dataclasses.field(default=default, metadata=metadata)


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

    temperature: float = _option(1.0, "Temperature", 0.0, 2.0, 0.05)
    top_k: int = _option(0, "Top-k (0: all)", 0, 128, 1)
    top_p: float = _option(0.97, "Top-p", 0.05, 1.0, 0.01)
    min_p: float = _option(0.0, "Min-p", 0.0, 0.5, 0.01)
    steadiness: float = _option(0.25, "Steadiness", 0.0, 1.0, 0.05)
    lowest_pitch: int = _option(0, "Lowest pitch", 0, 54, 1)
    highest_pitch: int = _option(127, "Highest pitch", 72, 127, 1)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise SamplingError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise SamplingError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise SamplingError(f"min_p must be in 0..1, got {self.min_p}")
        if not 0 <= self.steadiness <= 1:
            raise SamplingError(f"steadiness must be in 0..1, got {self.steadiness}")
        if not 0 <= self.lowest_pitch <= 54:
            raise SamplingError(f"lowest_pitch must be in 0..54, got {self.lowest_pitch}")
        if not 72 <= self.highest_pitch <= 127:
            raise SamplingError(f"highest_pitch must be in 72..127, got {self.highest_pitch}")


OPTION_NAMES = tuple(field.name for field in dataclasses.fields(SamplingOptions))
"""Names of all sampling options."""
