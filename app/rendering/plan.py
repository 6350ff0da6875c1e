"""The plan of a batch: every piece as a request, in the order asked for.

The same command plans the same pieces, and a piece depends only on its own request. So a stopped run can be resumed and
ends with the same bytes.
"""

import dataclasses
import hashlib
import json
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from app.console import STDIN, CommandError
from app.rendering.manifest import Output, file_sha256
from music_ar.decoding.request import DEFAULT_LATENTS, Request
from music_ar.decoding.sampling import SamplingOptions
from music_ar.generator import Generator
from music_ar.midi.folders import MIDI_EXTENSIONS, find_midi_files

LIST_EXTENSIONS = (".txt", ".list")
_MAX_NAME_BYTES = 200
_NOT_OPTIONS = ("prompt", "speed", "sampling", "tag")
_TYPE_NAMES = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


class Prompt(NamedTuple):
    """A prompt as given, and the name of its pieces."""

    path: str
    name: str


def find_prompts(arguments: Sequence[str]) -> Iterator[Prompt]:
    """List the prompts in folders, files, lists of files and globs; `STDIN` is a prompt, too.

    Raises:
        CommandError: an argument does not name a prompt.
    """
    for argument in arguments:
        path = Path(argument)
        if argument == STDIN:
            yield Prompt(STDIN, "stdin")
        elif path.is_dir():
            found = [each for each in find_midi_files(path) if _is_file(each)]
            if not found:
                raise CommandError(f"{argument}: expected MIDI files ({', '.join(MIDI_EXTENSIONS)}) in it, found none")
            yield from (Prompt(each.as_posix(), each.relative_to(path).with_suffix("").as_posix()) for each in found)
        elif path.is_file() and path.suffix.lower() in LIST_EXTENSIONS:
            lines = [line.strip() for line in _read_lines(path)]
            listed = [path.parent / line for line in lines if line and not line.startswith("#")]
            if not listed:
                raise CommandError(f"{argument}: expected one file name per line, found none")
            yield from (Prompt(each.as_posix(), each.stem) for each in listed)
        elif path.is_file():
            yield Prompt(path.as_posix(), path.stem)
        elif any(letter in argument for letter in "*?["):
            files = Path(path.anchor or ".").glob(argument.removeprefix(path.anchor))
            matching = sorted(each.as_posix() for each in files if _is_file(each))
            if not matching:
                raise CommandError(f"{argument}: no file matches this pattern")
            yield from (Prompt(each, PurePath(each).stem) for each in matching)
        else:
            raise CommandError(f"{argument}: no such file or folder")


def _option_types() -> Iterator[tuple[str, type]]:
    for options in (Request, SamplingOptions):
        for name, annotation in typing.get_type_hints(options).items():
            if name not in _NOT_OPTIONS:
                alternatives = typing.get_args(annotation) or (annotation,)
                yield name, next(kind for kind in (bool, float, int) if kind in alternatives)


OPTION_TYPES = dict(_option_types())
"""Options that may differ from piece to piece, with their types: fields of `Request` and `SamplingOptions`."""
JOB_TYPES = {"prompt": str, "name": str, **OPTION_TYPES}
"""The keys of a job, with their types."""


def read_jobs(path: Path) -> Iterator[dict[str, Any]]:
    """Read a jobs file: one JSON object per line, with any of `JOB_TYPES`. Prompts are relative to the file.

    Raises:
        CommandError: a line is not such an object.
    """
    for number, text in enumerate(_read_lines(path), start=1):
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        try:
            job = json.loads(text)
        except ValueError as error:
            raise CommandError(f"{where}: expected a JSON object, got {text[:60]!r}") from error
        if not isinstance(job, dict) or not job.keys() <= JOB_TYPES.keys():
            raise CommandError(f"{where}: expected an object with any of {', '.join(JOB_TYPES)}, got {text[:60]!r}")
        job = {key: _convert(value, JOB_TYPES[key], f"{where}: {key}") for key, value in job.items()}
        if "prompt" in job:
            job["prompt"] = (path.parent / job["prompt"]).as_posix()
        yield job


