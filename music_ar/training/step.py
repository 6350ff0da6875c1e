"""One compiled training step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.training import mesh as meshes
from music_ar.training.config import RunConfig, TrainingConfig
from music_ar.training.distillation import Teachers, label_argument
from music_ar.training.losses import token_loss
from music_ar.training.objective import Batch, Metrics, Objective, Params


class TrainState(NamedTuple):
    """Everything that a step changes: one pytree, whose buffers each step reuses."""

    step: Int[Array, ""]
    params: nnx.State
    ema: nnx.State
    optimizer: optax.OptState


def initial_state(params: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return the state before the first step, split over the axis "fsdp" of a mesh; `params` are copied."""
    shardings = meshes.parameter_shardings(params, mesh)
    params, ema = (jax.device_put(jax.tree.map(jnp.copy, params), shardings) for _ in range(2))
    of_optimizer = meshes.parameter_shardings(jax.eval_shape(optimizer.init, params), mesh)
    return TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, PartitionSpec())),
        params=params,
        ema=ema,
        optimizer=jax.jit(optimizer.init, out_shardings=of_optimizer)(params),
    )


def make_train_step(
    graph: nnx.GraphDef[Any],
    config: RunConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    objective: Objective,
) -> Callable[[TrainState, Batch, Array, Params], tuple[TrainState, Metrics]]:
    """Compile the training step: (state, batch, rate, constants) -> (state, metrics and "gradient_norm").

    The state is split as `initial_state` does, and its buffers are reused. The batch is split over the axes "data" and
    "fsdp" of `mesh`: each device gathers the parameters, computes the gradient of its own examples, with its own
    dropout, and keeps its share of the sum. The devices of the axis "sequence" have the same examples, each a part of
    their prefixes. `rate` is a float32 scalar that multiplies the peak learning rates. The constants are those of
    `Objective.place`.
    """
    everywhere, split = PartitionSpec(), PartitionSpec(meshes.BATCH)
    loss = functools.partial(objective.loss, graph, mesh)

    def gradients(params: nnx.State, *others: Any) -> tuple[Metrics, nnx.State]:
        specs = jax.tree.map(lambda leaf: meshes.parameter_spec(leaf.shape, mesh.shape["fsdp"]), params)
        return jax.shard_map(
            functools.partial(batch_gradients, loss, config.micro_batches, specs),
            mesh=mesh,
            in_specs=(specs, objective.sharding, split, everywhere),
            out_specs=(everywhere, specs),
            check_vma=False,  # fused attention does not say over which axes its result varies
        )(params, *others)

    def step(state: TrainState, *others: Any) -> tuple[TrainState, Metrics]:
        state, metrics = train_step(gradients, optimizer, config, state, *others)
        return jax.lax.with_sharding_constraint(state, meshes.parameter_shardings(state, mesh)), metrics

    shardings = (None, *(NamedSharding(mesh, spec) for spec in (split, everywhere, objective.sharding)))
    return jax.jit(step, in_shardings=shardings, donate_argnums=0)


