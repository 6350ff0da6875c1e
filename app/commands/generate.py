"""The command `music-ar generate`: generate one piece, or several variations of it, as MIDI."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from app.console import (
    Budget,
    Choices,
    CommandError,
    Layers,
    ProgressLine,
    Sampling,
    Tolerance,
    Unset,
    WishOptions,
    check_writable,
    clock,
    read_performance,
)
from app.output import import_write_audio, is_audio
from music_ar.decoding.sampling import SamplingOptions
from music_ar.features.wish_options import Wishes

if TYPE_CHECKING:
    from music_ar.decoding.request import Request
    from music_ar.decoding.session import Chunk
    from music_ar.midi.performance import Performance


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Generate piano pieces, from scratch or continuing a prompt, and write them as MIDI or as sound.

    Example: music-ar generate --output longer.mid --prompt mine.mid --prompt-seconds 20 --seconds 120 --latents auto

    Attributes:
        output: file to write: MIDI (.mid, .midi), or sound (.wav, .mp3, .flac, .ogg), which needs the extra `audio`.
            Several variations are numbered: piece-1.mid, piece-2.mid and so on.
        prompt: MIDI file to continue; default: none, for a piece from scratch. A MIDI output keeps its events as they
            are: tracks, tempos, pedal.
        between: two MIDI files to join: the music fills a gap of exactly --seconds between them. Needs a model that was
            trained to fill gaps.
        replace: a passage to make anew, in seconds from the beginning, and the MIDI file: --replace 12:20 mine.mid. All
            notes that begin before or after it stay as they are. Needs a model that was trained to fill gaps.
        prompt_seconds: use only this many seconds of the prompt, from its beginning; default: all.
        continuation_only: write only the new music, without the prompt.
        pedal: play the generated notes with the sustain pedal, so that a player piano or a workstation shows keys and
            pedal as a pianist would use them. It sounds the same.
        seconds: length of the music to generate; a piece may end earlier. With --replace, the length of the passage
            counts instead.
        variations: number of pieces to generate at once; variation i uses seed + i. On a CPU each is the piece that
            its seed gives alone; on a GPU or TPU it may be another one, since the number of pieces moves the last bits
            of the logits.
        latents: number of latents. Fewer is faster, more is more coherent. "auto" times this machine for a moment and
            takes the most that keep up with --speed. Default: 1024, or the model's maximum if it has fewer.
        speed: with --latents auto, seconds of music to generate per second. Raise it to leave room for other work;
            default: 1.5.
        seed: random seed; the same seed and options give the same piece. Default: a random one, which is printed.
        checkpoint: name of a shipped model, a folder, or a hub id (owner/name); default: the shipped model.
    """

    many_rows: ClassVar[bool] = False  # see app.cli.Command

    output: Path
    prompt: Unset[Path] = None
    between: Unset[tuple[Path, Path]] = None
    replace: Unset[tuple[str, Path]] = None
    prompt_seconds: Unset[float] = None
    continuation_only: bool = False
    pedal: bool = False
    seconds: float = 60.0
    variations: int = 1
    choices: Choices = 1
    latents: Unset[int | Literal["auto"]] = None
    layers: Layers = None
    tolerance: Tolerance = 0.0
    budget: Budget = None
    speed: Unset[float] = None
    seed: Unset[int] = None
    checkpoint: Unset[str] = None
    sampling: Sampling = SamplingOptions()
    wishes: WishOptions = Wishes()

    def __post_init__(self) -> None:
        fills_gap = self.between is not None or self.replace is not None
        if sum(each is not None for each in (self.prompt, self.between, self.replace)) > 1:
            raise CommandError("give only one of --prompt, --between and --replace")
        if self.prompt is None and (self.prompt_seconds is not None or (self.continuation_only and not fills_gap)):
            raise CommandError("--prompt-seconds and --continuation-only need a --prompt")

    def run(self) -> None:
        """Write the pieces; print their length, the time they took and the seeds."""
        from music_ar import Generator

        check_writable(self.output)
        write = self._writer()  # raises before the work
        request = self._request()
        began_s, first_s, chunk = time.monotonic(), None, None
        with ProgressLine("loading the model") as line:
            generator = Generator.from_pretrained(self.checkpoint)
            session = generator.session(request)
            for chunk in session.extend(request.seconds):
                first_s = time.monotonic() - began_s if first_s is None else first_s
                line.report(chunk.seconds_made / chunk.seconds_wanted, _progress(chunk))
        if session.gap is not None and session.gap.cut is not None:
            print(f"note: {session.gap.cut}", file=sys.stderr)
        assert chunk is not None  # a session yields at least one chunk
        elapsed_s = time.monotonic() - began_s
        for number, (seed, piece) in enumerate(zip(chunk.seeds, chunk.performances, strict=True), start=1):
            path = self.output if len(chunk.seeds) == 1 else self.output.with_stem(f"{self.output.stem}-{number}")
            write(piece, path, seed)
            print(f"{path}: {len(piece)} notes, {piece.duration_s:.1f} s, seed {seed}")
        print(
            f"generated {chunk.seconds_made:.1f} s of music in {elapsed_s:.1f} s, including loading: "
            f"{chunk.seconds_made / elapsed_s:.2f} times real time, first notes after {first_s:.1f} s, "
            f"{session.setting.in_words(generator.config)}"
        )

    def _writer(self) -> "Callable[[Performance, Path, int], None]":
        """What writes a piece to a file, given its seed."""
        from music_ar import write_midi

        if not is_audio(self.output):
            return lambda piece, path, _: write_midi(piece, path, pedal=self.pedal)
        if self.pedal:
            raise CommandError("--pedal is for MIDI files: sound has the pedal in any case; leave it out")
        write_audio = import_write_audio(f"--output {self.output}")
        return lambda piece, path, seed: write_audio(piece, path, title=path.stem, comment=f"Music AR, seed {seed}")

    def _request(self) -> "Request":
        from music_ar import Request

        return Request.of(
            self._passages(),
            latents=self.latents,
            layers=self.layers,
            tolerance=self.tolerance,
            budget=self.budget,
            speed=self.speed,
            seed=self.seed,
            variations=self.variations,
            choices=self.choices,
            **({} if self.prompt_seconds is None else {"prompt_seconds": self.prompt_seconds}),
            continuation_only=self.continuation_only,
            sampling=self.sampling,
            wishes=self.wishes,
        )

    def _passages(self) -> "Request":
        """What is given, and how long the new music is."""
        from music_ar import Request
        from music_ar.decoding.request import GenerationError

        if self.replace is not None:
            passage, path = self.replace
            piece = read_performance(path)
            try:
                return Request.replacing(piece, *_passage_s(passage))
            except GenerationError as error:
                raise CommandError(f"--replace {passage} {path}: {error}") from error
        if self.between is not None:
            before, after = map(read_performance, self.between)
            return Request(prompt=before, after=_from_first_note(after), seconds=self.seconds)
        return Request(prompt=None if self.prompt is None else read_performance(self.prompt), seconds=self.seconds)


def _passage_s(text: str) -> tuple[float, float]:
    """Beginning and end of a passage, in seconds."""
    start, colon, end = text.partition(":")
    try:
        passage = float(start), float(end)
    except ValueError:
        passage = None
    if not colon or passage is None or not all(map(math.isfinite, passage)):
        raise CommandError(f"--replace must be two numbers of seconds, such as 12:20, and a file; got {text}")
    return passage


def _from_first_note(piece: "Performance") -> "Performance":
    """The piece without the silence before it."""
    return piece.crop(float(piece.onset_s[0]) if len(piece) else 0.0)


def _progress(chunk: "Chunk") -> str:
    return (
        f"{chunk.seconds_made:.1f} of {chunk.seconds_wanted:g} s of music, {chunk.tokens_per_s:.0f} tokens/s, "
        f"{clock(chunk.eta_s)} left"
    )
