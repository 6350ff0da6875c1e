"""`ReportConfig`: what a report generates and measures. It is part of the command line, so it avoids JAX."""

from dataclasses import dataclass
from pathlib import Path

from app.console import Unset, check_options
from music_ar.ranges import MAX_SECONDS, MAX_SEED, number, whole


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
        encoder: piece encoder for the Fréchet music distance: name of a shipped one, a folder, or a hub id
            (owner/name); default: the shipped encoder. Without any, that distance is left out.
    """

    pieces: int = whole(64, 1, 1_000_000)
    seconds: float = number(120.0, above=0, most=MAX_SECONDS)
    prompt_seconds: float = number(0.0, least=0, most=MAX_SECONDS)
    generation_latents: Unset[int] = whole(None, 2)
    generated: Unset[Path] = None
    seed: int = whole(0, 0, MAX_SEED)
    motifs: int = whole(32, 1, 1_000_000)
    encoder: Unset[str] = None

    def __post_init__(self) -> None:
        check_options(self)
