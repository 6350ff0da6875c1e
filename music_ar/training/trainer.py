"""`Trainer`: runs the training step for a number of steps or minutes, with validation, logs and checkpoints.

It takes iterators of arrays and does not know where they come from. `mesh` says what is split over the devices.
"""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from music_ar.model.config import ModelConfig
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.training.checkpointing import TrainingCheckpoints
from music_ar.training.cluster import Alone, Decision, Hosts
from music_ar.training.config import TrainingConfig, TrainingError
from music_ar.training.distillation import Teachers
from music_ar.training.log import Progress, TrainingLog
from music_ar.training.memory import check_memory
from music_ar.training.mesh import batch_shards, make_mesh, replicated, shard_batch, split_axis
from music_ar.training.optimizer import build_optimizer
from music_ar.training.step import initial_state, make_train_step


@runtime_checkable
class Batches(Protocol):
    """An iterator of batches whose position can be saved, such as grain's.

    A batch is {"tokens": int32 [B, M + 1], "weights": float32 [B, N], "labels": float32 [B, C]}. Inputs are all tokens
    but the last, left-padded; targets are the last N, weighted. Labels say how each example was augmented, for models
    with `ModelConfig.label_size`; "wishes" (int32 [B, W]), if there are any, are the ids of each example's wishes, for
    models with `ModelConfig.wishes`. B is this process's share of the batch: its `process_rows`.
    """

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> Any:
        """Return the position, JSON-like."""
        ...

    def set_state(self, state: Any) -> None:
        """Move to a position that `get_state` returned."""
        ...


class Fitted(NamedTuple):
    """The result of `Trainer.fit`.

    Attributes:
        model: the averaged weights of the step that validated best, or of the last step without validation; on this
            process's devices.
        model_step: that step.
        step: steps done.
        elapsed_s: seconds trained.
        finished: whether the run reached its end.
    """

    model: PerceiverAR
    model_step: int
    step: int
    elapsed_s: float
    finished: bool


class Validation(NamedTuple):
    """What `validate` returned at a step."""

    step: int
    value: float


