"""Training: the loss, the optimiser, one compiled step, and `fit`, which runs it for steps or for minutes.

`fit` takes an iterator of arrays and knows nothing of where they come from. The batch is split over a mesh of
all devices; parameters are replicated, and teachers out of fold are split as the batch is.
"""

import contextlib
import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.training.checkpointing import TrainingCheckpoints
from music_ar.training.config import TrainingConfig, TrainingError
from music_ar.training.log import Progress, _Log
from music_ar.training.optimizer import build_optimizer
from music_ar.training.step import TrainState, make_train_step, stacked_teachers


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
