"""`Objective`: what a training run minimizes."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from music_ar.training.distillation import Params

Batch = dict[str, Array]
Metrics = dict[str, Array]


class Work(NamedTuple):
    """How much a batch has to learn from.

    Attributes:
        targets: number of targets of an example.
        flops_per_target: floating-point operations of a step for each of them; None if they are not counted.
    """

    targets: float
    flops_per_target: float | None


@runtime_checkable
class Objective(Protocol):
    """What a run minimizes."""

    @property
    def sharding(self) -> PartitionSpec:
        """How the arrays that `place` returns are split over the mesh."""
        ...

    def batch_parts(self, shards: int) -> int:
        """Return the number of equal parts that a batch split into `shards` must have."""
        ...

    def check(self, mesh: Mesh) -> None:
        """Raise `TrainingError` if a step cannot run on these devices."""
        ...

    def place(self, mesh: Mesh) -> Params:
        """Copy what the loss needs beside the parameters to the devices of a mesh."""
        ...

    def loss(
        self, graph: nnx.GraphDef[Any], mesh: Mesh, params: nnx.State, constants: Params, batch: Batch, key: Array
    ) -> tuple[Array, Metrics]:
        """Return the loss of a device's share of a batch, and metrics of it, of which "loss" is the main one.

        The batch has "weights"; those of the losses of all shares are their sums.
        """
        ...

    def work(self, batch: dict[str, np.ndarray]) -> Work:
        """Say how much a batch has to learn from."""
        ...
