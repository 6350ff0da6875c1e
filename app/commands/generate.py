"""The command `music-ar generate`: one piece, or several samples of it, as MIDI."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from app.console import CommandError, ProgressLine, check_writable, clock, read_performance


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Makes piano pieces, from nothing or going on from a prompt, and writes them as MIDI.

    Example: music-ar generate --output longer.mid --prompt mine.mid --prompt-seconds 20 --seconds 120 --latents auto

    Attributes:
        output: MIDI file to write. Several variations get a number before the ending: piece-1.mid, piece-2.mid, …
        prompt: MIDI file to go on from.
        prompt_seconds: how many seconds of the prompt to use, from its beginning; by default all.
        continuation_only: write what was made, without the prompt before it.
        seconds: how many seconds of music to make; a piece may end sooner.
        variations: how many pieces to make at once, with the seeds that follow `seed`.
        latents: the latent budget: fewer are faster, more are better; by default 1024, or what the model has. "auto"
            takes the most that keep `speed` on this machine.
        speed: with "auto", how many seconds of music to make in a second; by default 1.5.
        mode: how the window of latents goes on once it is full: sliding, or exact as in training.
        temperature: below 1 is more predictable, above 1 more daring; 0 takes the likeliest event each time.
        top_k: of each kind of event keep only so many of the likeliest; 0 keeps all.
        top_p: of each kind of event keep the likeliest that together have this share of it; 1 keeps all.
        min_p: keep only events at least this likely, relative to the likeliest of their kind; 0 keeps all.
        steadiness: from 0, not at all, to 1: how closely a piece keeps to the pitch classes and registers it has had so
            far, and to usual loudness and, the longer it is, its own.
        seed: the same seed gives the same piece; by default a new one, which is told.
        checkpoint: name of a shipped model, a folder, or a hub id (owner/name).
    """

    output: Path
    prompt: Path | None = None
    prompt_seconds: float | None = None
    continuation_only: bool = False
    seconds: float = 60.0
    variations: int = 1
    latents: int | Literal["auto"] | None = None
    speed: float | None = None
    mode: Literal["sliding", "exact"] = "sliding"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.97
    min_p: float = 0.0
    steadiness: float = 0.25
    seed: int | None = None
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        if self.prompt is None and (self.prompt_seconds is not None or self.continuation_only):
            raise CommandError("--prompt-seconds and --continuation-only need a --prompt")

    def run(self) -> None:
        """Writes the pieces and prints their length, the time they took and the seeds."""
        from music_ar import Generator, write_midi
        from music_ar.decoding.sampling import SamplingOptions

        check_writable(self.output)
        options = SamplingOptions.of(vars(self))
        prompt = None if self.prompt is None else read_performance(self.prompt)
        began_s, first_s, chunk = time.monotonic(), None, None
        with ProgressLine("loading the model") as line:
            generator = Generator.from_pretrained(self.checkpoint)
            composition = generator.compose(
                prompt,
                latents=self.latents,
                speed=self.speed,
                mode=self.mode,
                options=options,
                seed=self.seed,
                variations=self.variations,
                prompt_seconds=self.prompt_seconds,
                continuation_only=self.continuation_only,
            )
            for chunk in composition.stream(self.seconds):
                first_s = time.monotonic() - began_s if first_s is None else first_s
                line.report(
                    chunk.seconds_made / chunk.seconds_wanted,
                    f"{chunk.seconds_made:.1f} of {chunk.seconds_wanted:g} s of music, "
                    f"{chunk.tokens_per_s:.0f} tokens/s, {clock(chunk.eta_s)} left",
                )
        assert chunk is not None  # a stream has at least one chunk
        elapsed_s = time.monotonic() - began_s
        for number, (seed, piece) in enumerate(zip(chunk.seeds, chunk.performances, strict=True), start=1):
            path = self.output if len(chunk.seeds) == 1 else self.output.with_stem(f"{self.output.stem}-{number}")
            write_midi(piece, path)
            print(f"{path}: {len(piece)} notes, {piece.duration_s:.1f} s, seed {seed}")
        print(
            f"made {chunk.seconds_made:.1f} s of music in {elapsed_s:.1f} s, loading included: "
            f"{chunk.seconds_made / elapsed_s:.2f} times real time, first notes after {first_s:.1f} s, "
            f"{composition.latents} latents"
        )
