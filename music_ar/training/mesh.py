"""The mesh of training devices: its axes, and what is split over which.

| axis | what it splits |
|---|---|
| data | the windows of a batch |
| fsdp | the windows too, and parameters, their average and the optimizer's state (Zhao et al., arXiv 2304.11277) |
| sequence | the prefix of each window, with its keys and values (see `context_attention`) |
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from music_ar.ranges import shown
from music_ar.training.config import TrainingError

AXES = ("data", "fsdp", "sequence")
BATCH = ("data", "fsdp")
"""The axes over which a batch is split."""


def parse_axes(text: str) -> dict[str, int]:
    """Read the sizes of axes, such as "data=4,fsdp=2".

    Raises:
        TrainingError: it does not read so.
    """
    axes: dict[str, int] = {}
    for part in (part.strip() for part in text.split(",")):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES:
            raise TrainingError(f"a mesh has the axes {', '.join(AXES)}, as in data=4,fsdp=2; got {shown(part)}")
        if not (size.isascii() and size.isdigit() and int(size) > 0):
            raise TrainingError(f"the mesh axis {name} needs a number of devices, as in {name}=2; got {shown(part)}")
        if name in axes:
            raise TrainingError(f"the mesh axis {name} must be given once; got {shown(text)}")
        axes[name] = int(size)
    return axes


def make_mesh(axes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh of all axes.

    Args:
        axes: their sizes. Without "data", that axis has all devices that the others leave; the others default to 1.
        devices: those of JAX to use; default: all.

    Raises:
        TrainingError: the sizes do not fit the devices.
    """
    chosen, given = list(jax.devices() if devices is None else devices), dict(axes or {})
    others = math.prod(size for name, size in given.items() if name != "data")
    sizes = [given.get("data", max(1, len(chosen) // others)), given.get("fsdp", 1), given.get("sequence", 1)]
    if math.prod(sizes) != len(chosen):
        product = " x ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True) if size > 1) or "data=1"
        raise TrainingError(
            f"the mesh {product} needs {_count(math.prod(sizes))}, and there are {len(chosen)}: change the sizes so "
            "that their product is that number, or choose the devices (CUDA_VISIBLE_DEVICES)"
        )
    if jax.local_device_count() % sizes[-1]:
        raise TrainingError(
            f"the mesh axis sequence must divide the {_count(jax.local_device_count())} of a process, since each "
            f"process reads its own windows; got {sizes[-1]}"
        )
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=chosen)


def _count(devices: int) -> str:
    return f"{devices} device{'s' * (devices != 1)}"


def batch_shards(mesh: Mesh) -> int:
    """Number of parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def split_axis(mesh: Mesh) -> str | None:
    """The axis over which prefixes are split; None if it has one device."""
    return "sequence" if mesh.shape["sequence"] > 1 else None


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Split this process's share of a batch over its devices."""
    split = NamedSharding(mesh, PartitionSpec(BATCH))
    return {name: jax.make_array_from_process_local_data(split, array) for name, array in batch.items()}


def process_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """Return which rows of a batch the devices of this process have, in order."""
    slices = NamedSharding(mesh, PartitionSpec(BATCH)).addressable_devices_indices_map((batch_size,)).values()
    return tuple(sorted({row for index in slices if index for row in range(*index[0].indices(batch_size))}))


def parameter_spec(shape: tuple[int, ...], shards: int) -> PartitionSpec:
    """Where a parameter, or the optimizer's state of it, is split over "fsdp".

    The longer of a matrix's two sides is split, if it can be split evenly; vectors stay whole. Of a stack of matrices,
    each is split.
    """
    sides = [axis for axis in range(len(shape))[-2:] if shape[axis] % shards == 0]
    if shards == 1 or len(shape) < 2 or not sides:
        return PartitionSpec()
    longest = max(sides, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * longest, "fsdp")


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """Return the sharding of each array of a pytree of parameters or of the optimizer's state; see `parameter_spec`."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, parameter_spec(leaf.shape, mesh.shape["fsdp"])), tree)


def gather(share: Array, spec: PartitionSpec) -> Array:
    """Return the whole of a parameter, given a device's share. Call it in `jax.shard_map`."""
    if not spec:
        return share
    return jax.lax.all_gather(share, "fsdp", axis=len(spec) - 1, tiled=True)


def sum_and_scatter(whole: Array, spec: PartitionSpec) -> Array:
    """Return a device's share of the sum over all devices. Call it in `jax.shard_map`."""
    if spec:
        whole = jax.lax.psum_scatter(whole, "fsdp", scatter_dimension=len(spec) - 1, tiled=True)
    return jax.lax.psum(whole, ("data", "sequence") if spec else AXES)


def replicated(tree: Any, mesh: Mesh) -> Any:
    """Copy what is split over "fsdp" whole to each device."""
    if mesh.shape["fsdp"] == 1:
        return tree
    return jax.jit(lambda arrays: arrays, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)
