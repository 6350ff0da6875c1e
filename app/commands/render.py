"""`music-ar render`: many pieces, unattended.

A plan is made first: which piece, in which file, from which prompt, with which settings. The plan is the same each
time, and a piece depends on its entry alone, so a run that was stopped goes on where it stood and gives the same bytes.
"""

import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from app.console import CommandError, ProgressLine, clock, print_table
from app.rendering.manifest import Ledger, Line, file_sha256, sha256

if TYPE_CHECKING:
    from music_ar.generator import Generator, Piece, Request

MIDI_ENDINGS = (".mid", ".midi")
LIST_ENDINGS = (".txt", ".list")
SOME_FAILED = 3
_JOB_KEYS = {
    "prompt": str, "name": str, "variations": int, "seed": int, "seconds": float, "prompt_seconds": float,
    "continuation_only": bool, "latents": int, "mode": str, "temperature": float, "top_k": int, "top_p": float,
    "min_p": float, "steadiness": float,
}  # fmt: skip
_LOG_SECONDS = 5.0
_LONGEST_NAME = 200


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of the plan.

    Attributes:
        file: where it goes, below the output folder.
        prompt: the MIDI file to go on from, as it was given; None makes a piece from nothing.
        prompt_sha256: of the file's bytes; None if it cannot be read, which is found out when its turn comes.
        seed: of the sampling.
        settings: everything else that the music depends on.
        set_of: which set of variations it belongs to.
    """

    file: str
    prompt: str | None
    prompt_sha256: str | None
    seed: int
    settings: dict[str, Any]
    set_of: str


@dataclass(frozen=True, kw_only=True)
class Render:
    """Makes many pieces unattended: a folder of MIDI files and a manifest with one line a piece.

    Stopped or killed, the same command goes on where it stood, and the result is the same to the last byte. Several
    processes may share an output folder. Exit code 0: all made, 3: some failed, 2: wrong use.

    Example: music-ar render prompts/ --output out --variations 4 --seconds 120 --keep-best 2

    Attributes:
        prompts: MIDI files to go on from: folders (searched recursively), files, globs, or text files (.txt, .list)
            that name a file a line. "-" reads one MIDI from standard input.
        output: folder to write. "-" writes one piece to standard output and nothing else.
        count: also make so many pieces from nothing, with the seeds that follow `seed`.
        jobs: JSONL file: each line is an object with the settings of some pieces of one prompt, any of prompt, name,
            variations, seed, seconds, prompt_seconds, continuation_only, latents, mode, temperature, top_k, top_p,
            min_p, steadiness; what it leaves out is taken from the options here.
        variations: pieces of each prompt, with the seeds that follow `seed`.
        keep_best: keep only so many of each prompt's variations, those most like real music: by density, notes at
            once, loudness, silences and the model's own surprise (see music_ar.statistics.likeness).
        seconds: how many seconds of music to make after the prompt; a piece may end sooner.
        prompt_seconds: how many seconds of each prompt to use, from its beginning; by default all.
        continuation_only: write what was made, without the prompt before it.
        latents: the latent budget: fewer are faster, more are better; by default 1024, or what the model has.
        mode: how the window of latents goes on once it is full: sliding, or exact as in training.
        temperature: below 1 is more predictable, above 1 more daring; 0 takes the likeliest event each time.
        top_k: of each kind of event keep only so many of the likeliest; 0 keeps all.
        top_p: of each kind of event keep the likeliest that together have this share of it; 1 keeps all.
        min_p: keep only events at least this likely, relative to the likeliest of their kind; 0 keeps all.
        steadiness: from 0, not at all, to 1: how closely a piece keeps to the pitch classes and registers it has had so
            far, and to usual loudness and, the longer it is, its own.
        seed: of each prompt's first variation.
        audio: also write each piece as sound, tagged with title, seed and model.
        batch_size: pieces at once; by default 16 on a CPU, elsewhere what the memory holds. The music depends on it.
        overwrite: make pieces anew that are there with other settings; otherwise they are refused.
        fail_fast: stop at the first piece that cannot be made.
        dry_run: say what would be made and how long it would take, and make nothing.
        log: text for people, json for machines: one object a line on standard output.
        checkpoint: name of a shipped model, a folder, or a hub id (owner/name).
    """

    prompts: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[PROMPTS ...]", help_behavior_hint="")
    ] = ()
    output: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    count: int = 0
    jobs: Path | None = None
    variations: int = 1
    keep_best: int | None = None
    seconds: float = 60.0
    prompt_seconds: float | None = None
    continuation_only: bool = False
    latents: int | None = None
    mode: Literal["sliding", "exact"] = "sliding"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.97
    min_p: float = 0.0
    steadiness: float = 0.25
    seed: int = 0
    audio: Literal["wav", "flac", "mp3"] | None = None
    batch_size: int | None = None
    overwrite: bool = False
    fail_fast: bool = False
    dry_run: bool = False
    log: Literal["text", "json"] = "text"
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        if not self.prompts and not self.count and self.jobs is None:
            raise CommandError("nothing to make: give prompts, --count or --jobs")
        if self.count < 0 or self.variations < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise CommandError("--variations and --batch-size must be at least 1, and --count at least 0")
        if self.keep_best is not None and self.keep_best < 1:
            raise CommandError(f"--keep-best must be at least 1, got {self.keep_best}")
        if self.output == "-" and (self.audio or self.keep_best or self.log == "json" or self.dry_run):
            raise CommandError(
                "--output - writes one MIDI file alone: without --audio, --keep-best, --log or --dry-run"
            )

    def run(self) -> int:
        """Makes what is missing. Returns the exit code."""
        from music_ar import Generator
        from music_ar.model.pretrained import identity

        _write_audio(self.audio)  # whether it is there, before the work
        stdin = sys.stdin.buffer.read() if "-" in self.prompts else None
        prompts = list(self._prompts())
        if self.output == "-":
            return self._pipe(prompts, stdin)
        model = identity(self.checkpoint)
        generator = Generator.from_pretrained(self.checkpoint)
        tasks = self._plan(prompts, stdin, generator, model)
        ledger = Ledger(Path(self.output), look_only=self.dry_run)
        try:
            if not self.overwrite:
                self._check_unchanged(tasks, ledger)
            missing = [task for task in tasks if not self._is_made(task, ledger)]
            if self.dry_run:
                self._tell_plan(tasks, missing, generator)
                return 0
            return _Run(self, generator, ledger, model, tasks, missing, stdin).run()
        finally:
            ledger.close()

    def _prompts(self) -> Iterator[tuple[str, str]]:
        """Each prompt as it was given, and the name that its pieces shall have."""
        for given in self.prompts:
            path = Path(given)
            if given == "-":
                yield "-", "stdin"
            elif path.is_dir():
                found = sorted(p for p in path.rglob("*") if p.suffix.lower() in MIDI_ENDINGS and _is_file(p))
                if not found:
                    raise CommandError(f"{given}: there are no files that end with .mid or .midi in this folder")
                yield from ((p.as_posix(), p.relative_to(path).with_suffix("").as_posix()) for p in found)
            elif path.is_file() and path.suffix.lower() in LIST_ENDINGS:
                lines = [line.strip() for line in _lines_of(path)]
                named = [path.parent / line for line in lines if line and not line.startswith("#")]
                if not named:
                    raise CommandError(f"{given}: this list names no files")
                yield from ((p.as_posix(), p.stem) for p in named)
            elif path.is_file():
                yield path.as_posix(), path.stem
            elif any(letter in given for letter in "*?["):
                start = Path(path.anchor or ".")
                files = sorted(p.as_posix() for p in start.glob(given.removeprefix(path.anchor)) if _is_file(p))
                if not files:
                    raise CommandError(f"{given}: no file matches")
                yield from ((PurePath(name).as_posix(), PurePath(name).stem) for name in files)
            else:
                raise CommandError(f"{given}: no such file or folder")

    def _plan(
        self, prompts: list[tuple[str, str]], stdin: bytes | None, generator: "Generator", model: dict[str, Any]
    ) -> list[Task]:
        """All pieces, in the order in which they were asked for.

        Raises:
            CommandError: a setting out of range, a broken line of jobs.
        """
        tasks: list[Task] = []
        names: set[str] = set()

        def add(prompt: str | None, name: str, job: dict[str, Any]) -> None:
            name = base = _file_name(name)
            number = 1
            while name.casefold() in names:  # two prompts of one name, from different folders or lists
                number += 1
                name = f"{base}~{number}"
            names.add(name.casefold())
            settings = {key: getattr(self, key) for key in _JOB_KEYS if key not in ("prompt", "name", "seed")} | job
            first, variations = settings.pop("seed", self.seed), settings.pop("variations")
            settings["latents"] = min(settings["latents"] or 1024, generator.model.config.latents)
            if (job.get("latents") or self.latents or 0) > settings["latents"]:
                raise CommandError(f"latents must be at most {settings['latents']}, as the model was trained")
            settings["batch_size"] = self.batch_size
            if self.audio:
                settings["audio"] = self.audio
            if self.keep_best:
                settings |= {"keep_best": self.keep_best, "variations": variations}  # which are kept depends on both
            digest = None
            if prompt is not None:
                digest = file_sha256(Path(prompt)) if prompt != "-" or stdin is None else sha256(stdin)
            for index in range(variations):
                task = Task(
                    file=f"{name}-v{index + 1}.mid",
                    prompt=prompt,
                    prompt_sha256=digest,
                    seed=first + index,
                    settings=settings | {"model": model},
                    set_of=name,
                )
                _request(task, None)  # is it possible at all?
                if settings["batch_size"] is None:
                    task.settings["batch_size"] = generator.batch_size(settings["latents"], settings["mode"])
                tasks.append(task)

        for prompt, name in prompts:
            add(prompt, name, {})
        for number in range(self.count):
            add(None, f"piece-{number + 1:04}", {"seed": self.seed + number, "variations": 1})
        for number, job in enumerate(self._jobs(), start=1):
            prompt = job.pop("prompt", None)
            name = job.pop("name", None) or (f"job-{number:04}" if prompt is None else PurePath(prompt).stem)
            add(prompt, _safe(name), job)
        return tasks

    def _jobs(self) -> Iterator[dict[str, Any]]:
        if self.jobs is None:
            return
        for number, text in enumerate(_lines_of(self.jobs), start=1):
            if not text.strip():
                continue
            where = f"{self.jobs}, line {number}"
            try:
                job = json.loads(text)
            except ValueError as error:
                raise CommandError(f"{where}: expected a JSON object, got {text[:60]!r}") from error
            if not isinstance(job, dict) or not set(job) <= set(_JOB_KEYS):
                raise CommandError(f"{where}: expected an object with any of {', '.join(_JOB_KEYS)}, got {text[:60]!r}")
            for key, value in job.items():
                kind = _JOB_KEYS[key]
                fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
                if not fits or (isinstance(value, bool) and kind is not bool):
                    raise CommandError(f"{where}: {key} must be a {kind.__name__}, got {value!r}")
                job[key] = kind(value)
            if job.get("variations", 1) < 1:
                raise CommandError(f"{where}: variations must be at least 1, got {job['variations']}")
            if "prompt" in job:
                job["prompt"] = (self.jobs.parent / job["prompt"]).as_posix()
            yield job

    def _check_unchanged(self, tasks: list[Task], ledger: Ledger) -> None:
        """Raises `CommandError` if pieces are there that were made with other settings."""
        for task in tasks:
            line = ledger.lines.get(task.file)
            changes = [] if line is None or line["status"] == "failed" else _changes(line, task)
            if changes:
                raise CommandError(
                    f"{Path(self.output) / task.file} was made with other settings ({'; '.join(changes)}): "
                    "use those, name another folder, or make it anew with --overwrite"
                )

    def _is_made(self, task: Task, ledger: Ledger) -> bool:
        line = ledger.lines.get(task.file)
        if line is None or line["status"] == "failed" or _changes(line, task):
            return False
        if line["status"] == "dropped":
            return True
        audio = line.get("audio")
        here = audio is None or (ledger.folder / audio).exists()
        return here and file_sha256(ledger.folder / task.file) == line["sha256"]

    def _tell_plan(self, tasks: list[Task], missing: list[Task], generator: "Generator") -> None:
        music_s = sum(task.settings["seconds"] for task in missing)
        estimate_s = sum(_estimate_s(generator, missing))
        if self.log == "json":
            for task in missing:
                print(json.dumps({"event": "would make", **_line(task)}, ensure_ascii=False))
            summary = {"pieces": len(tasks), "missing": len(missing), "music_s": music_s, "estimated_s": estimate_s}
            print(json.dumps({"event": "plan"} | summary))
            return
        rows = [
            (task.file, task.prompt or "from nothing", str(task.seed), f"{task.settings['seconds']:g} s")
            for task in missing
        ]
        if rows:
            print_table(("piece", "prompt", "seed", "length"), rows)
        print(
            f"{len(missing)} of {len(tasks)} pieces would be made: up to {clock(music_s)} of music, "
            f"about {clock(estimate_s)} of work, in {self.output}"
        )

    def _pipe(self, prompts: list[tuple[str, str]], stdin: bytes | None) -> int:
        """One piece to standard output."""
        from music_ar import Generator, write_midi

        if self.jobs is not None or len(prompts) + self.count != 1 or self.variations != 1:
            raise CommandError(
                "--output - writes one piece: give one prompt, or --count 1, without --variations or --jobs"
            )
        generator = Generator.from_pretrained(self.checkpoint)
        with ProgressLine("making a piece") as line:
            [task] = self._plan(prompts, stdin, generator, {})
            made_s = 0.0

            def progress(seconds: float) -> None:
                nonlocal made_s
                made_s += seconds
                line.report(made_s / self.seconds, f"{made_s:.1f} of {self.seconds:g} s of music")

            [piece] = generator.generate_many([_request(task, stdin)], batch_size=1, progress=progress)
        if piece.error is not None:
            print(f"music-ar: {task.prompt}: {piece.error}", file=sys.stderr)
            return SOME_FAILED
        write_midi(piece.performance, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return 0


class _Run:
    """One call of `render`, once it is known what is missing."""

    def __init__(
        self,
        command: Render,
        generator: "Generator",
        ledger: Ledger,
        model: dict[str, Any],
        tasks: list[Task],
        missing: list[Task],
        stdin: bytes | None,
    ):
        self._command, self._generator, self._ledger, self._model = command, generator, ledger, model
        self._tasks, self._missing, self._stdin = tasks, missing, stdin
        self._claimed: set[str] = set()
        self._made = self._failed = self._elsewhere = self._others = 0
        self._music_s, self._began_s, self._logged_s = 0.0, time.monotonic(), -math.inf
        self._wanted_s = sum(task.settings["seconds"] for task in missing)

    def run(self) -> int:
        """Makes the missing pieces, tells what became of them, and returns the exit code."""
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            with ProgressLine(f"{len(self._missing)} of {len(self._tasks)} pieces to make") as self._bar:
                for piece in self._pieces():
                    self._finish(piece)
                    self._report(0.0)
                    if self._failed and self._command.fail_fast:
                        break
            self._put_in_order()
        except KeyboardInterrupt:
            self._say_how_to_go_on("interrupted")
            return 130
        except OSError as error:
            self._say_how_to_go_on(
                f"cannot write {error.filename or 'in ' + str(self._ledger.folder)}: {error.strerror}"
            )
            return 2
        finally:
            signal.signal(signal.SIGTERM, before)
        self._summary()
        return SOME_FAILED if self._failed else 0

    def _pieces(self) -> "Iterator[Piece]":
        """The finished pieces, by groups of pieces that can share a batch; in each group as they are finished."""
        from music_ar.decoding.decoder import ring_size

        groups: dict[tuple[Any, ...], list[Task]] = {}
        for task in self._missing:
            settings = task.settings
            groups.setdefault((settings["batch_size"], ring_size(settings["latents"]), settings["mode"]), []).append(
                task
            )
        for (size, *_), tasks in groups.items():
            yield from self._generator.generate_many(self._requests(tasks), batch_size=size, progress=self._report)

    def _requests(self, tasks: Iterable[Task]) -> "Iterator[Request]":
        """Requests for the pieces that nobody else makes or has made; each is claimed when its turn comes."""
        for task in tasks:
            if not self._ledger.claim(task.file):
                self._elsewhere += 1
                continue
            self._claimed.add(task.file)
            self._ledger.read()
            if self._command._is_made(task, self._ledger):  # by another process, since this one looked
                self._others += 1
                self._let_go(task)
            else:
                yield _request(task, self._stdin)

    def _let_go(self, task: Task) -> None:
        self._ledger.release(task.file)
        self._claimed.discard(task.file)

    def _finish(self, piece: "Piece") -> None:
        """Writes a piece and its line."""
        from music_ar import MidiError, write_midi
        from music_ar.metrics.statistics import likeness

        task: Task = piece.request.tag
        line, error = _line(task), piece.error
        buffer = io.BytesIO()
        if error is None:
            try:
                write_midi(piece.performance, buffer)
            except MidiError as refused:  # a piece that ended before its first note
                error = f"what was made cannot be written: {refused}"
        if error is not None:
            line |= {"status": "failed", "error": error}
        else:
            self._ledger.write(task.file, buffer.getvalue())
            score = likeness(piece.continuation, piece.nats_per_token)
            line |= {
                "tokens": piece.tokens,
                "seconds": round(piece.continuation.duration_s, 2),
                "nats_per_token": round(piece.nats_per_token, 6),
                "score": round(score, 4) if math.isfinite(score) else None,
                "status": "made",
                "sha256": sha256(buffer.getvalue()),
            }
            if self._command.audio is not None:
                line["audio"] = self._write_audio(task, piece, self._command.audio)
        self._ledger.add(line)
        self._made += error is None
        self._failed += error is not None
        self._let_go(task)
        if self._command.log == "json":
            self._log("piece", line)
        elif error is not None:
            print(f"{task.prompt or task.file}: {error}", file=sys.stderr)

    def _write_audio(self, task: Task, piece: "Piece", kind: str) -> str:
        name = PurePath(task.file).with_suffix(f".{kind}").as_posix()
        buffer = io.BytesIO()
        title = PurePath(task.file).stem
        comment = f"Music AR, model {self._model['name']}, seed {task.seed}"
        _write_audio(kind)(piece.performance, buffer, format=kind, title=title, comment=comment)
        self._ledger.write(name, buffer.getvalue())
        return name

    def _put_in_order(self) -> None:
        """Sorts the manifest as planned; with --keep-best ranks each complete set and removes what is not kept."""
        lines, changes = self._ledger.lines, {}
        self._ledger.read()
        if self._command.keep_best is not None:
            sets: dict[str, list[Task]] = {}
            for task in self._tasks:
                sets.setdefault(task.set_of, []).append(task)
            for tasks in sets.values():
                if all(task.file in lines for task in tasks):
                    made = [lines[task.file] for task in tasks if lines[task.file]["status"] != "failed"]
                    ranked = sorted(made, key=_score, reverse=True)
                    for place, line in enumerate(ranked):
                        status = "made" if place < self._command.keep_best else "dropped"
                        changes[line["file"]] = {"status": status}
        self._ledger.rewrite([task.file for task in self._tasks], changes)
        for task in self._tasks:
            line = lines.get(task.file)
            if line is not None and line["status"] == "dropped":
                for name in (line["file"], line.get("audio")):
                    if name is not None:
                        (self._ledger.folder / name).unlink(missing_ok=True)

    def _report(self, seconds: float) -> None:
        """Tells how far it is, `seconds` of music later."""
        self._music_s += seconds
        spent_s = time.monotonic() - self._began_s
        pace = self._music_s / max(spent_s, 1e-9)
        left_s = max(self._wanted_s - self._music_s, 0.0) / max(pace, 1e-9)
        done = self._made + self._failed
        if self._command.log == "text":
            text = f"{done} of {len(self._missing)} pieces, {clock(self._music_s)} of music, {pace:.1f} times real time"
            share = self._music_s / max(self._wanted_s, 1e-9)
            self._bar.report(min(share, 1.0), f"{text}, {clock(left_s)} left" if self._music_s else text)
        elif spent_s - self._logged_s >= _LOG_SECONDS:
            self._logged_s = spent_s
            figures = {"pieces": done, "of": len(self._missing), "music_s": self._music_s, "times_real_time": pace}
            self._log(
                "progress", {name: round(value, 2) for name, value in figures.items()} | {"eta_s": round(left_s, 1)}
            )

    def _log(self, event: str, fields: dict[str, Any]) -> None:
        print(json.dumps({"event": event} | fields, ensure_ascii=False), flush=True)

    def _summary(self) -> None:
        spent_s = time.monotonic() - self._began_s
        already = len(self._tasks) - len(self._missing) + self._others
        if self._command.log == "json":
            figures = {
                "made": self._made,
                "failed": self._failed,
                "already_there": already,
                "elsewhere": self._elsewhere,
            }
            self._log("summary", figures | {"music_s": round(self._music_s, 2), "seconds": round(spent_s, 2)})
            return
        pace = f"{clock(self._music_s)} of music in {clock(spent_s)}, {self._music_s / spent_s:.1f} times real time"
        print(f"{self._made} made ({pace}), {self._failed} failed, {already} were there; {self._ledger.folder}")
        if self._elsewhere:
            print(f"{self._elsewhere} are being made by another process")
        if self._failed:
            print(f"what failed is told in {self._ledger.folder / 'manifest.jsonl'}; the same command tries it again")

    def _say_how_to_go_on(self, why: str) -> None:
        print(
            f"music-ar: {why}. {self._made} pieces were finished and stay in {self._ledger.folder}; "
            "the same command makes the rest",
            file=sys.stderr,
        )


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _request(task: Task, stdin: bytes | None) -> "Request":
    """The task as `Generator.generate_many` takes it.

    Raises:
        GenerationError, SamplingError: a setting out of range.
    """
    from music_ar.decoding.sampling import SamplingOptions
    from music_ar.generator import Request

    settings = task.settings
    return Request(
        prompt=stdin if task.prompt == "-" else task.prompt,
        options=SamplingOptions.of(settings),
        seed=task.seed,
        tag=task,
        prompt_seconds=settings["prompt_seconds"] if task.prompt is not None else None,
        **{name: settings[name] for name in ("seconds", "latents", "mode", "continuation_only")},
    )


def _line(task: Task) -> Line:
    """The line of a piece, before it is known what became of it."""
    settings = {name: value for name, value in task.settings.items() if name != "model"}
    return {
        "file": task.file,
        "prompt": task.prompt,
        "prompt_sha256": task.prompt_sha256,
        "seed": task.seed,
        "settings": settings,
        "model": task.settings["model"],
        "tokens": None,
        "seconds": None,
        "nats_per_token": None,
        "score": None,
        "status": "planned",
        "error": None,
        "sha256": None,
    }


def _score(line: Line) -> float:
    return -math.inf if line["score"] is None else line["score"]


def _changes(line: Line, task: Task) -> list[str]:
    """In what a piece that is there was made otherwise than it is asked for now."""
    now = _line(task)

    def flat(of: Line) -> dict[str, Any]:
        return of["settings"] | {name: of[name] for name in ("seed", "prompt_sha256")} | of["model"]

    was, wanted = flat(line), flat(now)
    names = [name for name in (*was, *wanted) if was.get(name) != wanted.get(name)]
    return [f"{name} was {was.get(name)}, is {wanted.get(name)}" for name in dict.fromkeys(names)]


def _estimate_s(generator: "Generator", tasks: list[Task]) -> Iterator[float]:
    """How long each task will take, by the speed of a few chunks and the density of real music."""
    from music_ar.generator import MAESTRO_TOKENS_PER_S

    for task in tasks:
        size = task.settings["batch_size"]
        step_s = generator.seconds_per_token(task.settings["latents"], size, task.settings["mode"])
        rows = min(size, len(tasks))
        yield task.settings["seconds"] * MAESTRO_TOKENS_PER_S * step_s / rows


def _write_audio(kind: str | None) -> Any:
    """`music_ar.audio.write_audio`, if sound is wanted."""
    if kind is None:
        return None
    try:
        from music_ar.audio.synthesis import write_audio
    except ImportError as error:
        raise CommandError(
            f"--audio {kind} needs what is missing here: {error}; leave it out for MIDI alone"
        ) from error
    return write_audio


def _is_file(path: Path) -> bool:
    """Whether it is a file, or a link to one that is missing, which then costs its line; not a folder or a pipe."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _lines_of(path: Path) -> list[str]:
    """The lines of a text file, which may name files by bytes that are no UTF-8."""
    return path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()


def _file_name(name: str) -> str:
    """A name that a file system takes with an ending after it: Unicode, and not too long."""
    path = PurePath(os.fsencode(name).decode(errors="replace"))
    return path.with_name(path.name.encode()[:_LONGEST_NAME].decode(errors="ignore")).as_posix()


def _safe(name: str) -> str:
    """A name that stays inside the output folder."""
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts or not path.name.strip() or "\0" in name:
        raise CommandError(f"a job's name must be a relative path without .., got {name!r}")
    return path.as_posix()
