"""`PieceEncoding`: the objective of a piece encoder, which learns from passages of pieces.

Each passage is seen twice, cropped, transposed and re-timed in different ways, with some notes hidden. Two losses:

- of passages: the embedding of one view must be nearer to that of the other than to those of all other passages of the
  batch (InfoNCE, van den Oord et al., arXiv 1807.03748, in both directions as in CLIP, arXiv 2103.00020). Passages that
  overlap, and other performances of the same composition, are neither near nor far.
- of hidden notes: their pitch, velocity and duration, given their time (masked modeling, as in BERT).

Dimension key, in addition to that of `model.config`: P passages of a piece, X passages of a batch, Q hidden notes,
E dimensions of an embedding.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from music_ar.embedding.encoder import PieceEncoder
from music_ar.embedding.notes import DURATION, ONSET, PITCH, VELOCITY, duration_classes
from music_ar.training import mesh as meshes
from music_ar.training.config import EncoderTrainingConfig, TrainingError
from music_ar.training.distillation import Params
from music_ar.training.objective import Batch, Metrics, Work

_APART = -1e9  # a similarity that counts nothing in a softmax
_ROW, _COLUMN = (slice(None), None), (None, slice(None))


class Whence(NamedTuple):
    """Where passages come from; any leading shape.

    Attributes:
        piece: number of the piece.
        composition: number of the composition; performances of one have the same.
        start: of the passage in the piece, in steps.
        end: of the passage.
    """

    piece: Array
    composition: Array
    start: Array
    end: Array


class PieceEncoding:
    """See the module. A batch is what `data_pipeline.passage_loader` makes.

    Args:
        config: the training options.
    """

    sharding = PartitionSpec()

    def __init__(self, config: EncoderTrainingConfig):
        self._config = config

    def batch_parts(self, shards: int) -> int:
        """See `Objective`."""
        return shards

    def check(self, mesh: Mesh) -> None:
        """See `Objective`."""
        if mesh.shape["sequence"] > 1:
            raise TrainingError(
                "a piece encoder has no context to split over the mesh axis sequence; give its devices to data"
            )

    def place(self, mesh: Mesh) -> Params:
        """See `Objective`: nothing."""
        del mesh
        return []

    def loss(
        self,
        graph: nnx.GraphDef[Any],
        mesh: Mesh,
        params: nnx.State,
        constants: Params,
        batch: Batch,
        key: Array,
    ) -> tuple[Array, Metrics]:
        """See `Objective`."""
        del mesh, constants
        return encoding_loss(nnx.merge(graph, params), self._config, batch, key=key, gather_over=meshes.BATCH)

    def work(self, batch: Mapping[str, np.ndarray]) -> Work:
        """See `Objective`; the targets are the notes that are read."""
        return Work(float(batch["counts"].sum() / len(batch["counts"])), None)


def encoding_loss(
    encoder: PieceEncoder,
    config: EncoderTrainingConfig,
    batch: Batch,
    *,
    key: Array | None = None,
    gather_over: tuple[str, ...] | None = None,
) -> tuple[Array, Metrics]:
    """Return the loss of a batch, and its metrics.

    Args:
        encoder: the model.
        config: dropout, temperature and weights.
        batch: see `data_pipeline.passages`.
        key: draws the dropout; None for none.
        gather_over: mesh axes, inside `jax.shard_map`, over which the passages to tell apart are gathered.
    """
    dropout = nnx.Dropout(config.dropout, deterministic=key is None, rngs=None if key is None else nnx.Rngs(key))
    views = {name: _merge(batch[name], 3) for name in ("notes", "counts", "hidden", "hidden_counts")}
    latents_VxNxD = encoder.read(views["notes"], views["counts"], dropout)
    embedding_XxE, twin_XxE = jnp.moveaxis(encoder.embed(latents_VxNxD).reshape(-1, 2, encoder.config.size), 1, 0)
    whence = Whence(*(_merge(batch[name], 2) for name in Whence._fields))
    contrast, found = contrastive_loss(embedding_XxE, twin_XxE, whence, config.temperature, gather_over)
    hidden, accuracies = hidden_loss(encoder, latents_VxNxD, views)
    loss = contrast + config.hidden_weight * hidden
    return loss, {"loss": loss, "contrastive_loss": contrast, "hidden_loss": hidden, "passage_accuracy": found} | {
        f"{name}_accuracy": accuracy for name, accuracy in accuracies.items()
    }


def contrastive_loss(
    embedding_XxE: Float[Array, "X E"],
    twin_XxE: Float[Array, "X E"],
    whence: Whence,
    temperature: float,
    gather_over: tuple[str, ...] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return InfoNCE between the views of passages, the mean of both directions, in nats; and how often it is right.

    Args:
        embedding_XxE: of unit length, of one view of each passage.
        twin_XxE: of the other view.
        whence: where the passages come from.
        temperature: by which similarities are divided.
        gather_over: see `encoding_loss`.
    """
    everywhere, first = (embedding_XxE, twin_XxE, whence), jnp.zeros((), jnp.int32)
    if gather_over is not None:
        everywhere = jax.tree.map(lambda x: jax.lax.all_gather(x, gather_over, tiled=True), everywhere)
        first = jax.lax.axis_index(gather_over) * len(embedding_XxE)
    all_embeddings, all_twins, all_whence = everywhere
    own_X = first + jnp.arange(len(embedding_XxE))
    is_own_XxX = own_X[:, None] == jnp.arange(len(all_twins))[None]
    skipped_XxX = unclear(whence, all_whence) & ~is_own_XxX
    losses, hits = [], []
    for query_XxE, key_XxE in ((embedding_XxE, all_twins), (twin_XxE, all_embeddings)):
        similarity_XxX = jnp.where(skipped_XxX, _APART, query_XxE @ key_XxE.T / temperature)
        losses.append(optax.softmax_cross_entropy_with_integer_labels(similarity_XxX, own_X).mean())
        hits.append((similarity_XxX.argmax(axis=1) == own_X).mean())
    return (losses[0] + losses[1]) / 2, (hits[0] + hits[1]) / 2