def _convert(value: Any, kind: type, where: str) -> Any:
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise CommandError(f"{where} must be {_TYPE_NAMES[kind]}, got {value!r}")
    return kind(value)


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
        stdin: content of the MIDI file that the prompt `STDIN` stands for.

    Attributes:
        generator: as given.
        requests: the requests so far.
    """

    def __init__(
        self,
        generator: Generator,
        model: Mapping[str, Any],
        *,
        defaults: Mapping[str, Any],
        batch_size: int | None = None,
        audio: str | None = None,
        pedal: bool = False,
        keep_best: int | None = None,
        stdin: bytes | None = None,
    ):
        self.generator, self.requests = generator, list[Request]()
        self._model, self._stdin = dict(model), stdin
        self._defaults, self._batch_size = defaults, batch_size
        self._audio, self._pedal, self._keep_best = audio, pedal, keep_best
        self._names: set[str] = set()

    def add(self, prompt: str | None, name: str, **options: Any) -> None:
        """Plan the variations of a prompt.

        Args:
            prompt: MIDI file to continue; None generates pieces from scratch.
            name: name of the pieces; numbered if it is taken.
            options: those of `OPTION_TYPES` that differ from the defaults.

        Raises:
            CommandError, GenerationError, SamplingError: an option is out of range.
        """
        name = self._unique(_file_name(name))
        options = {**self._defaults, **options}
        batch_size = self.generator.batch_size(options["latents"])  # raises if the model cannot take so many latents
        if options["latents"] is None:
            options["latents"] = min(DEFAULT_LATENTS, self.generator.config.most_latents)
        settings = self._settings(options, batch_size)
        source = self._stdin if prompt == STDIN else prompt
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
            )
            self.requests.append(dataclasses.replace(request, tag=output))

    def _settings(self, options: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
        """What the manifest records in addition to prompt, seed and model."""
        settings = {name: value for name, value in options.items() if name not in ("seed", "variations")}
        settings["batch_size"] = self._batch_size or batch_size
        if self._audio is not None:
            settings["audio"] = self._audio
        if self._pedal:
            settings["pedal"] = True
        if self._keep_best is not None:  # which pieces are kept depends on both
            settings |= {"keep_best": self._keep_best, "variations": options["variations"]}
        return settings

    def _unique(self, name: str) -> str:
        """The name, numbered if a prompt from another folder or list has it already."""
        unique, number = name, 1
        while unique.casefold() in self._names:
            number += 1
            unique = f"{name}~{number}"
        self._names.add(unique.casefold())
        return unique


def job_name(job: Mapping[str, Any], number: int) -> str:
    """The name of a job's pieces: the name given, that of the prompt, or the job's number.

    Raises:
        CommandError: the name would lead out of the output folder.
    """
    name = job.get("name") or (PurePath(job["prompt"]).stem if "prompt" in job else f"job-{number:04}")
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts or not path.name.strip() or "\0" in name:
        raise CommandError(f"a job's name must be a relative path without .., got {name!r}")
    return path.as_posix()


def _sha256(source: str | bytes | None) -> str | None:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    return None if source is None else file_sha256(Path(source))


def _is_file(path: Path) -> bool:
    """Whether it is a file or a broken link, which becomes a failed piece, and not a folder or a pipe."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _read_lines(path: Path) -> list[str]:
    """The lines of a text file. The file names in it may not be Unicode."""
    return path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()


def _file_name(name: str) -> str:
    """A name that file systems accept, with room for an extension: Unicode, and not too long."""
    path = PurePath(os.fsencode(name).decode(errors="replace"))
    return path.with_name(path.name.encode()[:_MAX_NAME_BYTES].decode(errors="ignore")).as_posix()
