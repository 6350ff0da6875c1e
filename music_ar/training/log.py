"""Training metrics: JSON lines, TensorBoard, model FLOPs utilization."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array
from tensorboardX import SummaryWriter

from music_ar.files import write_atomically
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.training.checkpointing import TrainingCheckpoints
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
