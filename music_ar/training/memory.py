"""How much memory a training step needs, estimated before it is compiled.

Compilation takes a minute, and running out of memory after it explains nothing. The estimate counts arrays that live at
the same time; its constants are fitted to the peaks in docs/results/long-context.md and to XLA's analysis of compiled
steps. It is within a factor of 1.3 of the peaks, and of 1.15 of XLA's analysis on CPUs.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from music_ar.model.config import Compute, ModelConfig
from music_ar.model.weights import parameter_shapes
from music_ar.system import usable_memory
from music_ar.training.config import TrainingConfig, TrainingError
from music_ar.training.mesh import BATCH

TOLERANCE = 1.3  # what may fit is not refused
_PLAIN = 2  # how much more is kept of latents where attention is plain operations, as on CPUs
BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of memory on each device.

    Attributes:
        model: parameters, their averages, the optimizer's state and the gradient.
        windows: what is kept of a micro-batch for its gradient.
    """

    model: int
    windows: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.model + self.windows


def check_memory(model: ModelConfig, compute: Compute, training: TrainingConfig, mesh: Mesh) -> None:
    """Refuse a training step that does not fit in the memory of the devices.

    Raises:
        TrainingError: it does not; the message says how much it needs, and what would fit.
    """
    available = device_memory(mesh.local_devices)
    needed = step_memory(model, compute, training, mesh.shape)
    if available is None or needed.total <= TOLERANCE * available:
        return
    where = "on each device" if mesh.size > 1 else "on the device"
    *others, last = [*_what_fits(model, compute, training, mesh.shape, available)] or ["a smaller model"]
    options = f"{', '.join(others)} or {last}" if others else last
    total, of_model, of_windows = map(gigabytes, (needed.total, needed.model, needed.windows))
    raise TrainingError(
        f"training needs about {total} {where}, which has {gigabytes(available)}: {of_model} for the model and its "
        f"optimizer, {of_windows} for windows of {model.window:,} tokens. What would fit: {options}"
    )


def device_memory(devices: Sequence[Any], *, free: bool = False) -> int | None:
    """Bytes of memory of the first of some devices, or what is left of it.

    Where it does not tell, its share of the machine's memory counts; None if that is unknown.
    """
    told = devices[0].memory_stats() or {}
    if "bytes_limit" in told:
        return told["bytes_limit"] - (told["bytes_in_use"] if free else 0)
    machine = usable_memory()
    return None if machine is None else machine // len(devices)


def _what_fits(
    model: ModelConfig, compute: Compute, training: TrainingConfig, axes: Mapping[str, int], available: int
) -> Iterator[str]:
    """Yield changes, each of which is enough."""

    def fits(model: ModelConfig = model, axes: Mapping[str, int] = axes, **changes: int) -> bool:
        changed = dataclasses.replace(training, **changes)
        return step_memory(model, compute, changed, axes).total <= available

    shards = math.prod(axes[axis] for axis in BATCH)
    windows = training.batch_size // shards
    parts = (count for count in range(training.micro_batches + 1, windows + 1) if windows % count == 0)
    if count := next((count for count in parts if fits(micro_batches=count)), None):
        yield f"{count} micro-batches"
    least = shards * training.micro_batches
    if size := next((size for size in range(training.batch_size - least, 0, -least) if fits(batch_size=size)), None):
        yield f"a batch of {size}"
    shorter = (dataclasses.replace(model, context=context) for context in _halved(model.context, model.latents))
    if config := next((config for config in shorter if fits(model=config)), None):
        yield f"a context of {config.context:,} tokens"
    wider = ({**axes, "fsdp": axes["fsdp"] * factor} for factor in (2, 4, 8, 16))
    if found := next((sizes for sizes in wider if fits(axes=sizes, batch_size=training.batch_size)), None):
        yield f"more devices, split by fsdp={found['fsdp']}"


def _halved(context: int, least: int) -> Iterator[int]:
    """Yield half of a context, a quarter and so on."""
    while context // 2 > least:
        context //= 2
        yield context


def step_memory(model: ModelConfig, compute: Compute, training: TrainingConfig, axes: Mapping[str, int]) -> StepMemory:
    """Estimate the memory of a training step on a mesh with axes of these sizes."""
    rows = training.batch_size / (training.micro_batches * math.prod(axes[axis] for axis in BATCH))
    return StepMemory(
        model=_model_bytes(model, axes["fsdp"]), windows=int(rows * _window_bytes(model, compute, training, axes))
    )


def _model_bytes(model: ModelConfig, shards: int) -> int:
    """Split over `shards`: parameters, two averages, and one moment; whole: the first parameters and the gradient."""
    parameters = sum(math.prod(shape) for shape in parameter_shapes(model).values())
    gathered = 1 if shards > 1 else 0
    return 4 * parameters * (2 + gathered) + 4 * 4 * parameters // shards


def _window_bytes(model: ModelConfig, compute: Compute, training: TrainingConfig, axes: Mapping[str, int]) -> int:
    """Memory of one window: rows of the cross-attention, latents in each block, logits."""
    plain = compute.attention == "xla"
    size, latents = BYTES[compute.dtype], model.latents
    prefix = round((model.attended(model.window) - latents) * training.prefix_keep) // axes["sequence"]
    query_width, kv_width = model.heads * model.head_size, 2 * model.kv_heads * model.head_size
    streams, pairs = (7, 4) if plain else (5, 3)  # of a row's width, and of its keys and values
    of_row = size * (streams * model.width + pairs * kv_width + model.vocabulary_size + model.feature_count)
    of_block = size * (4 * model.width + 3 * query_width + 3 * kv_width // 2 + 2 * model.hidden)
    of_block *= _PLAIN if plain else 1
    of_latent = (model.layers + 1) * of_block + 3 * 4 * model.vocabulary_size
    if plain and not model.segment:
        # Scores, in float32; half of them in the cross-attention, whose prefix goes in blocks.
        of_latent += round((model.layers + 0.5) * 3 * 4 * model.heads * latents)
    return (prefix + latents) * of_row + latents * of_latent


def gigabytes(size: int) -> str:
    """A number of bytes as text."""
    return f"{size / 1e9:.3g} GB"
