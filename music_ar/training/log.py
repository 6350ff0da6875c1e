"""Training metrics: JSON lines, TensorBoard, model FLOPs utilization."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from tensorboardX import SummaryWriter

from music_ar.files import parse_json, read_file, write_atomically
from music_ar.training.checkpointing import TrainingCheckpoints
from music_ar.training.config import RunConfig, TrainingError
from music_ar.training.objective import Objective, Work

# Dense bfloat16 operations per second, from the manufacturers' data sheets.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """A log line.

    Attributes:
        step: steps done.
        loss: mean loss since the last line: for tokens, the cross-entropy in nats per token.
        gradient_norm: mean norm of the gradient since the last line.
        tokens_per_s: targets trained on per second since the last line.
        mfu: model FLOPs utilization, in 0..1; None if the peak of the device is unknown.
        rate: learning rate as a fraction of its peak.
        elapsed_s: seconds trained.
        eta_s: seconds left.
        others: means of the objective's other metrics since the last line, by name.
    """

    step: int
    loss: float
    gradient_norm: float
    tokens_per_s: float
    mfu: float | None
    rate: float
    elapsed_s: float
    eta_s: float
    others: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the run that is done, 0..1."""
        return self.elapsed_s / max(self.elapsed_s + self.eta_s, 1e-9)


class _StepMetrics(NamedTuple):
    """Metrics of a step, fetched from the device."""

    step: int
    loss: float
    gradient_norm: float
    others: dict[str, float] = {}  # noqa: RUF012 -- never changed


class TrainingLog:
    """Collects the metrics of steps without waiting for the device, and writes their means every `log_every` steps.

    Args:
        output: folder of the run; None writes nothing, and only checks the metrics.
        objective: counts targets and operations.
        config: the training options.
        mesh: the training devices, to compute their utilization.
        checkpoints: to name the last one in an error.
        step: steps done before. Lines that a killed run logged after them are removed, since they will be logged again.
        position: what `position` returned at that step; None for a new run.
        on_progress: called with each log line.
    """

    def __init__(
        self,
        output: Path | None,
        objective: Objective,
        config: RunConfig,
        mesh: Mesh,
        checkpoints: TrainingCheckpoints,
        *,
        step: int = 0,
        position: dict[str, Any] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ):
        position = position or {"elapsed_s": 0.0, "unlogged": []}
        self._objective, self._config, self._mesh = objective, config, mesh
        self._checkpoints, self._on_progress = checkpoints, on_progress
        self._elapsed_before_s = position["elapsed_s"]
        self._start_s = self._flushed_s = time.monotonic()
        self._pending: list[tuple[int, dict[str, Array]]] = []  # metrics on the device
        self._unlogged = [_StepMetrics(*values) for values in position["unlogged"]]
        self._steps_since_flush, self._rate, self._work = 0, 0.0, Work(1, None)
        self._files = None if output is None else _LogFiles(output, step)

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._files is not None:
            self._files.close()

    @property
    def elapsed_s(self) -> float:
        """Seconds trained, including those before the run was resumed."""
        return self._elapsed_before_s + time.monotonic() - self._start_s

    def progress(self, step: int) -> float:
        """Return the fraction of the run that is done; 1 or more at its end."""
        if self._config.minutes is not None:
            return self.elapsed_s / (60 * self._config.minutes)
        assert self._config.steps is not None
        return step / self._config.steps

    def position(self) -> dict[str, Any]:
        """Return the part of the log that a checkpoint keeps.

        Raises:
            TrainingError: as `flush`.
        """
        self._fetch()
        unlogged = [list(step if step.others else step[:3]) for step in self._unlogged]
        return {"elapsed_s": self.elapsed_s, "unlogged": unlogged}

    def add(self, step: int, metrics: dict[str, Array], rate: float, batch: dict[str, np.ndarray]) -> None:
        """Add the metrics of a step, still on the device; write a line if one is due."""
        self._pending.append((step, metrics))
        self._steps_since_flush += 1
        self._rate, self._work = rate, self._objective.work(batch)
        if step % self._config.log_every == 0:
            self.flush()

    def flush(self) -> None:
        """Write a line about the steps since the last one, if there are any.

        Raises:
            TrainingError: the loss or the gradient of one of them is not finite.
        """
        self._fetch()
        if not self._unlogged:
            return
        steps, losses, norms, others = zip(*self._unlogged, strict=True)
        self._unlogged.clear()
        tokens_per_s = self._tokens_per_s()
        done, device = max(self.progress(steps[-1]), 1e-9), self._mesh.devices.flat[0]
        progress = Progress(
            step=steps[-1],
            loss=float(np.mean(losses)),
            gradient_norm=float(np.mean(norms)),
            tokens_per_s=tokens_per_s,
            mfu=self._utilization(tokens_per_s, device.device_kind),
            rate=self._rate,
            elapsed_s=self.elapsed_s,
            eta_s=self.elapsed_s * max(0.0, 1 - done) / done,
            others={name: float(np.mean([each[name] for each in others])) for name in others[0]},
        )
        line = dataclasses.asdict(progress)
        self.write(line | line.pop("others"))
        if self._on_progress is not None:
            self._on_progress(progress)

    def write(self, record: dict[str, Any]) -> None:
        """Write a line of JSON, and its numbers to TensorBoard. `record` has a "step"."""
        if self._files is not None:
            self._files.write(record)

    def _fetch(self) -> None:
        """Wait for the pending steps and check their metrics."""
        for step, metrics in self._pending:
            loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
            if not (np.isfinite(loss) and np.isfinite(norm)):
                raise TrainingError(
                    f"training diverged at step {step}: loss {loss}, gradient norm {norm}. The last good checkpoint: "
                    f"{self._checkpoints.newest or 'none yet'}. Resuming it would diverge again; start a new run with "
                    "lower learning rates"
                )
            others = {name: float(value) for name, value in metrics.items() if name not in ("loss", "gradient_norm")}
            self._unlogged.append(_StepMetrics(step, loss, norm, others))
        self._pending.clear()

    def _tokens_per_s(self) -> float:
        """Return the targets per second since the last call."""
        now_s = time.monotonic()
        targets = self._config.batch_size * self._work.targets * self._steps_since_flush
        tokens_per_s = targets / max(now_s - self._flushed_s, 1e-9)
        self._flushed_s, self._steps_since_flush = now_s, 0
        return tokens_per_s

    def _utilization(self, targets_per_s: float, device_kind: str) -> float | None:
        flops = self._work.flops_per_target
        return None if flops is None else flops_utilization(flops * targets_per_s, device_kind, self._mesh.size)


class _LogFiles:
    """`log.jsonl` and the files of TensorBoard in the folder of a run, after `step` steps."""

    def __init__(self, output: Path, step: int):
        path = output / "log.jsonl"
        write_atomically(path, "".join(_lines_until(path, step)).encode())
        self._lines = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        for name, value in record.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def _lines_until(path: Path, step: int) -> Iterator[str]:
    """Yield the complete lines of a log up to `step`; none for a new run."""
    if step == 0 or not path.exists():
        return
    for line in read_file(path).decode(errors="replace").split("\n")[:-1]:  # a kill may have truncated the last line
        with contextlib.suppress(ValueError, TypeError, KeyError):  # or a power cut one before it
            if parse_json(line)["step"] <= step:
                yield f"{line}\n"


def flops_utilization(flops_per_s: float, device_kind: str, devices: int) -> float | None:
    """Return the fraction of the devices' peak that is used, in 0..1, or None if the peak is unknown."""
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)
    return None if peak is None else flops_per_s / (peak * devices)
