"""The plan of a batch: every piece as a request, in the order asked for.

The same command plans the same pieces, and a piece depends only on its own request. So a stopped run can be resumed and
ends with the same bytes.
"""

import dataclasses
import hashlib
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from app.console import STDIN, CommandError
from app.rendering.manifest import Output
from app.rendering.names import Names, file_name, job_name
from app.rendering.on_ray import AnyGenerator
from music_ar.decoding.request import DEFAULT_LATENTS, Request
from music_ar.decoding.sampling import SamplingOptions
from music_ar.features.wish_options import WISH_OPTIONS, Wishes
from music_ar.features.wishes import wish_ids
from music_ar.files import parse_json, read_file
from music_ar.midi.folders import MIDI_EXTENSIONS, find_midi_files, is_midi_name
from music_ar.midi.io import MAX_BYTES
from music_ar.ranges import refuse, shown
from music_ar.storage import find_files, is_url, read_path

LIST_EXTENSIONS = (".txt", ".list")
_EXACT = 2**53  # whole numbers up to this are floats, too
_HALF_CHARACTER = re.compile("[\ud800-\udc7f\udd00-\udfff]")
_NO_WISHES = dataclasses.asdict(Wishes())
_NEUTRAL = {"layers": None, "tolerance": 0.0, "budget": None}
"""Options that a manifest records only if they differ from these, so that pieces of earlier versions stay unchanged."""
_NOT_OPTIONS = ("prompt", "after", "speed", "sampling", "wishes", "tag")
_TYPE_NAMES = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


class Prompt(NamedTuple):
    """A prompt as given, the name of its pieces, and whether it comes from standard input."""

    path: str
    name: str
    is_stdin: bool = False


def find_prompts(arguments: Sequence[str]) -> Iterator[Prompt]:
    """List the prompts in folders, files, lists of files and globs; the argument `STDIN` is standard input.

    Files and folders may be addresses, such as `s3://bucket/prompts`.

    Raises:
        CommandError: an argument does not name a prompt.
        OSError, StorageError: an address cannot be read.
    """
    for argument in arguments:
        path = Path(argument)
        if argument == STDIN:
            yield Prompt(STDIN, "stdin", is_stdin=True)
        elif is_url(argument):
            yield from _prompts_at(argument)
        elif path.is_dir():
            found = find_midi_files(path)
            if not found:
                raise CommandError(f"{argument}: expected MIDI files ({', '.join(MIDI_EXTENSIONS)}) in it, found none")
            yield from (Prompt(each.as_posix(), each.relative_to(path).with_suffix("").as_posix()) for each in found)
        elif path.is_file() and path.suffix.lower() in LIST_EXTENSIONS:
            yield from _listed_prompts(path)
        elif path.exists() or path.is_symlink():  # a pipe, a device or a dead link fails on its own
            yield Prompt(path.as_posix(), path.stem)
        elif any(letter in argument for letter in "*?["):
            files = Path(path.anchor or ".").glob(argument.removeprefix(path.anchor))
            matching = sorted(each.as_posix() for each in files if not each.is_dir())
            if not matching:
                raise CommandError(f"{argument}: no file matches this pattern")
            yield from (Prompt(each, PurePath(each).stem) for each in matching)
        else:
            raise CommandError(f"{argument}: no such file or folder")


def _listed_prompts(path: Path) -> Iterator[Prompt]:
    """The prompts that a text file lists, relative to it."""
    lines = [line.strip(" \t\r") for line in _read_lines(path)]
    listed = [line for line in lines if line and not line.startswith("#")]
    if not listed:
        raise CommandError(f"{path}: expected one file name per line, found none")
    found = (line if is_url(line) else (path.parent / line).as_posix() for line in listed)
    yield from (Prompt(each, PurePath(each).stem) for each in found)


def _prompts_at(url: str) -> Iterator[Prompt]:
    """The MIDI file at an address, or the MIDI files below it."""
    if is_midi_name(url):
        yield Prompt(url, PurePath(url).stem)
        return
    found = [name for name in find_files(url) if is_midi_name(name)]
    if not found:
        raise CommandError(f"{url}: expected MIDI files ({', '.join(MIDI_EXTENSIONS)}) there, found none")
    yield from (Prompt(f"{url.rstrip('/')}/{name}", PurePath(name).with_suffix("").as_posix()) for name in found)


