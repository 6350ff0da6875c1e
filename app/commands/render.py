"""The command `music-ar render`: generate many pieces, unattended and resumable."""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from app.console import (
    SOME_FAILED,
    STDIN,
    Budget,
    Choices,
    CommandError,
    Layers,
    ProgressLine,
    Sampling,
    Tolerance,
    Unset,
    WishOptions,
    check_options,
    clock,
    print_table,
)
from app.output import import_write_audio
from music_ar.decoding.sampling import SamplingOptions
from music_ar.features.wish_options import Wishes
from music_ar.ranges import whole

if TYPE_CHECKING:
    from app.rendering.on_ray import AnyGenerator
    from app.rendering.plan import Plan
    from app.rendering.run import WriteAudio
    from music_ar.decoding.request import Request
    from music_ar.embedding import PieceEmbedder
    from music_ar.midi.performance import Performance


@dataclass(frozen=True, kw_only=True)
class Render:
    """Generate many pieces unattended: a folder of MIDI files, and a manifest with one line per piece.

    If it is stopped or killed, the same command resumes, and the files come out the same to the last byte. Several
    processes may share an output folder, and --ray generates on all machines of a Ray cluster. Exit code 0: all pieces
    are complete; 3: some failed; 2: wrong usage.

    Example: music-ar render prompts/ --output out --variations 4 --seconds 120 --keep-best 2

    Attributes:
        prompts: MIDI files to continue: files, folders (searched recursively), globs, or text files (.txt, .list) with
            one file name per line. Files and folders may be addresses (s3://bucket/prompts). "-" reads a MIDI file from
            standard input.
        output: folder to write, or its address (s3://bucket/out, gs://...). "-" writes a single piece to standard
            output and nothing else.
        count: also generate this many pieces without a prompt; piece i uses seed + i.
        jobs: JSONL file with one object per line: prompt, name, and any of the options here that change the music
            (variations, seed, seconds, latents, temperature, composer and so on). Use it if pieces need different
            options; whatever a line leaves out is taken from this command. "-" reads it from standard input.
        variations: number of pieces per prompt; variation i uses seed + i.
        keep_best: keep only this many variations of each prompt: those most like the prompt, by the shipped piece
            encoder; from scratch, those closest to real music in note density, polyphony, loudness, silences and
            likelihood under the model. Default: all.
        seconds: length of the music to generate after the prompt; a piece may end earlier.
        prompt_seconds: use only this many seconds of each prompt, from its beginning; default: all.
        continuation_only: write only the new music, without the prompt.
        latents: number of latents. Fewer is faster, more is more coherent. Default: 1024, or the model's maximum if it
            has fewer.
        seed: random seed of each prompt's first variation. Change it for other pieces.
        audio: also write each piece as an audio file, tagged with title, seed and model; needs the extra `audio`.
        pedal: play the generated notes with the sustain pedal, so that a player piano or a workstation shows keys and
            pedal as a pianist would use them. It sounds the same.
        batch_size: pieces generated at once; default: 16 on a CPU, elsewhere as many as fit in memory. Where JAX
            decodes, the music depends on it, so set it if you need the same bytes on another device.
        overwrite: replace pieces that were generated with other settings. Without it, such pieces are an error.
        fail_fast: stop at the first piece that fails instead of recording the error and continuing.
        dry_run: print what would be generated and about how long it would take, and generate nothing.
        log: "text" for people, or "json" for programs: one object per line on standard output.
        ray: generate on a Ray cluster, a batch on each GPU or machine, by the HOST:PORT of its head; "auto" is the
            cluster that this machine is part of. Files and manifest are written here. Needs the extra `ray`.
        checkpoint: name of a shipped model, a folder, or a hub id (owner/name); default: the shipped model.
    """

    many_rows: ClassVar[bool] = True  # see app.cli.Command

    prompts: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[PROMPTS ...]", help_behavior_hint="")
    ] = ()
    output: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    count: int = whole(0, 0, 1_000_000)
    jobs: Unset[Path] = None
    variations: int = 1
    choices: Choices = 1
    keep_best: Unset[int] = whole(None, 1)
    seconds: float = 60.0
    prompt_seconds: Unset[float] = None
    continuation_only: bool = False
    latents: Unset[int] = None
    layers: Layers = None
    tolerance: Tolerance = 0.0
    budget: Budget = None
    seed: int = 0
    audio: Unset[Literal["wav", "flac", "mp3", "ogg"]] = None
    pedal: bool = False
    batch_size: Unset[int] = whole(None, 1, 2**12)
    overwrite: bool = False
    fail_fast: bool = False
    dry_run: bool = False
    log: Literal["text", "json"] = "text"
    ray: Annotated[Unset[str], tyro.conf.arg(metavar="HOST:PORT")] = None
    checkpoint: Unset[str] = None
    sampling: Sampling = SamplingOptions()
    wishes: WishOptions = Wishes()

    def __post_init__(self) -> None:
        from music_ar.decoding.request import Request

        check_options(self)
        if STDIN in self.prompts and self.jobs == Path(STDIN):
            raise CommandError("standard input (-) can be a prompt or the jobs, not both")
        own = (
            "variations",
            "choices",
            "seconds",
            "prompt_seconds",
            "latents",
            "layers",
            "tolerance",
            "budget",
            "seed",
        )
        Request(**{name: getattr(self, name) for name in own}, sampling=self.sampling)  # checks them
        if not self.prompts and not self.count and self.jobs is None:
            raise CommandError("nothing to generate: give prompts, --count or --jobs")
        if self.output == "-" and (self.audio or self.keep_best or self.log == "json" or self.dry_run or self.ray):
            raise CommandError(
                "--output - writes a single MIDI file to standard output; it does not go with --audio, --keep-best, "
                "--log json, --dry-run or --ray"
            )

    def run(self) -> int:
        """Generate what is missing; return the exit code."""
        from app.rendering.on_ray import RayGenerator
        from music_ar import Generator
        from music_ar.cluster import Cluster
        from music_ar.model.weights import read_companion, read_weights

        if self.output == "-":
            return self._pipe()
        write_audio = None if self.audio is None else import_write_audio(f"--audio {self.audio}")
        if self.ray is None:
            return self._run(Generator.from_pretrained(self.checkpoint), write_audio)
        weights, curve = read_weights(self.checkpoint), read_companion(self.checkpoint, "curve.json")
        with Cluster(self.ray) as cluster, RayGenerator(cluster, weights, curve) as generator:
            return self._run(generator, write_audio)

    def _run(self, generator: "AnyGenerator", write_audio: "WriteAudio | None") -> int:
        from app.rendering.leases import Leases
        from app.rendering.log import JsonLog, TextLog
        from app.rendering.manifest import Manifest
        from app.rendering.run import Run
        from music_ar.model.weights import identity

        plan = self._plan(generator, identity(self.checkpoint))
        manifest = Manifest(self.output)
        if not self.overwrite:
            manifest.check_unchanged(plan.requests)
        missing = [request for request in plan.requests if not manifest.is_complete(request)]
        if self.dry_run:
            self._print_plan(plan, missing)
            return 0
        if self._ranks_by_likeness and any(request.prompt is not None for request in missing):
            _encoder()  # raises now if it is damaged, not after the first piece
        with Leases(self.output) as leases:
            run = Run(
                plan.generator,
                manifest,
                leases,
                plan.requests,
                missing,
                write_audio=write_audio,
                keep_best=self.keep_best,
                alike=_alike if self._ranks_by_likeness else None,
                fail_fast=self.fail_fast,
            )
            if self.log == "json":
                return run.run(JsonLog())
            with ProgressLine(f"{len(missing)} of {len(plan.requests)} pieces to generate") as bar:
                return run.run(TextLog(bar))

    @property
    def _ranks_by_likeness(self) -> bool:
        from music_ar.embedding.library import shipped_encoder

        return self.keep_best is not None and shipped_encoder() is not None

    def _plan(self, generator: "AnyGenerator", model: dict[str, Any]) -> "Plan":
        """Plan all pieces, in the order they were asked for."""
        from app.rendering.plan import OPTION_TYPES, Plan, find_prompts, read_jobs
        from music_ar.midi.io import MAX_BYTES

        prompts = list(find_prompts(self.prompts))
        jobs = [] if self.jobs is None else list(read_jobs(self.jobs))
        own = vars(self) | dataclasses.asdict(self.sampling) | dataclasses.asdict(self.wishes)
        plan = Plan(
            generator,
            model,
            defaults={name: own[name] for name in OPTION_TYPES},
            batch_size=self.batch_size,
            audio=self.audio,
            pedal=self.pedal,
            keep_best=self.keep_best,
            ranks_by_likeness=self._ranks_by_likeness,
        )
        stdin = sys.stdin.buffer.read(MAX_BYTES + 1) if any(prompt.is_stdin for prompt in prompts) else None
        for prompt in prompts:
            plan.add(prompt.path, prompt.name, data=stdin if prompt.is_stdin else None)
        for number in range(self.count):
            plan.add(None, f"piece-{number + 1:04}", seed=self.seed + number, variations=1)
        for number, job in enumerate(jobs, start=1):
            plan.add_job(job, number)
        return plan

    def _print_plan(self, plan: "Plan", missing: "Sequence[Request]") -> None:
        from app.rendering.log import print_event
        from app.rendering.manifest import planned_line

        music_s, estimate_s = sum(request.seconds for request in missing), _estimate_s(plan.generator, missing)
        if self.log == "json":
            for request in missing:
                print_event("would make", planned_line(request))
            counts = {"pieces": len(plan.requests), "missing": len(missing)}
            print_event("plan", counts | {"music_s": music_s, "estimated_s": estimate_s})
            return
        rows = [
            (request.tag.file, request.tag.prompt or "none", str(request.seed), f"{request.seconds:g} s")
            for request in missing
        ]
        if rows:
            print_table(("piece", "prompt", "seed", "length"), rows)
        print(
            f"{self.output}: {len(missing)} of {len(plan.requests)} pieces would be generated, up to {clock(music_s)} "
            f"of music in about {clock(estimate_s)}"
        )

    def _pipe(self) -> int:
        """Write a single piece to standard output."""
        from app.rendering.plan import load_prompt
        from music_ar import Generator, write_midi

        with ProgressLine("generating a piece") as line:
            generator = Generator.from_pretrained(self.checkpoint)
            plan = self._plan(generator, {})
            if len(plan.requests) != 1:
                asked = len(plan.requests)
                raise CommandError(f"--output - writes a single piece, these options ask for {asked}; name a folder")
            [request], music_s = plan.requests, 0.0
            if request.tag.error is not None:
                raise CommandError(request.tag.error)
            request = load_prompt(request)

            def progress(seconds: float) -> None:
                nonlocal music_s
                music_s += seconds
                line.report(music_s / request.seconds, f"{music_s:.1f} of {request.seconds:g} s of music")

            [piece] = generator.generate_many([request], batch_size=1, progress=progress)
        if piece.error is not None:
            print(f"music-ar: {request.tag.prompt}: {piece.error}", file=sys.stderr)
            return SOME_FAILED
        write_midi(piece.performance, sys.stdout.buffer, pedal=self.pedal)
        sys.stdout.buffer.flush()
        return 0


@functools.cache
def _encoder() -> "PieceEmbedder":
    from music_ar.embedding.library import load_encoder_or_shipped

    return load_encoder_or_shipped(None)


def _alike(prompt: "Performance", continuation: "Performance") -> float | None:
    """How alike they are; see `likeness`."""
    from music_ar.embedding.search import likeness

    return likeness(_encoder(), prompt, continuation)


def _estimate_s(generator: "AnyGenerator", requests: "Sequence[Request]") -> float:
    """Estimate how long the requests will take, from the timing of a few chunks and the density of real music."""
    from music_ar.decoding.autotune import MAESTRO_TOKENS_PER_S

    estimate_s = 0.0
    for request in requests:
        size, (latents, layers, tolerance) = request.tag.settings["batch_size"], generator.setting(request)
        step_s = generator.autotuner.seconds_per_token(latents, size * request.rows, layers=layers, tolerance=tolerance)
        estimate_s += request.seconds * MAESTRO_TOKENS_PER_S * step_s / min(size, len(requests))
    return estimate_s
