"""One compiled training step."""

import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.training.config import TrainingConfig
from music_ar.training.losses import token_loss


class TrainState(NamedTuple):
    """Everything a step changes: one pytree, donated to each step."""

    step: Int[Array, ""]
    params: nnx.State
    ema: nnx.State
    optimizer: optax.OptState


def make_train_step(
    graph: nnx.GraphDef[PerceiverAR],
    config: TrainingConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    teacher_graphs: Sequence[nnx.GraphDef[PerceiverAR]] = (),
    *,
    out_of_fold: bool = False,
) -> Callable[[TrainState, dict[str, Array], Array, list[nnx.State]], tuple[TrainState, dict[str, Array]]]:
    """The compiled training step: (state, batch, rate, teachers) -> (state, {"loss", "gradient_norm"}).

    `state` is donated and replicated over `mesh`; the batch is split over its axis "data": each device computes the
    gradient of its own windows, with dropout of its own, and they add them up. `rate` is a float32 scalar that scales
    the peak learning rates; teachers are the parameters of `teacher_graphs`, which read the last of the same inputs, as
    many as their own windows hold, without dropout, and of the prefix as many as the model does.
    `out_of_fold`: each teacher teaches its own part of the batch alone, in order, in place of their mean for all. The
    graphs are one graph then, and the parameters come as `stacked_teachers`.
    """

    def seen(model: PerceiverAR, part: dict[str, Array]) -> dict[str, Array]:
        """What a model is told of how the windows of a part were made."""
        return {"view_BxC": part["view"]} if model.config.view_size else {}

    def taught(teachers: list[nnx.State], part: dict[str, Array], **window: Any) -> Array | None:
        """The mean of the teachers' predictions, or of each its own part."""
        if not teacher_graphs:
            return None
        if out_of_fold:
            (stacked,) = teachers
            count = jax.tree.leaves(stacked)[0].shape[0]
            models = [
                nnx.merge(teacher_graphs[0], jax.tree.map(itemgetter(number), stacked)) for number in range(count)
            ]
        else:
            models = [nnx.merge(*teacher) for teacher in zip(teacher_graphs, teachers, strict=True)]
        count = len(models) if out_of_fold else 1
        pieces = {name: jnp.split(array, count) for name, array in part.items()}
        cut = [{name: of[number] for name, of in pieces.items()} for number in range(count)]
        chances = [
            jax.nn.softmax(model(own["tokens"][:, :-1][:, -model.config.window :], **seen(model, own), **window))
            for model, own in zip(models, cut if out_of_fold else cut * len(models), strict=True)
        ]
        return jax.lax.stop_gradient(jnp.concatenate(chances) if out_of_fold else jnp.stack(chances).mean(axis=0))

    def loss_of(
        params: nnx.State, teachers: list[nnx.State], part: dict[str, Array], key: Array
    ) -> tuple[Array, Array]:
        model = nnx.merge(graph, params)
        tokens, weights = part["tokens"], part["weights"]
        N, M = weights.shape[1], model.config.read(tokens.shape[1] - 1)
        window = {"latents": N, "kept_prefix": round((M - N) * config.prefix_keep), "key": key}
        return token_loss(
            model(
                tokens[:, :-1],
                dropout=config.dropout,
                input_dropout=config.input_dropout,
                **seen(model, part),
                **window,
            ),
            tokens[:, -N:],
            weights,
            config.z_loss,
            taught_BxNxV=taught(teachers, part, **window),
            distillation=config.distillation,
        )

    def gradients(
        params: nnx.State, teachers: list[nnx.State], batch: dict[str, Array], key: Array
    ) -> tuple[Array, nnx.State]:
        """On a device with its share of the batch and its teachers: the mean loss and gradient of the whole batch."""
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        gradient_of = jax.value_and_grad(loss_of, has_aux=True)

        def weighted(index: Array | int, part: dict[str, Array]) -> Any:
            """The weight of a part, and its loss and gradient times that."""
            (_, nats), grads = gradient_of(params, teachers, part, jax.random.fold_in(key, index))
            return jax.tree.map(lambda x: x * part["weights"].sum(), (jnp.ones(()), nats, grads))

        if config.accumulation == 1:
            sums = weighted(0, batch)
        else:
            # Each part takes every so-many-th window, so that it holds as much of each teacher's as the others do.
            parts = jax.tree.map(lambda x: x.reshape(-1, config.accumulation, *x.shape[1:]).swapaxes(0, 1), batch)
            indices = jnp.arange(config.accumulation)
            zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
            sums, _ = jax.lax.scan(
                lambda sums, part: (jax.tree.map(jnp.add, sums, weighted(*part)), None),
                zeros,
                (indices, parts),
            )
        total, nats, grads = jax.lax.psum(sums, "data")
        return jax.tree.map(lambda x: x / jnp.maximum(total, 1e-9), (nats, grads))

    everywhere, split = PartitionSpec(), PartitionSpec("data")
    teaching = split if out_of_fold else everywhere
    shared_gradients = jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(everywhere, teaching, split, everywhere),
        out_specs=everywhere,
        check_vma=False,  # fused attention does not say over which axes its outcome varies
    )

    def step(
        state: TrainState, batch: dict[str, Array], rate: Array, teachers: list[nnx.State]
    ) -> tuple[TrainState, dict[str, Array]]:
        # Counter-based hardware bits: threefry would take a tenth of the step for dropout alone.
        key = jax.random.fold_in(jax.random.key(config.seed, impl="rbg"), state.step)
        nats, grads = shared_gradients(state.params, teachers, batch, key)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, jax.tree.map(lambda u: u * rate, updates))
        # Early on the average follows closely, so that it forgets the initial weights.
        decay = jnp.minimum(config.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
        metrics = {"loss": nats, "gradient_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, ema, optimizer_state), metrics

    on_all = NamedSharding(mesh, everywhere)
    return jax.jit(
        step,
        in_shardings=(on_all, NamedSharding(mesh, split), on_all, NamedSharding(mesh, teaching)),
        out_shardings=(on_all, on_all),
        donate_argnums=0,
    )


def stacked_teachers(teachers: Sequence[nnx.State], devices: int) -> list[nnx.State]:
    """Teachers out of fold as one state, whose leaves have them along a new first axis, to be split over the devices.

    There each device finds those that teach its part of the batch. Where the devices cannot share them out evenly, each
    teacher comes several times, one after another, and teaches so many smaller parts.
    """
    repeats = math.lcm(len(teachers), devices) // len(teachers)
    return [jax.tree.map(lambda *leaves: jnp.repeat(jnp.stack(leaves), repeats, axis=0), *teachers)]