def _option_types() -> Iterator[tuple[str, type]]:
    for options in (Request, SamplingOptions, Wishes):
        for name, annotation in typing.get_type_hints(options).items():
            if name not in _NOT_OPTIONS:
                alternatives = typing.get_args(annotation) or (annotation,)
                yield name, next(kind for kind in (bool, float, int, str) if kind in alternatives)


OPTION_TYPES = dict(_option_types())
"""Options that may differ from piece to piece, with their types: fields of `Request`, `SamplingOptions`, `Wishes`."""
JOB_TYPES = {"prompt": str, "name": str, **OPTION_TYPES}
"""The keys of a job, with their types."""


def read_jobs(path: Path) -> Iterator[dict[str, Any]]:
    """Read a jobs file: one JSON object per line, with any of `JOB_TYPES`. Prompts are relative to the file.

    Args:
        path: the file; `STDIN` is standard input, with prompts relative to the current folder.

    Raises:
        CommandError: a line is not such an object.
    """
    lines = _decoded(sys.stdin.buffer.read()) if path == Path(STDIN) else _read_lines(path)
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        try:
            job = parse_json(text)
        except ValueError as error:
            raise CommandError(f"{where}: expected a JSON object, got {shown(text)}") from error
        if not isinstance(job, dict) or not job.keys() <= JOB_TYPES.keys():
            raise CommandError(f"{where}: expected an object with any of {', '.join(JOB_TYPES)}, got {shown(text)}")
        job = {key: _checked(f"{where}: {key}", value, JOB_TYPES[key]) for key, value in job.items()}
        if "prompt" in job:
            given = job["prompt"]
            job["prompt"] = given if is_url(given) else (path.parent / given).as_posix()
        yield job


def _checked(where: str, value: Any, kind: type) -> Any:
    """A job's value, if it is of its key's type; `Request` and `SamplingOptions` check its range."""
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        refuse(where, _TYPE_NAMES[kind], value, CommandError)
    if isinstance(value, str) and _HALF_CHARACTER.search(value):
        refuse(where, "text in whole Unicode characters", value, CommandError)
    is_small = isinstance(value, int) and -_EXACT <= value <= _EXACT
    return float(value) if kind is float and is_small else value


