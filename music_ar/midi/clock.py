"""Ticks <-> seconds.

The same float64 operations in the same order as in pretty_midi 0.2, through which note-seq reads: a difference in the
last bit of a time can move an event by one 10 ms step.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

MICROSECONDS_PER_QUARTER = 500_000
"""Tempo of files that set none: 120 quarter notes per minute."""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """From `tick[k]`, which is at `start_s[k]`, each tick lasts `tick_s[k]` seconds."""

    tick: Int64[np.ndarray, " k"]
    start_s: Float64[np.ndarray, " k"]
    tick_s: Float64[np.ndarray, " k"]

    @classmethod
    def constant(cls, tick_s: float) -> "Clock":
        """The clock of a file whose ticks are parts of a second."""
        return cls(tick=np.zeros(1, np.int64), start_s=np.zeros(1), tick_s=np.array([tick_s]))

    @classmethod
    def of_tempos(
        cls, tick: Int64[np.ndarray, " n"], microseconds: Int64[np.ndarray, " n"], ticks_per_quarter: int
    ) -> "Clock":
        """The clock of a file whose ticks are parts of a quarter note.

        Args:
            tick: when each tempo begins, in ascending order; of several at one tick, the last counts.
            microseconds: duration of a quarter note at each tempo; 0 is ignored.
            ticks_per_quarter: ticks per quarter note.
        """
        tick, tempo = tick[microseconds > 0], microseconds[microseconds > 0].astype(np.float64)
        first = tempo[tick == 0][-1:] if (tick == 0).any() else [float(MICROSECONDS_PER_QUARTER)]
        tempo = np.concatenate([first, tempo[tick > 0]])
        tick = np.concatenate([[0], tick[tick > 0]])
        tick_s = 60.0 / ((6e7 / tempo) * ticks_per_quarter)
        changed = np.concatenate([[True], tick_s[1:] != tick_s[:-1]])
        tick, tick_s = tick[changed], tick_s[changed]
        start_s = np.concatenate([[0.0], np.cumsum(tick_s[:-1] * np.diff(tick))])
        return cls(tick=tick, start_s=start_s, tick_s=tick_s)

    def seconds(self, tick: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """When each tick is."""
        segment = np.searchsorted(self.tick, tick, side="right") - 1
        return self.start_s[segment] + self.tick_s[segment] * (tick - self.tick[segment])

    def ticks(self, seconds: Float64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The tick nearest to each time."""
        segment = np.searchsorted(self.start_s, seconds, side="right") - 1
        return self.tick[segment] + np.rint((seconds - self.start_s[segment]) / self.tick_s[segment]).astype(np.int64)

    def until(self, tick: int) -> "Clock":
        """The clock without the tempos after a tick: the last one before goes on."""
        kept = self.tick <= tick
        return Clock(tick=self.tick[kept], start_s=self.start_s[kept], tick_s=self.tick_s[kept])
