"""Training: the loss, the optimiser, one compiled step, and `fit`, which runs it for steps or for minutes.

`fit` takes an iterator of arrays and knows nothing of where they come from. The batch is split over a mesh of
all devices; parameters are replicated, and teachers out of fold are split as the batch is.
"""

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from optax import contrib
from tensorboardX import SummaryWriter

from music_ar.files import write_atomically
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.pretrained import TrainingCheckpoints
from music_ar.training.config import TrainingConfig, TrainingError

# Dense bfloat16 operations a second by the makers' data sheets, to show utilisation (MFU).
PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


@runtime_checkable
class Batches(Protocol):
    """An iterator of batches whose position can be saved, such as grain's.

    A batch is {"tokens": int32 [B, M + 1], "weights": float32 [B, N], "view": float32 [B, C]}: inputs are all tokens
    but the last, targets the last N, weighted; tokens are left-padded; `view` tells a model how its windows were made,
    if it has `ModelConfig.view_size`. B is this process's share of the batch.
    """

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> Any:
        """The position, JSON-like."""
        ...

    def set_state(self, state: Any) -> None:
        """Goes to a position that `get_state` gave."""
        ...


class TrainState(NamedTuple):
    """Everything a step changes: one pytree, donated to each step."""

    step: Int[Array, ""]
    params: nnx.State
    ema: nnx.State
    optimizer: optax.OptState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What a log line tells: the mean loss since the last one, speed, and how long the rest will take."""

    step: int
    loss: float
    gradient_norm: float
    tokens_per_s: float
    mfu: float | None
    rate: float
    elapsed_s: float
    eta_s: float


class Fitted(NamedTuple):
    """The outcome of `fit`.

    Attributes:
        model: the averaged weights: of the step that validated best, or of the last one if none was validated.
        model_step: the step that they are of.
        step: steps done.
        elapsed_s: seconds trained.
        finished: whether the run reached its end.
    """

    model: PerceiverAR
    model_step: int
    step: int
    elapsed_s: float
    finished: bool


def token_nats(logits_BxNxV: Float[Array, "B N V"], targets_BxN: Int[Array, "B N"]) -> Float[Array, "B N"]:
    """Cross-entropy of each target, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxNxV, targets_BxN)