class Trainer:
    """A training run: `Trainer(...).fit()` trains a model and returns it with averaged weights.

    Checkpoints are written to `output`/training in the background, logs to `output`/log.jsonl and `output`/tensorboard.
    SIGTERM and Ctrl-C save a checkpoint and end `fit` early. However often a run is stopped or killed and resumed, its
    log reads like that of a single run.

    On many hosts, each process makes a `Trainer` with the same arguments, except for the rows that its batches hold and
    `hosts`. `output` is a folder that all of them see. Process 0 decides about time and checkpoints and writes the log.
    A run may continue with another number of processes or devices.

    Args:
        model: the initial weights (ignored when resuming); not changed.
        config: how to train.
        batches: the training data.
        output: folder of the run; created if it is missing.
        teachers: models to distill into this one; see `distillation` and `config.distillation_weight`.
        final_batches: data for the last `config.final_fraction` of the run; default: `batches` to the end.
        data: description of the training data, JSON-like; saved, and compared when resuming.
        resume: continue from the newest checkpoint under `output`. A run whose length is in steps continues bit for
            bit.
        validate: called with the averaged model every `config.validate_every` steps and at the end. Its value is
            logged, and the model with the lowest value is the result. The model is valid only during the call.
        on_progress: called with each log line.
        mesh: devices to train on; default: `make_mesh()`, all of them on the axis "data".
        hosts: the processes that train together; default: this one alone.

    Raises:
        TrainingError: the devices and the teachers cannot share the batch, or a step does not fit in their memory.
        CheckpointError: `output` holds a run and `resume` is false; or it is true, and there is no checkpoint, or one
            of a run with different settings.
    """

    def __init__(
        self,
        model: PerceiverAR,
        config: TrainingConfig,
        batches: Batches,
        *,
        output: Path,
        teachers: Teachers | None = None,
        final_batches: Batches | None = None,
        data: dict[str, Any] | None = None,
        resume: bool = False,
        validate: Callable[[PerceiverAR], float] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        mesh: Mesh | None = None,
        hosts: Hosts | None = None,
    ):
        mesh = mesh or make_mesh()
        self._hosts: Hosts = hosts or Alone()
        writes = self._hosts.process == 0
        _check_batch_size(config, batch_shards(mesh), teachers)
        _check_prefix(model.config, config, mesh)
        check_memory(model.config, model.compute, config, mesh)
        self._config, self._mesh, self._validate = config, mesh, validate
        self._sources = [batches] if final_batches is None else [batches, final_batches]
        self._graph, params = nnx.split(model, nnx.Param)
        optimizer = build_optimizer(config, mesh)
        self._train_step = make_train_step(self._graph, config, optimizer, mesh, teachers)
        self._teacher_params = [] if teachers is None else teachers.place(mesh)
        self._state = initial_state(params, optimizer, mesh)
        self._best = jax.tree.map(jnp.copy, self._state.ema)
        self._best_validation: Validation | None = None
        self._validated: int | None = None  # the last step that was, since this process began
        settings = {
            "model": dataclasses.asdict(model.config),
            "training": dataclasses.asdict(config),
            "data": data or {},
            "final_batches": final_batches is not None,
        }
        with contextlib.ExitStack() as files:
            self._checkpoints = files.enter_context(TrainingCheckpoints(output / "training", settings, resume=resume))
            position = self._restore() if resume else None
            self._step = int(self._state.step)
            self._log = files.enter_context(
                TrainingLog(
                    output if writes else None,
                    model.config,
                    config,
                    mesh,
                    self._checkpoints,
                    step=self._step,
                    position=position,
                    on_progress=on_progress if writes else None,
                )
            )
            self._files = files.pop_all()

    def fit(self) -> Fitted:
        """Train until the end of the run, or until SIGTERM or Ctrl-C.

        Raises:
            TrainingError: the loss or its gradient is no longer finite.
        """
        with self._files, until_terminated() as terminated:
            first, clock = self._step, _Clock(self._log, self._config, self._step)
            while (decision := self._hosts.agree(clock.decide(self._step, stop=terminated()))).progress < 1:
                if decision.save:
                    self.save()
                if decision.stop:
                    break
                self.step(decision.progress)
                if self._config.validate_every and self._step % self._config.validate_every == 0:
                    self.validate()
            finished = decision.progress >= 1
            if finished:
                if self._config.validate_every and self._step not in (first, self._validated):
                    self.validate()
                self._log.flush()
            self.save()
            weights, step = self._state.ema, self._step
            if self._best_validation is not None:
                weights, step = self._best, self._best_validation.step
            model = nnx.merge(self._graph, self._on_this_process(weights))
            return Fitted(model, step, self._step, self._log.elapsed_s, finished=finished)

    def step(self, progress: float) -> None:
        """Train on one batch, `progress` (0..1) into the run."""
        batch = next(self._sources[-1 if progress >= 1 - self._config.final_fraction else 0])
        rate = self._config.learning_rate_factor(self._step, progress)
        self._state, metrics = self._train_step(
            self._state, shard_batch(batch, self._mesh), jnp.float32(rate), self._teacher_params
        )
        self._step += 1
        self._log.add(self._step, metrics, rate, batch)

    def validate(self) -> None:
        """Validate the averaged weights, if there is a way to; keep a copy if they are the best so far."""
        if self._validate is None:
            return
        averaged = nnx.merge(self._graph, self._on_this_process(self._state.ema))
        found, self._validated = Validation(self._step, self._validate(averaged)), self._step
        self._log.write({"step": found.step, "validation": found.value})
        if self._best_validation is None or found.value < self._best_validation.value:
            self._best, self._best_validation = jax.tree.map(jnp.copy, self._state.ema), found

    def save(self) -> None:
        """Save a checkpoint.

        Raises:
            TrainingError: the loss or its gradient is no longer finite; nothing is saved then.
        """
        best = None if self._best_validation is None else self._best_validation._asdict()
        batches = [source.get_state() for source in self._sources]
        position = self._log.position() | {"batches": batches, "best": best}
        self._checkpoints.save(self._step, (self._state, self._best), position)

    def _on_this_process(self, tree: Any) -> Any:
        """Return arrays as whole ones on devices of this process; all processes call it together."""
        whole = replicated(tree, self._mesh)
        return jax.tree.map(lambda leaf: leaf if leaf.is_fully_addressable else leaf.addressable_data(0), whole)

    def _restore(self) -> dict[str, Any]:
        """Load the newest checkpoint, and return its position."""
        (self._state, self._best), position = self._checkpoints.restore((self._state, self._best))
        for source, saved in zip(self._sources, position["batches"], strict=True):
            source.set_state(saved)
        if position["best"] is not None:
            self._best_validation = Validation(**position["best"])
        return position


class _Clock:
    """What process 0 decides by: the run's time and when a checkpoint is due. The run begins at step `first`."""

    def __init__(self, log: TrainingLog, config: TrainingConfig, first: int):
        self._log, self._first, self._between_s = log, first, 60 * config.checkpoint_minutes
        self._next_save_s = log.elapsed_s + self._between_s

    def decide(self, step: int, *, stop: bool) -> Decision:
        """Decide what comes after `step` steps."""
        save = step > self._first and self._log.elapsed_s >= self._next_save_s
        if save:
            self._next_save_s = self._log.elapsed_s + self._between_s
        return Decision(self._log.progress(step), save, stop)


def _check_batch_size(config: TrainingConfig, shards: int, teachers: Teachers | None) -> None:
    """Raise TrainingError unless each micro-batch can be split among devices and teachers."""
    parts = shards if teachers is None else teachers.batch_parts(shards)
    if config.batch_size % (config.micro_batches * parts):
        raise TrainingError(
            f"batch_size must be a multiple of {config.micro_batches * parts}, which is micro_batches = "
            f"{config.micro_batches} times {parts} equal parts for {shards} shards (the mesh's data x fsdp) and their "
            f"teachers; got {config.batch_size}"
        )


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


@contextlib.contextmanager
def until_terminated() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGTERM or Ctrl-C was received; only the main thread receives them.

    A second Ctrl-C interrupts at once, as usual.
    """
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received.is_set
        return

    def handle(number: int, _: object) -> None:
        if number == signal.SIGINT and received.is_set():
            raise KeyboardInterrupt
        received.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
