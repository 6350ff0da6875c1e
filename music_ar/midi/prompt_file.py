"""`PromptFile`: the MIDI file that a performance continues."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """The part of a MIDI file with which a performance begins. `write_midi` repeats its events as they are.

    Attributes:
        midi: the file's bytes.
        start_s: where the part begins in the file; it is the performance's time zero.
        end_s: where it ends, in the performance's time.
    """

    midi: bytes
    start_s: float = 0.0
    end_s: float = math.inf
