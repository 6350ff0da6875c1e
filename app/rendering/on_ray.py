"""Batch rendering on a Ray cluster: a `Generator` whose decoders are on the workers.

The plan, the leases, the manifest and the files stay with the process that was started, so that a folder is the same
whoever generates. A worker keeps the batch of its decoder full, and sends each piece as soon as it is finished.
"""

import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import NamedTuple, Self

from music_ar.cluster import Cluster
from music_ar.decoding import backend
from music_ar.decoding.budget import Setting
from music_ar.decoding.interface import check_generates
from music_ar.decoding.loading import decoder_of
from music_ar.decoding.request import Request
from music_ar.generator import Generator, Piece
from music_ar.midi.performance import Performance
from music_ar.model.config import ModelConfig
from music_ar.model.weights import Weights
from music_ar.system import keep_compiled_programs

_PATIENCE_S = 0.5  # how long a batch with a free row waits for a request that is on its way


class Sizes(NamedTuple):
    """What the time of a step depends on: a setting of the budget, and the rows of a batch."""

    setting: Setting
    rows: int


class Model(NamedTuple):
    """What is sent to the nodes: a model, and the text of its `curve.json`, empty if it has none."""

    weights: Weights
    curve: str


class Job(NamedTuple):
    """A request, and the size of the batch to generate it in."""

    request: Request
    batch_size: int


class RayGenerator:
    """What a plan and its run need of a `Generator`, on a cluster. As a context manager, ends the workers on exit.

    Args:
        cluster: the cluster.
        weights: the model, which is sent to the nodes.
        curve: text of its `curve.json`, empty if it has none.

    Attributes:
        config: sizes of the model.

    Raises:
        ClusterError: the cluster cannot be used.
        GenerationError: the model does not generate.
    """

    def __init__(self, cluster: Cluster, weights: Weights, curve: str = ""):
        check_generates(weights.config)
        self.config: ModelConfig = weights.config
        self._workers = cluster.workers(RowsOnWorker, Model(weights, curve), on_each="device")
        self._batch_sizes: dict[int | None, int] = {}
        self._settings: dict[Request, Setting] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.__exit__()

    @property
    def autotuner(self) -> "RayGenerator":
        """This object: it times the workers' decoders."""
        return self

    def setting(self, request: Request) -> Setting:
        """The latents, layers and tolerance that a request asks for; errors as in `Generator.setting`."""
        names = ("latents", "layers", "tolerance", "budget", "speed")
        asked = Request(**{name: getattr(request, name) for name in names})
        if asked not in self._settings:
            self._settings[asked] = self._workers.ask("setting", asked)
        return self._settings[asked]

    def seconds_per_token(self, latents: int, rows: int, *, layers: int, tolerance: float) -> float:
        """Seconds of a step of a batch, divided by the number of workers."""
        sizes = Sizes(Setting(latents, layers, tolerance), rows)
        return self._workers.ask("seconds_per_token", sizes) / len(self._workers)

    def batch_size(self, latents: int | None = None) -> int:
        """Default number of pieces that a worker generates at once.

        Raises:
            GenerationError: the model cannot take so many latents.
        """
        if latents not in self._batch_sizes:
            self._batch_sizes[latents] = self._workers.ask("batch_size", latents)
        return self._batch_sizes[latents]

    def generate_many(
        self, requests: Iterable[Request], *, batch_size: int, progress: Callable[[float], None]
    ) -> Iterator[Piece]:
        """Generate pieces as `Generator.generate_many` does, and yield them in the order in which they are finished.

        Args:
            requests: with seeds and latents, and `Output`s as tags. They are taken as workers have room.
            batch_size: rows of each worker's batch.
            progress: called with the seconds of each finished piece.
        """
        jobs = (Job(request, batch_size) for request in requests)
        # A few more than there are rows, so that no row waits while a request travels.
        for job, piece, error in self._workers.map(jobs, method="generate", at_once=batch_size + 2 + batch_size // 8):
            piece = piece if error is None else _failed(job.request, error)
            progress(piece.continuation.duration_s)
            yield piece


class RowsOnWorker:
    """The decoder of a worker, and a thread that keeps its batch full."""

    def __init__(self, model: Model):
        keep_compiled_programs()
        backend.prepare(many_rows=True)
        self._generator = Generator(decoder_of(model.weights), curve=lambda: model.curve)
        self._waiting: queue.SimpleQueue[tuple[Job, Future[Piece]]] = queue.SimpleQueue()
        self._next: tuple[Job, Future[Piece]] | None = None
        self._running: dict[str, Future[Piece]] = {}
        threading.Thread(target=self._run, daemon=True).start()

    def batch_size(self, latents: int | None) -> int:
        """As `Generator.batch_size`."""
        return self._generator.batch_size(latents)

    def setting(self, request: Request) -> Setting:
        """As `Generator.setting`."""
        return self._generator.setting(request)

    def seconds_per_token(self, sizes: Sizes) -> float:
        """As `Autotuner.seconds_per_token`."""
        latents, layers, tolerance = sizes.setting
        return self._generator.autotuner.seconds_per_token(latents, sizes.rows, layers=layers, tolerance=tolerance)

    def generate(self, job: Job) -> "Future[Piece]":
        """Put a request into the batch as soon as a row is free."""
        future: Future[Piece] = Future()
        self._waiting.put((job, future))
        return future

    def _run(self) -> None:
        while True:
            if self._next is None:
                self._next = self._waiting.get()
            size = self._next[0].batch_size
            try:
                for piece in self._generator.generate_many(self._requests(size), batch_size=size):
                    self._running.pop(piece.request.tag.file).set_result(piece)
            except Exception as error:  # none of the batch can be finished
                for future in self._running.values():
                    future.set_exception(error)
                self._running.clear()

    def _requests(self, size: int) -> Iterator[Request]:
        """Requests for a batch of this size, as long as such requests come."""
        while self._next is not None and self._next[0].batch_size == size:
            job, future = self._next
            self._running[job.request.tag.file] = future
            self._next = None
            yield job.request
            try:
                self._next = self._waiting.get(timeout=_PATIENCE_S)
            except queue.Empty:
                return


AnyGenerator = Generator | RayGenerator


def _failed(request: Request, error: str) -> Piece:
    nothing = Performance.empty()
    return Piece(
        request=request, performance=nothing, continuation=nothing, tokens=0, nats_per_token=math.nan, error=error
    )
