"""What `music-ar render` prints while it works: text for people, or JSON lines for programs."""

import json
import math
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from app.console import ProgressLine, clock
from app.rendering.lines import MANIFEST
from app.rendering.manifest import Line
from music_ar.storage import Folder

_SECONDS_BETWEEN_LINES = 5.0


@dataclass(kw_only=True)
class Tally:
    """Counts of one run: pieces to generate, already complete, generated, failed, and left to another process."""

    folder: Folder
    pieces: int
    wanted_s: float
    complete: int
    generated: int = 0
    failed: int = 0
    elsewhere: int = 0
    music_s: float = 0.0
    began_s: float = field(default_factory=time.monotonic)

    @property
    def spent_s(self) -> float:
        """Seconds since the run began."""
        return max(time.monotonic() - self.began_s, 1e-9)

    @property
    def speed(self) -> float:
        """Seconds of music per second."""
        return self.music_s / self.spent_s

    @property
    def eta_s(self) -> float:
        """Seconds left at this speed."""
        return max(self.wanted_s - self.music_s, 0.0) / max(self.speed, 1e-9)


class TextLog:
    """For people: a progress line and errors on standard error, a summary on standard output."""

    def __init__(self, bar: ProgressLine):
        self._bar = bar

    def piece(self, line: Line) -> None:
        """Print the error of a failed piece."""
        if line["error"] is not None:
            print(f"{line['prompt'] or line['file']}: {line['error']}", file=sys.stderr)

    def progress(self, tally: Tally) -> None:
        """Update the progress line."""
        text = f"{tally.generated + tally.failed} of {tally.pieces} pieces, {clock(tally.music_s)} of music"
        if tally.music_s:
            text += f", {tally.speed:.1f} times real time, {clock(tally.eta_s)} left"
        self._bar.report(min(tally.music_s / max(tally.wanted_s, 1e-9), 1.0), text)

    def summary(self, tally: Tally) -> None:
        """Print how many pieces were generated, were complete, failed, or were left to another process."""
        print(
            f"{tally.folder}: {tally.generated} pieces generated ({clock(tally.music_s)} of music in "
            f"{clock(tally.spent_s)}, {tally.speed:.1f} times real time), {tally.complete} already complete, "
            f"{tally.failed} failed"
        )
        if tally.elsewhere:
            print(f"{tally.elsewhere} more are left to another process")
        if tally.failed:
            print(f"the errors are in {tally.folder.path(MANIFEST)}; run the command again to retry")


class JsonLog:
    """For programs: one JSON object per line on standard output."""

    def __init__(self) -> None:
        self._logged_s = -math.inf

    def piece(self, line: Line) -> None:
        """Print the manifest line of a piece."""
        print_event("piece", line)

    def progress(self, tally: Tally) -> None:
        """Print the progress, every few seconds."""
        if tally.spent_s - self._logged_s < _SECONDS_BETWEEN_LINES:
            return
        self._logged_s = tally.spent_s
        print_event(
            "progress",
            {
                "pieces": tally.generated + tally.failed,
                "of": tally.pieces,
                "music_s": round(tally.music_s, 2),
                "times_real_time": round(tally.speed, 2),
                "eta_s": round(tally.eta_s, 1),
            },
        )

    def summary(self, tally: Tally) -> None:
        """Print the counts."""
        print_event(
            "summary",
            {
                "made": tally.generated,
                "failed": tally.failed,
                "already_there": tally.complete,
                "elsewhere": tally.elsewhere,
                "music_s": round(tally.music_s, 2),
                "seconds": round(tally.spent_s, 2),
            },
        )


Log = TextLog | JsonLog


def print_event(event: str, fields: dict[str, Any]) -> None:
    """Print a JSON line with a field `event`."""
    print(json.dumps({"event": event} | fields, ensure_ascii=False), flush=True)
