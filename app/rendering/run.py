"""One run of a plan: generate what is missing, write it, and rank the variations."""

import errno
import io
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePath

from app.console import SOME_FAILED
from app.rendering.leases import Leases
from app.rendering.log import Log, Tally
from app.rendering.manifest import Line, Manifest, planned_line
from app.rendering.on_ray import AnyGenerator
from app.rendering.plan import load_prompt
from music_ar.cluster import ClusterError
from music_ar.decoding.request import Request
from music_ar.generator import Piece
from music_ar.metrics.statistics import plausibility
from music_ar.midi import MidiError, write_midi
from music_ar.midi.performance import Performance

_ERRORS_OF_A_NAME = (errno.ENAMETOOLONG, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.EILSEQ)
"""What only the name of a piece is to blame for: it is too long, or a folder is where its file should be."""

WriteAudio = Callable[..., None]


class Run:
    """Generates the missing pieces of a plan into a folder that other processes may share.

    Args:
        generator: the model, on this machine or on a cluster.
        manifest: of the output folder.
        leases: of this process, in that folder.
        plan: all requests.
        missing: those to generate.
        write_audio: `music_ar.audio.write_audio`, if the settings of the plan have an audio format.
        keep_best: how many variations of a prompt to keep; None keeps all.
        alike: how alike a prompt and its continuation are, which ranks them in place of `plausibility`; None for one
            with too few notes.
        fail_fast: stop at the first failure.
    """

    def __init__(
        self,
        generator: AnyGenerator,
        manifest: Manifest,
        leases: Leases,
        plan: Sequence[Request],
        missing: Sequence[Request],
        *,
        write_audio: WriteAudio | None = None,
        keep_best: int | None = None,
        alike: Callable[[Performance, Performance], float | None] | None = None,
        fail_fast: bool = False,
    ):
        self._generator, self._manifest, self._leases = generator, manifest, leases
        self._plan, self._missing = plan, missing
        self._write_audio, self._keep_best, self._alike, self._fail_fast = write_audio, keep_best, alike, fail_fast
        self._tally = Tally(
            folder=manifest.folder,
            pieces=len(missing),
            wanted_s=sum(request.seconds for request in missing),
            complete=len(plan) - len(missing),
        )

    def run(self, log: Log) -> int:
        """Generate the missing pieces and log them; return the exit code."""
        try:
            for piece in self._pieces(log):
                log.piece(self._finish(piece))
                log.progress(self._tally)
                if self._is_over():
                    break
            self._rank()
        except KeyboardInterrupt:
            self._print_stopped("interrupted")
            return 130
        except OSError as error:
            self._print_stopped(f"cannot write {error.filename or f'in {self._manifest.folder}'}: {error.strerror}")
            return 2
        except ClusterError as error:
            self._print_stopped(str(error))
            return 2
        log.summary(self._tally)
        return SOME_FAILED if self._tally.failed else 0

    def _pieces(self, log: Log) -> Iterator[Piece]:
        """Yield pieces in the order in which they are finished; those with the same batch size share a batch."""

        def progress(seconds: float) -> None:
            self._tally.music_s += seconds
            log.progress(self._tally)

        def batch_size(request: Request) -> int:
            return request.tag.settings["batch_size"]

        def depth(request: Request) -> tuple[int, bool]:
            return request.layers or 0, request.tolerance > 0

        # Sorted by depth and latents, because equal depths and similar numbers of latents share a batch.
        ordered = sorted(self._missing, key=lambda request: (batch_size(request), depth(request), request.latents))
        for size, requests in itertools.groupby(ordered, key=batch_size):
            leased = self._leased(requests, log)
            yield from self._generator.generate_many(leased, batch_size=size, progress=progress)

    def _is_over(self) -> bool:
        return self._fail_fast and self._tally.failed > 0

    def _leased(self, requests: Iterable[Request], log: Log) -> Iterator[Request]:
        """Lease each request when its turn comes; skip what another process is generating or has generated."""
        for request in requests:
            if self._is_over():
                return
            if not self._leases.acquire(request.tag.file):
                self._tally.elsewhere += 1
                continue
            self._manifest.read()
            if self._manifest.is_complete(request):
                self._tally.complete += 1
                self._leases.release(request.tag.file)
            elif (loaded := self._loaded(request, log)) is not None:
                yield loaded

    def _loaded(self, request: Request, log: Log) -> Request | None:
        """The request with its prompt's bytes; None if it has failed, which its line then says."""
        error = request.tag.error
        if error is None:
            try:
                return load_prompt(request)
            except OSError as unreadable:
                error = f"the prompt cannot be read: {unreadable.strerror}"
        log.piece(self._add_line(request, {"status": "failed", "error": error}))
        return None

    def _finish(self, piece: Piece) -> Line:
        """Write a piece and its manifest line; return the line."""
        error, buffer = piece.error, io.BytesIO()
        try:
            if error is None:
                write_midi(piece.performance, buffer, pedal=piece.request.tag.settings.get("pedal", False))
                return self._add_line(piece.request, self._write(piece, buffer.getvalue()))
        except MidiError as refused:  # the piece ended before its first note
            error = f"the generated piece cannot be written: {refused}"
        except OSError as refused:
            if refused.errno not in _ERRORS_OF_A_NAME:  # a full disk, for example: no other piece could be written
                raise
            error = f"{refused.filename} cannot be written: {refused.strerror}"
        return self._add_line(piece.request, {"status": "failed", "error": error})

    def _add_line(self, request: Request, fields: Line) -> Line:
        """Add the line of a piece that is finished or has failed, and release it; return the line."""
        line = planned_line(request) | fields
        self._manifest.add(line)
        self._leases.release(line["file"])
        if line["error"] is None:
            self._tally.generated += 1
        else:
            self._tally.failed += 1
        return line

    def _write(self, piece: Piece, midi: bytes) -> Line:
        """Write the files of a piece; return what its line says about them."""
        file = piece.request.tag.file
        score = self._score(piece)
        line = {
            "tokens": piece.tokens,
            "seconds": round(piece.continuation.duration_s, 2),
            "nats_per_token": round(piece.nats_per_token, 6),
            "score": round(score, 4) if math.isfinite(score) else None,
            "status": "made",
            "sha256": self._manifest.write(file, midi),
        }
        if self._write_audio is not None:
            line["audio"] = self._write_sound(piece, self._write_audio)
        return line

    def _score(self, piece: Piece) -> float:
        """What ranks a piece among the variations of its prompt."""
        prompt = None if self._alike is None else piece.request.read().prompt
        if self._alike is not None and isinstance(prompt, Performance):
            played = prompt if piece.request.prompt_seconds is None else prompt.crop(0, piece.request.prompt_seconds)
            alike = self._alike(played, piece.continuation)
            if alike is not None:
                return alike
        return plausibility(piece.continuation, piece.nats_per_token)

    def _write_sound(self, piece: Piece, write_audio: WriteAudio) -> str:
        output, buffer = piece.request.tag, io.BytesIO()
        path = PurePath(output.file)
        write_audio(
            piece.performance,
            buffer,
            format=output.settings["audio"],
            title=path.stem,
            comment=f"Music AR, model {output.model['name']}, seed {piece.request.seed}",
        )
        name = path.with_suffix(f".{output.settings['audio']}").as_posix()
        self._manifest.write(name, buffer.getvalue())
        return name

    def _rank(self) -> None:
        """Sort the manifest as planned; with `keep_best`, keep only the best variations of each complete group."""
        self._manifest.read()
        lines = self._manifest.lines
        changes = {} if self._keep_best is None else _kept_and_dropped(self._plan, lines, self._keep_best)
        self._manifest.rewrite([request.tag.file for request in self._plan], changes)
        for request in self._plan:
            line = lines.get(request.tag.file)
            if line is not None and line["status"] == "dropped":
                for name in (line["file"], line.get("audio")):
                    if name is not None:
                        self._manifest.folder.remove(name)

    def _print_stopped(self, why: str) -> None:
        print(
            f"music-ar: {why}. {self._tally.generated} pieces are finished and stay in {self._manifest.folder}; "
            "run the same command to continue",
            file=sys.stderr,
        )


def _kept_and_dropped(plan: Sequence[Request], lines: dict[str, Line], keep_best: int) -> dict[str, Line]:
    """The new status of each generated piece of a complete group, by file."""
    changes: dict[str, Line] = {}
    for _, group in itertools.groupby(plan, key=lambda request: request.tag.group):
        files = [request.tag.file for request in group]
        if all(file in lines for file in files):
            finished = [lines[file] for file in files if lines[file]["status"] != "failed"]
            for place, line in enumerate(sorted(finished, key=_score, reverse=True)):
                changes[line["file"]] = {"status": "made" if place < keep_best else "dropped"}
    return changes


def _score(line: Line) -> float:
    return -math.inf if line["score"] is None else line["score"]
