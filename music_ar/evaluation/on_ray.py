"""Scoring on a Ray cluster: a model on each device, which scores batches of windows.

The windows are cut and put into batches where the scoring was started, so that each batch, and its result, is what one
machine would compute.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float

from music_ar.cluster import Cluster, ClusterError
from music_ar.evaluation.likelihood import WindowBatch, WindowScorer
from music_ar.model.config import ModelConfig
from music_ar.model.weights import Weights
from music_ar.system import keep_compiled_programs


class RayModel:
    """A model for `score` and `score_tokens`. As a context manager, ends the workers on exit.

    Args:
        cluster: the cluster.
        weights: the model, which is sent to the nodes.

    Attributes:
        config: sizes of the model.

    Raises:
        ClusterError: the cluster cannot be used.
    """

    def __init__(self, cluster: Cluster, weights: Weights):
        self.config: ModelConfig = weights.config
        self._workers = cluster.workers(ScorerOnWorker, weights, on_each="device")

    def __enter__(self) -> "RayModel":
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.__exit__()

    def map(self, batches: Iterable[WindowBatch]) -> Iterator[tuple[WindowBatch, Float[np.ndarray, "C B S"]]]:
        """Each batch with its result, in the order in which they are finished.

        Raises:
            ClusterError: a batch cannot be scored, or no worker is left.
        """
        for batch, nll, error in self._workers.map(batches):
            if error is not None:
                raise ClusterError(f"a batch of {len(batch.windows)} windows: {error}; use a smaller --batch-size")
            yield batch, nll


class ScorerOnWorker:
    """The model of a worker."""

    def __init__(self, weights: Weights):
        keep_compiled_programs()
        from music_ar.decoding import backend
        from music_ar.model.pretrained import model_of

        self._score = WindowScorer(model_of(weights, compute=backend.select().compute))

    def __call__(self, batch: WindowBatch) -> Float[np.ndarray, "C B S"]:
        """The NLL of the last targets of each window, at each temperature."""
        return np.asarray(self._score(batch))
