"""`ReportConfig`: what a report generates and measures. It is part of the command line, so it avoids JAX."""

import math
from dataclasses import dataclass
from pathlib import Path

from app.console import CommandError, Unset


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the report generates and measures; used with --report only.

    Attributes:
        pieces: number of pieces to generate. More make the distances from real music more reliable, and take longer.
        seconds: length of each piece; real pieces are cut to the same length. Self-similarity is measured at
            lags of up to a minute, so it needs more than 60 seconds.
        prompt_seconds: length of the prompts, which are the beginnings of real pieces; 0 generates from scratch.
        generation_latents: number of latents for generation; default: 1024, or the model's maximum if it has fewer.
            Fewer is faster, more is more coherent.
        generated: compare the MIDI files in this folder with real music instead of generating pieces. Use it for pieces
            of an earlier report or of another model.
        seed: random seed of the first piece; piece i uses seed + i. Also seeds the motifs and the real-vs-real
            baseline.
        motifs: number of planted motifs per distance. More make the retrieval probe more reliable, and slower.
    """

    pieces: int = 64
    seconds: float = 120.0
    prompt_seconds: float = 0.0
    generation_latents: Unset[int] = None
    generated: Unset[Path] = None
    seed: int = 0
    motifs: int = 32

    def __post_init__(self) -> None:
        if min(self.pieces, self.motifs) < 1:
            raise CommandError(f"--pieces and --motifs must be at least 1, got {self.pieces} and {self.motifs}")
        if not 0 < self.seconds < math.inf:
            raise CommandError(f"--seconds must be more than 0, got {self.seconds}")
        if not 0 <= self.prompt_seconds < math.inf:
            raise CommandError(f"--prompt-seconds must be 0 or more, got {self.prompt_seconds}")
