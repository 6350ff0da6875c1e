"""`PromptFile`: the MIDI file that a performance continues."""

import math
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """The part of a MIDI file with which a performance begins. `write_midi` repeats its events as they are.

    Attributes:
        midi: the file's bytes.
        start_s: where the part begins in the file; it is the performance's time zero.
        end_s: where it ends, in the performance's time.
    """

    midi: bytes = field(repr=False)
    start_s: int | float = 0
    end_s: int | float = math.inf

    def crop(self, start_s: int | float, end_s: int | float) -> "PromptFile | None":
        """What is left in a cropped performance; None if that begins after the prompt."""
        if start_s > 0 and start_s >= self.end_s:
            return None
        return replace(self, start_s=self.start_s + start_s, end_s=min(self.end_s, end_s) - start_s)