def student_loss(
    graph: nnx.GraphDef[PerceiverAR],
    config: TrainingConfig,
    teachers: Teachers | None,
    params: nnx.State,
    teacher_params: Params,
    batch: Batch,
    key: Array,
    split_over: str | None = None,
) -> tuple[Array, Metrics]:
    """Return the loss of a batch, over all exits, and the metrics of all blocks; see `token_loss`.

    The teachers see the same latents and the same part of the prefix as the student, without dropout. `split_over` is
    the mesh axis that prefixes are split over; see `PerceiverAR.at_depths`.
    """
    model = nnx.merge(graph, params)
    tokens, weights = batch["tokens"], batch["weights"]
    latents = weights.shape[1]
    prefix = model.config.attended(tokens.shape[1] - 1) - latents
    kept = round(prefix * config.prefix_keep)
    window = {"latents": latents, "kept_prefix": kept, "key": key, "split_over": split_over}
    teacher_BxNxV = None
    if teachers is not None:
        size = model.config.vocabulary_size
        teacher_BxNxV = jax.lax.stop_gradient(teachers.predict(teacher_params, batch, size, **window))
    predicted = model.predict(
        tokens[:, :-1],
        depths=model.config.depths,
        dropout=config.dropout,
        layer_dropout=config.layer_dropout,
        **label_argument(model, batch),
        **window,
    )
    loss_of = functools.partial(token_loss, targets_BxN=tokens[:, -latents:], weights_BxN=weights, z_loss=config.z_loss)
    taught = {"teacher_BxNxV": teacher_BxNxV, "distillation_weight": config.distillation_weight}
    depths_BxNxV, tape = predicted.depths_BxNxV, predicted.tape
    loss, cross_entropy = loss_of(depths_BxNxV[-1], **taught)
    metrics, ponder = {"loss": cross_entropy}, jnp.zeros(())
    if tape is not None:
        metrics["tape_tokens"] = tape.reads_B.astype(jnp.float32).mean()
        ponder = config.ponder_weight * tape.shares_BxT.sum(axis=1).mean()
    if not model.config.exits:
        return loss + ponder, metrics
    if config.exit_distillation:
        own_BxNxV = jax.lax.stop_gradient(jax.nn.softmax(depths_BxNxV[-1]))
        taught = {"teacher_BxNxV": own_BxNxV, "distillation_weight": config.exit_distillation}
    losses = [loss_of(logits_BxNxV, **taught)[0] for logits_BxNxV in depths_BxNxV[:-1]] + [loss]
    shares = config.exit_weights(model.config.depths)
    return sum((share * each for share, each in zip(shares, losses, strict=True)), ponder), metrics


def batch_gradients(
    loss: Callable[[nnx.State, Params, Batch, Array], tuple[Array, Metrics]],
    count: int,
    specs: Any,
    params: nnx.State,
    constants: Params,
    batch: Batch,
    key: Array,
) -> tuple[Metrics, nnx.State]:
    """Return the metrics of the whole batch and a device's share of its gradient, given its share of the batch.

    `count` micro-batches are processed one after another and weighted by the weights of their targets. `specs` say how
    the parameters, and so their gradients, are split.
    """
    params = jax.tree.map(meshes.gather, params, specs)
    key = jax.random.fold_in(key, jax.lax.axis_index(meshes.BATCH))
    gradient = jax.value_and_grad(loss, has_aux=True)

    def weighted(number: Array | int, part: Batch) -> Any:
        """Return the weight of a micro-batch, and its metrics and gradient multiplied by it."""
        (_, metrics), grads = gradient(params, constants, part, jax.random.fold_in(key, number))
        return jax.tree.map(lambda x: x * part["weights"].sum(), (jnp.ones(()), metrics, grads))

    if count == 1:
        sums = weighted(0, batch)
    else:
        # Micro-batch i takes every count-th example from the i-th on, so that it has equal parts for all teachers.
        parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
        like = jax.eval_shape(weighted, 0, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        sums, _ = jax.lax.scan(
            lambda sums, part: (jax.tree.map(jnp.add, sums, weighted(*part)), None), zeros, (jnp.arange(count), parts)
        )
    *sums, grads = sums
    total, metrics = jax.lax.psum(sums, meshes.AXES)
    grads = jax.tree.map(meshes.sum_and_scatter, grads, specs)
    return jax.tree.map(lambda x: x / jnp.maximum(total, 1e-9), (metrics, grads))


def train_step(
    gradients: Callable[[nnx.State, Params, Batch, Array], tuple[Metrics, nnx.State]],
    optimizer: optax.GradientTransformation,
    config: RunConfig,
    state: TrainState,
    batch: Batch,
    rate: Array,
    constants: Params,
) -> tuple[TrainState, Metrics]:
    """Return the state after one step, and its metrics; see `make_train_step`."""
    # Counter-based hardware bits: with threefry, dropout alone would take a tenth of the step.
    key = jax.random.fold_in(jax.random.key(config.seed, impl="rbg"), state.step)
    metrics, grads = gradients(state.params, constants, batch, key)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    params: Any = optax.apply_updates(state.params, jax.tree.map(lambda update: update * rate, updates))
    # Early on, the average tracks the weights closely, so that it forgets the initial ones.
    decay = jnp.minimum(config.ema_decay, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda average, param: decay * average + (1 - decay) * param, state.ema, params)
    metrics = metrics | {"gradient_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, ema, optimizer_state), metrics