class Plan:
    """Collects requests, each with an `Output` as its tag.

    Args:
        generator: the model to generate with.
        model: the model's identity.
        defaults: the value of each of `OPTION_TYPES` where a piece has none of its own.
        batch_size: pieces generated at once; default: the generator's.
        audio: format of the audio files, if any.
        pedal: whether the MIDI files play the generated notes with the pedal.
        keep_best: number of variations of a prompt to keep; default: all.
        ranks_by_likeness: whether those are the ones most like the prompt.

    Attributes:
        generator: as given.
        requests: the requests so far.
    """

    def __init__(
        self,
        generator: AnyGenerator,
        model: Mapping[str, Any],
        *,
        defaults: Mapping[str, Any],
        batch_size: int | None = None,
        audio: str | None = None,
        pedal: bool = False,
        keep_best: int | None = None,
        ranks_by_likeness: bool = False,
    ):
        self.generator, self.requests = generator, list[Request]()
        self._model = dict(model)
        self._defaults, self._batch_size = defaults, batch_size
        self._audio, self._pedal, self._keep_best = audio, pedal, keep_best
        self._ranks_by_likeness = ranks_by_likeness
        self._names = Names()

    def add_job(self, job: Mapping[str, Any], number: int) -> None:
        """Plan a job, as `read_jobs` yields it. If its name is not possible, its pieces have numbers and fail.

        Raises:
            CommandError, GenerationError, SamplingError, WishError: an option is out of range.
        """
        options = {key: value for key, value in job.items() if key not in ("prompt", "name")}
        try:
            name, error = job_name(job, number), None
        except CommandError as refused:
            name, error = f"job-{number:04}", str(refused)
        self.add(job.get("prompt"), name, error=error, **options)

    def add(
        self, prompt: str | None, name: str, *, data: bytes | None = None, error: str | None = None, **options: Any
    ) -> None:
        """Plan the variations of a prompt.

        Args:
            prompt: MIDI file to continue; None generates pieces from scratch.
            name: name of the pieces; numbered if it is taken.
            data: the prompt's content, if it is not a file.
            error: why the pieces cannot be generated, if that is known already.
            options: those of `OPTION_TYPES` that differ from the defaults.

        Raises:
            CommandError, GenerationError, SamplingError, WishError: an option is out of range.
        """
        try:
            name = file_name(name)
        except CommandError as refused:
            name, error = f"piece-{len(self.requests) + 1:04}", str(refused)
        name = self._names.unique(name)
        options = {**self._defaults, **self._instead(options), **options}
        wishes = Wishes(**{name: options[name] for name in WISH_OPTIONS})
        wish_ids(self.generator.config.wishes, wishes)  # raises if the model cannot take them
        if any(options[name] != neutral for name, neutral in _NEUTRAL.items()):
            asked = Request.of(None, **{name: options[name] for name in ("latents", *_NEUTRAL)})
            options |= {**self.generator.setting(asked)._asdict(), "budget": None}  # raises if the model cannot
        batch_size = self.generator.batch_size(options["latents"])  # raises if the model cannot take so many latents
        batch_size = max(1, batch_size // Request(wishes=wishes, choices=options["choices"]).rows)
        if options["latents"] is None:
            options["latents"] = min(DEFAULT_LATENTS, self.generator.config.most_latents)
        settings = self._settings(options, batch_size, has_prompt=prompt is not None)
        source = prompt if data is None else data
        digest = _sha256(source)
        if prompt is None:
            options["prompt_seconds"] = None
        for number, request in enumerate(Request.of(source, **options).samples(), start=1):
            output = Output(
                file=f"{name}-v{number}.mid",
                prompt=prompt,
                prompt_sha256=digest,
                settings=settings,
                model=self._model,
                group=name,
                error=error,
            )
            self.requests.append(dataclasses.replace(request, tag=output))

    @staticmethod
    def _instead(options: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults that a piece's own budget replaces, or that replace a budget."""
        in_place = {"latents": None, "layers": None, "tolerance": 0.0}
        if "budget" in options:
            return in_place
        return {"budget": None} if options.keys() & in_place.keys() else {}

    def _settings(self, options: Mapping[str, Any], batch_size: int, *, has_prompt: bool) -> dict[str, Any]:
        """What the manifest records in addition to prompt, seed and model."""
        neutral = _NEUTRAL | _NO_WISHES | {"choices": 1}
        settings = {
            name: value
            for name, value in options.items()
            if name not in ("seed", "variations") and (name not in neutral or value != neutral[name])
        }
        settings["batch_size"] = self._batch_size or batch_size
        if self._audio is not None:
            settings["audio"] = self._audio
        if self._pedal:
            settings["pedal"] = True
        if self._keep_best is not None:  # which pieces are kept depends on both
            settings |= {"keep_best": self._keep_best, "variations": options["variations"]}
            if self._ranks_by_likeness and has_prompt:
                settings["ranked_by"] = "likeness"
        return settings


def load_prompt(request: Request) -> Request:
    """The request with the bytes of its prompt, and their hash in its tag.

    The file is read once, so that the hash is that of the music that was continued, whatever happens to the file.

    Raises:
        OSError: the prompt cannot be read, is no file, or is too large to be one.
    """
    if not isinstance(request.prompt, str):
        return request
    data = read_path(request.prompt, max_bytes=MAX_BYTES)
    output = dataclasses.replace(request.tag, prompt_sha256=_sha256(data))
    return dataclasses.replace(request, prompt=data, tag=output)


def _sha256(source: str | bytes | None) -> str | None:
    """The hash of a prompt's bytes; None if there is none or it cannot be read."""
    if isinstance(source, str):
        try:
            source = read_path(source, max_bytes=MAX_BYTES)
        except OSError:
            return None
    return None if source is None else hashlib.sha256(source).hexdigest()


def _read_lines(path: Path) -> list[str]:
    """The lines of a text file, which end with a line feed and nothing else. File names may not be Unicode."""
    return _decoded(read_file(path))


def _decoded(data: bytes) -> list[str]:
    return data.decode("utf-8-sig", errors="surrogateescape").split("\n")
