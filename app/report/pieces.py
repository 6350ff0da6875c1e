"""The pieces that a report compares: excerpts of real ones, and generated ones."""

from pathlib import Path

from app.console import CommandError
from app.report.config import ReportConfig
from app.report.measure import Timed, Tokens
from data_pipeline.maestro import MidiFiles
from music_ar.decoding.loading import decoder_of
from music_ar.decoding.request import Request
from music_ar.decoding.sampling import SamplingOptions
from music_ar.generator import Generator
from music_ar.midi.io import read_midi, write_midi
from music_ar.midi.performance import Performance
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.pretrained import weights_of
from music_ar.tokens import codec


def excerpts(tokens: Tokens, start_s: float, seconds: float) -> list[Performance]:
    """The same span of every piece that is long enough, in seconds from its first note."""
    whole = [codec.decode(piece) for piece in tokens]
    cut = [piece.crop(at := float(piece.onset_s[0]) + start_s, at + seconds) for piece in whole if len(piece)]
    return [piece for piece in cut if len(piece)]


def prompt_index(number: int, pieces: int, prompts: int) -> int:
    """Which prompt the piece with this number continues. If there are fewer pieces than prompts, evenly spaced ones."""
    return number * prompts // pieces if pieces < prompts else number % prompts


def generated_pieces(
    model: PerceiverAR, tokens: Tokens, config: ReportConfig, sampling: SamplingOptions, folder: Path, timed: Timed
) -> list[Performance]:
    """The pieces to compare with real music: existing MIDI files, or newly generated pieces.

    Args:
        model: generates the pieces.
        tokens: real pieces, whose beginnings are the prompts.
        config, sampling: what to generate, or where the MIDI files are.
        folder: where new pieces are written.
        timed: shows progress.

    Raises:
        CommandError: there are no MIDI files, or a piece cannot be generated.
    """
    if config.generated is not None:
        with MidiFiles(config.generated) as files:
            pieces = [read_midi(files.read(name)) for name in files.midi_names()[: config.pieces]]
        if not pieces:
            raise CommandError(f"expected MIDI files in {config.generated}, found none")
        return [piece.crop(0, config.seconds) for piece in pieces]
    requests = _requests(tokens, config, sampling)
    done, report = 0.0, timed(f"generating {len(requests)} pieces")

    def progress(seconds: float) -> None:
        nonlocal done
        done += seconds / (config.seconds * len(requests))
        report(min(done, 1.0))

    folder.mkdir(exist_ok=True)
    made = Generator(decoder_of(weights_of(model, int8=False))).generate_many(requests, progress=progress)
    pieces = sorted(made, key=lambda piece: piece.request.tag)
    for piece in pieces:
        seed = piece.request.seed
        if piece.error is not None:
            raise CommandError(f"cannot generate the piece with seed {seed}: {piece.error}")
        write_midi(piece.continuation, folder / f"{seed:04}.mid")
    return [piece.continuation for piece in pieces]


def _requests(tokens: Tokens, config: ReportConfig, sampling: SamplingOptions) -> list[Request]:
    prompts = excerpts(tokens, 0.0, config.prompt_seconds) if config.prompt_seconds else [None]
    return [
        Request(
            prompt=prompts[prompt_index(number, config.pieces, len(prompts))],
            seconds=config.seconds,
            latents=config.generation_latents,
            sampling=sampling,
            seed=config.seed + number,
            continuation_only=True,
            tag=number,
        )
        for number in range(config.pieces)
    ]
