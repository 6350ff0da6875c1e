"""Teachers for distillation (Hinton et al., arXiv 1503.02531): an ensemble, or cross-fitted models.

Pass either to `Trainer`, which places the parameters on the devices; the training step calls `predict`.
"""

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.training.config import TrainingError
from music_ar.training.mesh import BATCH, batch_shards

Params = list[nnx.State]


class Ensemble:
    """Teachers whose mean prediction is the target of every example.

    Raises:
        TrainingError: there are no teachers.
    """

    sharding = PartitionSpec()

    def __init__(self, models: Sequence[PerceiverAR]):
        if not models:
            raise TrainingError("distillation needs at least one teacher")
        split = [nnx.split(model, nnx.Param) for model in models]
        self._graphs, self._params = [graph for graph, _ in split], [params for _, params in split]

    def batch_parts(self, shards: int) -> int:
        """Return the number of equal parts that a batch must have: one per shard."""
        return shards

    def place(self, mesh: Mesh) -> Params:
        """Copy the parameters to each device of a mesh."""
        return jax.device_put(self._params, NamedSharding(mesh, self.sharding))

    def predict(
        self, params: Params, batch: dict[str, Array], vocabulary_size: int, **window: Any
    ) -> Float[Array, "B N V"]:
        """Return the mean of the teachers' probabilities of the targets.

        Where an example has tokens that a teacher does not know, it says for certain what comes: the targets.

        Args:
            params: a device's share of what `place` returns.
            batch: a device's share of a batch; see `trainer.Batches`.
            vocabulary_size: V, the student's.
            **window: latents, kept_prefix, key and split_over of `PerceiverAR.at_depths`, the same as for the student.
        """
        models = [nnx.merge(graph, state) for graph, state in zip(self._graphs, params, strict=True)]
        return jnp.stack([_probabilities(model, batch, vocabulary_size, **window) for model in models]).mean(axis=0)


class CrossFitted:
    """Teachers that each predict only the part of the data that they were not trained on.

    With K teachers, a batch consists of K equal parts, and teacher k predicts part k (out-of-fold predictions).

    Raises:
        TrainingError: there are no teachers, or they differ in their configuration.
    """

    sharding = PartitionSpec(BATCH)

    def __init__(self, models: Sequence[PerceiverAR]):
        designs = {(model.config, model.compute) for model in models}
        if len(designs) != 1:
            raise TrainingError(
                f"cross-fitted teachers must all have the same configuration, got {len(models)} teachers with "
                f"{len(designs)} configurations: {designs}"
            )
        split = [nnx.split(model, nnx.Param) for model in models]
        self._graph, self._params = split[0][0], [params for _, params in split]

    def batch_parts(self, shards: int) -> int:
        """Return the number of equal parts that a batch must have: each belongs to one teacher and one shard."""
        return math.lcm(len(self._params), shards)

    def place(self, mesh: Mesh) -> Params:
        """Stack the parameters along a new first axis and split them over the devices of a mesh.

        Each device then has the teachers for its part of the batch. If the teachers cannot be split evenly, each is
        repeated, and its copies predict smaller parts.
        """
        copies = self.batch_parts(batch_shards(mesh)) // len(self._params)
        stacked = jax.tree.map(lambda *arrays: jnp.repeat(jnp.stack(arrays), copies, axis=0), *self._params)
        return jax.device_put([stacked], NamedSharding(mesh, self.sharding))

    def predict(
        self, params: Params, batch: dict[str, Array], vocabulary_size: int, **window: Any
    ) -> Float[Array, "B N V"]:
        """Return each teacher's probabilities for its own part of a device's batch; arguments as in `Ensemble`."""
        (stacked,) = params
        count = jax.tree.leaves(stacked)[0].shape[0]
        parts = {name: jnp.split(array, count) for name, array in batch.items()}
        predictions = []
        for number in range(count):
            model = nnx.merge(self._graph, jax.tree.map(itemgetter(number), stacked))
            part = {name: arrays[number] for name, arrays in parts.items()}
            predictions.append(_probabilities(model, part, vocabulary_size, **window))
        return jnp.concatenate(predictions)


Teachers = Ensemble | CrossFitted


def _probabilities(model: PerceiverAR, batch: dict[str, Array], vocabulary_size: int, **window: Any) -> Array:
    """Return a teacher's probabilities; it reads only the last of the student's inputs if its own window is shorter."""
    tokens, unknown = batch["tokens"], vocabulary_size - model.config.vocabulary_size
    known = tokens < model.config.vocabulary_size
    inputs = jnp.where(known, tokens, model.config.pad)[:, :-1][:, -model.config.window :]
    probabilities = jax.nn.softmax(model(inputs, **label_argument(model, batch), **window))
    if not unknown:
        return probabilities
    targets = jax.nn.one_hot(tokens[:, -probabilities.shape[1] :], vocabulary_size)
    padded = jnp.pad(probabilities, ((0, 0), (0, 0), (0, unknown)))
    return jnp.where(known.all(axis=1)[:, None, None], padded, targets)


def label_argument(model: PerceiverAR, batch: dict[str, Array]) -> dict[str, Array]:
    """Return the augmentation labels and the wishes of a batch as keyword arguments for a model, if it takes them."""
    labels = {"labels_BxC": batch["labels"]} if model.config.label_size else {}
    return labels | ({"wishes_BxPxW": batch["wishes"]} if model.config.wishes and "wishes" in batch else {})