def token_loss(
    logits_BxNxV: Float[Array, "B N V"],
    targets_BxN: Int[Array, "B N"],
    weights_BxN: Float[Array, "B N"],
    z_loss: float,
    *,
    taught_BxNxV: Float[Array, "B N V"] | None = None,
    distillation: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What is minimised, and the weighted mean cross-entropy, both in nats a token.

    The first adds the z-loss (PaLM, arXiv 2204.02311, §5) and, where probabilities are `taught`, takes the share
    `distillation` of the cross-entropy with them instead.
    """
    total = jnp.maximum(weights_BxN.sum(), 1e-9)

    def mean(values_BxN: Array) -> Array:
        return jnp.sum(values_BxN * weights_BxN) / total

    nats = loss = mean(token_nats(logits_BxNxV, targets_BxN))
    if taught_BxNxV is not None:
        loss = (1 - distillation) * nats + distillation * mean(optax.softmax_cross_entropy(logits_BxNxV, taught_BxNxV))
    return loss + z_loss * mean(jnp.square(jax.nn.logsumexp(logits_BxNxV, axis=-1))), nats


def build_optimizer(config: TrainingConfig, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """Clipping, then Muon on the matrices and AdamW on the rest, or AdamW alone, at peak rates.

    Beside Muon, AdamW has Nesterov's momentum too, as Optax builds it. The devices of a mesh share Muon's matrices
    out.
    """
    if config.optimizer == "adamw":
        mesh = None  # to share a few operations an element would cost more than it saves
        decayed = {"matrices": True, "rest": False}
        rule = optax.adamw(config.learning_rate, b2=0.99, weight_decay=config.weight_decay, mask=decayed)
    else:
        rule = contrib.muon(
            config.matrix_learning_rate,
            weight_decay=config.weight_decay,
            adam_learning_rate=config.learning_rate,
            adam_b2=0.99,
            muon_weight_dimension_numbers=_muon_dimensions,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), _grouped(rule, mesh))


def _muon_dimensions(grouped: Any) -> Any:
    """Which axes of a leaf of `_grouped` Muon multiplies; None for what AdamW trains."""
    return {
        "matrices": {shape: contrib.MuonDimensionNumbers(1, 2) for shape in grouped["matrices"]},
        "rest": dict.fromkeys(grouped["rest"]),
    }


def _grouped(rule: optax.GradientTransformation, mesh: Mesh | None) -> optax.GradientTransformation:
    """Shows `rule` the parameters as {"matrices": {shape: [count, in, out]}, "rest": {path: leaf}}.

    Matrices of one shape are stacked, so that Muon's iteration runs as a few batched products, not as a
    thousand small ones, and each device of a mesh works on its share of every stack, filled up with zeros.
    Embedding and head are no matrices here: their rows are classes, not features.
    """

    def group(tree: Any) -> dict[str, dict[str, Array]]:
        matrices: dict[str, list[Array]] = {}
        rest: dict[str, Array] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path)
            if "kernel" in name and "head" not in name:
                matrices.setdefault(str(leaf.shape), []).append(leaf)
            else:
                rest[name] = leaf
        return {"matrices": {shape: jnp.stack(leaves) for shape, leaves in matrices.items()}, "rest": rest}

    def ungroup(grouped: Any, like: Any) -> Any:
        matrices = {shape: iter(stacked) for shape, stacked in grouped["matrices"].items()}
        leaves = [
            grouped["rest"][name]
            if (name := jax.tree_util.keystr(path)) in grouped["rest"]
            else next(matrices[str(leaf.shape)])
            for path, leaf in jax.tree_util.tree_leaves_with_path(like)
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def share(tree: Any) -> Any:
        if mesh is None or mesh.size == 1:
            return tree
        devices, split = mesh.size, NamedSharding(mesh, PartitionSpec("data"))

        def shared(leaf: Array) -> Array:
            if leaf.ndim < 3:  # no stack
                return leaf
            filled = jnp.pad(leaf, ((0, -leaf.shape[0] % devices), (0, 0), (0, 0)))
            return jax.lax.with_sharding_constraint(filled, split)

        return jax.tree.map(shared, tree)

    def cut(tree: Any, like: Any) -> Any:
        return jax.tree.map(lambda leaf, full: leaf[: full.shape[0]] if full.ndim == 3 else leaf, tree, like)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        grouped = group(updates)
        new, new_state = rule.update(share(grouped), share(state), share(group(params)))
        return ungroup(cut(new, grouped), updates), cut(new_state, state)

    return optax.GradientTransformation(lambda params: rule.init(group(params)), update)


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


def fit(
    model: PerceiverAR,
    config: TrainingConfig,
    batches: Batches,
    *,
    output: Path,
    teachers: Sequence[PerceiverAR] = (),
    out_of_fold: bool = False,
    final_batches: Batches | None = None,
    data: dict[str, Any] | None = None,
    resume: bool = False,
    validate: Callable[[PerceiverAR], float] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Fitted:
    """Trains `model` and returns it with averaged weights.

    Checkpoints go to `output`/training (asynchronously), logs to `output`/log.jsonl and `output`/tensorboard.
    SIGTERM or Ctrl-C saves a checkpoint and returns early. However often a run is ended so, or killed, and resumed, its
    log is that of one run.

    Args:
        model: where to start from (ignored when resuming); left as it is.
        config: how to train.
        batches: the training data.
        output: folder of the run; made if it is missing.
        teachers: models whose mean prediction the model learns beside the tokens; see `config.distillation`.
        out_of_fold: with K teachers, each batch holds K equal parts, and the teachers, in order, teach one each.
        final_batches: data for the last `config.final_fraction` of the run; default: `batches` to the end.
        data: what the batches are made of, JSON-like; saved, and compared when resuming.
        resume: go on from the newest checkpoint under `output`; exact to the bit for a run counted in steps.
        validate: called with the averaged model every `config.validate_every` steps and at the end; its figure is
            logged, and the model with the lowest is returned. The model is good until it returns.
        on_progress: called with each log line.

    Raises:
        TrainingError: the loss or its gradient stopped being finite, or the devices or the teachers out of fold cannot
            share the batch, or these are not of one design.
        CheckpointError: `output` holds a run and `resume` is false; or it is true and there is no checkpoint, or
            one of other settings.
    """
    if config.batch_size % (config.accumulation * jax.device_count()):
        raise TrainingError(
            f"batch_size must be a multiple of accumulation * devices, got {config.batch_size}, "
            f"{config.accumulation} and {jax.device_count()}"
        )
    if out_of_fold:
        _check_out_of_fold(config, teachers)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    graph, params = nnx.split(model, nnx.Param)
    split_teachers = [nnx.split(teacher, nnx.Param) for teacher in teachers]
    optimizer = build_optimizer(config, mesh)
    train_step = make_train_step(
        graph, config, optimizer, mesh, [teacher for teacher, _ in split_teachers], out_of_fold=out_of_fold
    )
    teacher_params = [taught for _, taught in split_teachers]
    if out_of_fold:
        teacher_params = stacked_teachers(teacher_params, mesh.size)
    teaching = PartitionSpec("data") if out_of_fold else PartitionSpec()
    teacher_params = jax.device_put(teacher_params, NamedSharding(mesh, teaching))
    state = _initial_state(params, optimizer, mesh)
    sources = [batches] if final_batches is None else [batches, final_batches]
    settings = {
        "model": dataclasses.asdict(model.config),
        "training": dataclasses.asdict(config),
        "data": data or {},
        "final_batches": final_batches is not None,
    }
    with (
        _until_terminated() as terminated,
        TrainingCheckpoints(output / "training", settings, resume=resume) as checkpoints,
    ):
        position: dict[str, Any] = {"elapsed_s": 0.0, "unlogged": [], "best": None}
        best = jax.tree.map(jnp.copy, state.ema)
        if resume:
            (state, best), position = checkpoints.restore((state, best))
            for source, saved in zip(sources, position["batches"], strict=True):
                source.set_state(saved)
        step = int(state.step)
        best_figure = None if position["best"] is None else _Figure(**position["best"])
        with _Log(output, model, config, checkpoints, on_progress, step=step, position=position) as log:
            next_save_s = log.elapsed_s + 60 * config.checkpoint_minutes

            def save() -> None:
                # Asking the log for its position raises before a broken state is saved.
                figure = None if best_figure is None else best_figure._asdict()
                reading = {"batches": [source.get_state() for source in sources], "best": figure}
                checkpoints.save(step, (state, best), log.position() | reading)

            def check() -> None:
                nonlocal best, best_figure
                assert validate is not None
                figure = _Figure(step, validate(nnx.merge(graph, state.ema)))
                log.write({"step": step, "validation": figure.value})
                if best_figure is None or figure.value < best_figure.value:
                    best, best_figure = jax.tree.map(jnp.copy, state.ema), figure

            while (progress := log.share_done(step)) < 1 and not terminated():
                batch = next(sources[-1] if progress >= 1 - config.final_fraction else sources[0])
                rate = config.rate(step, progress)
                state, metrics = train_step(state, _put_batch(batch, mesh), jnp.float32(rate), teacher_params)
                step += 1
                log.add(step, metrics, rate, batch)
                validating = validate is not None and config.validate_every > 0
                if validating and (step % config.validate_every == 0 or log.share_done(step) >= 1):
                    check()
                if log.elapsed_s >= next_save_s:
                    save()
                    next_save_s = log.elapsed_s + 60 * config.checkpoint_minutes
            if progress >= 1:
                log.flush()
            save()
            chosen, chosen_step = (state.ema, step) if best_figure is None else (best, best_figure.step)
            return Fitted(nnx.merge(graph, chosen), chosen_step, step, log.elapsed_s, finished=progress >= 1)


def _check_out_of_fold(config: TrainingConfig, teachers: Sequence[PerceiverAR]) -> None:
    """Raises TrainingError unless the teachers are of one design and can share the batch, on these devices."""
    parts = math.lcm(max(1, len(teachers)), jax.device_count())
    if not teachers or config.batch_size % (config.accumulation * parts):
        raise TrainingError(
            "out of fold, batch_size must be a multiple of accumulation * the least common multiple of teachers and "
            f"devices, got {config.batch_size}, {config.accumulation}, {len(teachers)} and {jax.device_count()}"
        )
    designs = {(teacher.config, teacher.dtype) for teacher in teachers}
    if len(designs) > 1:
        raise TrainingError(f"out of fold, teachers must be of one design, got {len(designs)}: {designs}")


def _initial_state(params: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    everywhere = NamedSharding(mesh, PartitionSpec())
    # Copies, since a step's state is donated and the caller's model must outlive it.
    params, ema = (jax.device_put(jax.tree.map(jnp.copy, params), everywhere) for _ in range(2))
    return TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), everywhere),
        params=params,
        ema=ema,
        optimizer=jax.jit(optimizer.init, out_shardings=everywhere)(params),
    )


class _Figure(NamedTuple):
    """What `validate` said of a step."""

    step: int
    value: float


class _StepLog(NamedTuple):
    """A step's metrics, once the device has told them."""

    step: int
    loss: float
    gradient_norm: float


class _Log:
    """Gathers the steps' metrics without waiting for the device, and writes them every `log_every` steps.

    Args:
        output: folder of the run.
        model: for its size.
        config: how the run is trained.
        checkpoints: to name the last in an error.
        on_progress: called with each line.
        step: steps done before; what a killed run logged after them is removed, to be logged again.
        position: what `position` gave at that step, or the like for a new run.
    """

    def __init__(
        self,
        output: Path,
        model: PerceiverAR,
        config: TrainingConfig,
        checkpoints: TrainingCheckpoints,
        on_progress: Callable[[Progress], None] | None,
        *,
        step: int,
        position: dict[str, Any],
    ):
        self._model_config, self._config, self._on_progress = model.config, config, on_progress
        self._checkpoints = checkpoints
        self._elapsed_before_s = position["elapsed_s"]
        self._began_s = self._flushed_s = time.monotonic()
        self._waiting: list[tuple[int, dict[str, Array]]] = []
        self._unlogged = [_StepLog(*values) for values in position["unlogged"]]
        self._steps_since_flush, self._rate, self._window = 0, 0.0, (1, 1)
        path = output / "log.jsonl"
        write_atomically(path, "".join(_lines_until(path, step)).encode())
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    @property
    def elapsed_s(self) -> float:
        """Seconds trained, those before resuming included."""
        return self._elapsed_before_s + time.monotonic() - self._began_s

    def share_done(self, step: int) -> float:
        """How much of the run is done, from 0; 1 or more at its end."""
        if self._config.minutes is not None:
            return self.elapsed_s / (60 * self._config.minutes)
        assert self._config.steps is not None
        return step / self._config.steps

    def position(self) -> dict[str, Any]:
        """What a checkpoint keeps of the log.

        Raises:
            TrainingError: as `flush`.
        """
        self._collect()
        return {"elapsed_s": self.elapsed_s, "unlogged": [list(step) for step in self._unlogged]}

    def add(self, step: int, metrics: dict[str, Array], rate: float, batch: dict[str, np.ndarray]) -> None:
        """Takes a step's metrics, still on the device; writes a line if one is due."""
        self._waiting.append((step, metrics))
        self._steps_since_flush += 1
        self._rate, self._window = rate, (batch["tokens"].shape[1] - 1, batch["weights"].shape[1])
        if step % self._config.log_every == 0:
            self.flush()

    def _collect(self) -> None:
        """Waits for the steps gathered and checks them."""
        for step, metrics in self._waiting:
            loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
            if not (np.isfinite(loss) and np.isfinite(norm)):
                raise TrainingError(
                    f"training broke at step {step}: loss {loss}, norm of the gradient {norm}. The last good "
                    f"checkpoint: {self._checkpoints.newest or 'none yet'}. Resuming would end the same way; start in "
                    "another folder with lower learning rates"
                )
            self._unlogged.append(_StepLog(step, loss, norm))
        self._waiting.clear()

    def flush(self) -> None:
        """Writes a line on the steps since the last one, if there are any.

        Raises:
            TrainingError: the loss or the gradient of one of them is not finite.
        """
        self._collect()
        if not self._unlogged:
            return
        steps, losses, norms = zip(*self._unlogged, strict=True)
        self._unlogged.clear()
        now_s = time.monotonic()
        M, N = self._window
        tokens_per_s = self._config.batch_size * N * self._steps_since_flush / max(now_s - self._flushed_s, 1e-9)
        self._flushed_s, self._steps_since_flush = now_s, 0
        prefix = self._model_config.read(M) - N
        flops = self._model_config.flops_per_target(round(prefix * self._config.prefix_keep))
        done = max(self.share_done(steps[-1]), 1e-9)
        progress = Progress(
            step=steps[-1],
            loss=float(np.mean(losses)),
            gradient_norm=float(np.mean(norms)),
            tokens_per_s=tokens_per_s,
            mfu=_utilisation(flops * tokens_per_s),
            rate=self._rate,
            elapsed_s=self.elapsed_s,
            eta_s=self.elapsed_s * max(0.0, 1 - done) / done,
        )
        self.write(dataclasses.asdict(progress))
        if self._on_progress is not None:
            self._on_progress(progress)

    def write(self, record: dict[str, Any]) -> None:
        """One line of JSON, and the same to TensorBoard. `record` has a "step"."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, record["step"])


def _lines_until(path: Path, step: int) -> Iterator[str]:
    """The whole lines of a log that tell of `step` or earlier ones; of a new run, none."""
    if step == 0 or not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        with contextlib.suppress(json.JSONDecodeError):  # a kill may have cut the last one
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                yield line


def _utilisation(flops_per_s: float) -> float | None:
    kind = jax.devices()[0].device_kind
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)
    return None if peak is None else flops_per_s / (peak * jax.device_count())


def _put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    split = NamedSharding(mesh, PartitionSpec("data"))
    return {name: jax.make_array_from_process_local_data(split, array) for name, array in batch.items()}


@contextlib.contextmanager
def _until_terminated() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGTERM or Ctrl-C has come; outside the main thread neither is noticed.

    A second Ctrl-C interrupts at once, as it would without us.
    """
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return

    def note(number: int, _: object) -> None:
        if number == signal.SIGINT and came.is_set():
            raise KeyboardInterrupt
        came.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