def unclear(one: Whence, other: Whence) -> Bool[Array, "X Y"]:
    """Which passages of `one` are neither near to nor far from those of `other`.

    They overlap in the same piece, or are from two performances of one composition.
    """
    rows, columns = (Whence(*(values[axis] for values in whence)) for whence, axis in ((one, _ROW), (other, _COLUMN)))
    overlap = (rows.start < columns.end) & (columns.start < rows.end)
    same_piece, same_music = rows.piece == columns.piece, rows.composition == columns.composition
    return jnp.where(same_piece, overlap, same_music)


def hidden_loss(
    encoder: PieceEncoder, latents_VxNxD: Float[Array, "V N D"], views: Batch
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the mean cross-entropy of the hidden notes' attributes in nats, and how often each is predicted.

    Each view counts alike, however many of its notes are hidden.
    """
    hidden_VxQx4 = views["hidden"]
    logits = encoder.predict(latents_VxNxD, hidden_VxQx4[..., ONSET], views["notes"], views["counts"])
    targets = {
        "pitch": hidden_VxQx4[..., PITCH],
        "velocity": hidden_VxQx4[..., VELOCITY] - 1,
        "duration": duration_classes(hidden_VxQx4[..., DURATION]),
    }
    is_hidden_VxQ = jnp.arange(hidden_VxQx4.shape[1])[None] < views["hidden_counts"][:, None]
    share_VxQ = is_hidden_VxQ / jnp.maximum(views["hidden_counts"], 1)[:, None] / len(hidden_VxQx4)
    losses = {
        name: (optax.softmax_cross_entropy_with_integer_labels(logits[name], target) * share_VxQ).sum()
        for name, target in targets.items()
    }
    hits = {name: ((logits[name].argmax(axis=-1) == target) * share_VxQ).sum() for name, target in targets.items()}
    return sum(losses.values(), jnp.zeros(())) / len(losses), hits


def _merge(array: Array, axes: int) -> Array:
    """The first axes as one."""
    return array.reshape(-1, *array.shape[axes:])


class PieceValidation:
    """Validates an encoder: the metrics of batches, means over them.

    Args:
        config: the training options.
        batches: of the same shapes.
    """

    def __init__(self, config: EncoderTrainingConfig, batches: list[dict[str, np.ndarray]]):
        self._batches = batches
        self._metrics = jax.jit(lambda graph, params, batch: _metrics(config, graph, params, batch), static_argnums=0)

    def __call__(self, encoder: PieceEncoder) -> dict[str, float]:
        """Return the metrics, with "validation" for the loss and "validation_" before the names of the others."""
        graph, params = nnx.split(encoder, nnx.Param)
        found: list[Any] = [jax.device_get(self._metrics(graph, params, batch)) for batch in self._batches]
        means = {name: float(np.mean([metrics[name] for metrics in found])) for name in found[0]}
        return {"validation": means.pop("loss"), **{f"validation_{name}": mean for name, mean in means.items()}}


def _metrics(
    config: EncoderTrainingConfig, graph: nnx.GraphDef[PieceEncoder], params: nnx.State, batch: Batch
) -> Metrics:
    return encoding_loss(nnx.merge(graph, params), config, batch)[1]
