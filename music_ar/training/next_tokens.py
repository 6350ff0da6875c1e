"""`NextTokens`: the objective of Perceiver AR."""

from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from music_ar.model.config import Compute, ModelConfig
from music_ar.training.config import TrainingConfig, TrainingError
from music_ar.training.distillation import Params, Teachers
from music_ar.training.memory import check_memory
from music_ar.training.mesh import split_axis
from music_ar.training.objective import Batch, Metrics, Work
from music_ar.training.step import student_loss


class NextTokens:
    """Perceiver AR's: predict the tokens of the latents, those of teachers too; see `student_loss`.

    Args:
        model: its sizes.
        compute: how it computes.
        config: the training options.
        teachers: models to distill into it; see `distillation` and `config.distillation_weight`.
    """

    def __init__(self, model: ModelConfig, compute: Compute, config: TrainingConfig, teachers: Teachers | None = None):
        self._model, self._compute, self._config, self._teachers = model, compute, config, teachers

    @property
    def sharding(self) -> PartitionSpec:
        """See `Objective`."""
        return PartitionSpec() if self._teachers is None else self._teachers.sharding

    def batch_parts(self, shards: int) -> int:
        """See `Objective`."""
        return shards if self._teachers is None else self._teachers.batch_parts(shards)

    def check(self, mesh: Mesh) -> None:
        """See `Objective`."""
        _check_prefix(self._model, self._config, mesh)
        check_memory(self._model, self._compute, self._config, mesh)

    def place(self, mesh: Mesh) -> Params:
        """See `Objective`."""
        return [] if self._teachers is None else self._teachers.place(mesh)

    def loss(
        self, graph: nnx.GraphDef[Any], mesh: Mesh, params: nnx.State, constants: Params, batch: Batch, key: Array
    ) -> tuple[Array, Metrics]:
        """See `Objective`."""
        return student_loss(
            graph, self._config, self._teachers, params, constants, batch, key, split_over=split_axis(mesh)
        )

    def work(self, batch: dict[str, np.ndarray]) -> Work:
        """See `Objective`."""
        inputs, latents = batch["tokens"].shape[1] - 1, batch["weights"].shape[1]
        prefix = self._model.attended(inputs) - latents
        return Work(latents, self._model.flops_per_target(round(prefix * self._config.prefix_keep)))


def _check_prefix(model: ModelConfig, config: TrainingConfig, mesh: Mesh) -> None:
    """Raise TrainingError if the prefix is to be split over devices, and there is none or a tape is read from it."""
    if split_axis(mesh) and model.tape is not None:
        raise TrainingError("a tape is read from the whole context, which the mesh axis sequence splits: leave it out")
    kept = round((model.attended(model.window) - model.latents) * config.prefix_keep)
    if split_axis(mesh) and (model.segment or kept == 0):
        raise TrainingError(
            "the mesh axis sequence splits the part of the context before the latents, and nothing is kept of it with "
            f"a context of {model.context:,}, {model.latents:,} latents and prefix_keep = {config.prefix_keep}: leave "
            "the axis out"
        )
