"""Time the training step alone, on random tokens: milliseconds, targets per second, operations per second, memory.

    python benchmarks/train_step.py [--preset small] [--batch-size 32] [--dropout 0.1] [--steps 12] [--kernels 20]
    python benchmarks/train_step.py --preset large --mesh data=2,fsdp=2

Prints a table (with --kernels, also the kernels that take longest) and, last, one line of JSON.
"""

import argparse
import collections
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from music_ar.decoding import backend
from music_ar.model.config import PRESETS
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.training.config import TrainingConfig
from music_ar.training.log import flops_utilization
from music_ar.training.mesh import make_mesh, parse_axes, shard_batch
from music_ar.training.next_tokens import NextTokens
from music_ar.training.optimizer import build_optimizer
from music_ar.training.step import initial_state, make_train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--mesh", help="such as data=2,fsdp=2; default: all devices on data")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--kernels", type=int, default=0, help="show the N kernels that take longest", metavar="N")
    arguments = parser.parse_args()

    model_config = PRESETS[arguments.preset]
    config = TrainingConfig(
        steps=1,
        batch_size=arguments.batch_size,
        micro_batches=arguments.micro_batches,
        dropout=arguments.dropout,
    )
    mesh = mesh_of(arguments.mesh)
    began = time.perf_counter()
    run = step_runner(PerceiverAR(model_config, rngs=nnx.Rngs(0), compute=backend.select().compute), config, mesh)
    run()
    compilation_s = time.perf_counter() - began
    step_s = statistics.median(timed(run) for _ in range(arguments.steps))
    targets_per_s = config.batch_size * model_config.latents / step_s
    kept = round((model_config.context - model_config.latents) * config.prefix_keep)
    flops_per_s = model_config.flops_per_target(kept) * targets_per_s
    share = flops_utilization(flops_per_s, jax.devices()[0].device_kind, mesh.size)
    shown = {
        "preset": arguments.preset,
        "batch": config.batch_size,
        "compilation s": f"{compilation_s:.1f}",
        "ms per step": f"{step_s * 1e3:.1f}",
        "M targets/s": f"{targets_per_s / 1e6:.3f}",
        "TFLOP/s": f"{flops_per_s / 1e12:.1f}",
        "of the peak": "" if share is None else f"{share:.1%}",
        "peak GB a device": f"{peak_gb():.2f}",
    }
    table = Table(*shown)
    table.add_row(*map(str, shown.values()))
    Console().print(f"{mesh.size} x {jax.devices()[0].device_kind}, {axes_of(mesh)}")
    Console().print(table)
    if arguments.kernels:
        print_kernels(run, arguments.kernels)
    result = {
        "benchmark": "train_step",
        "device": jax.devices()[0].device_kind,
        "devices": mesh.size,
        "axes": axes_of(mesh),
        "compilation_s": round(compilation_s, 1),
        "step_ms": round(step_s * 1e3, 2),
        "targets_per_s": round(targets_per_s),
        "tflop_per_s": round(flops_per_s / 1e12, 1),
        "flops_utilization": None if share is None else round(share, 4),
        "peak_gb_per_device": round(peak_gb(), 2),
    }
    print(json.dumps(vars(arguments) | result))


def mesh_of(text: str | None) -> Mesh:
    """Return the mesh that an option describes; all devices on data without it."""
    return make_mesh(None if text is None else parse_axes(text))


def axes_of(mesh: Mesh) -> str:
    """Return the axes of a mesh as text."""
    return ",".join(f"{name}={size}" for name, size in mesh.shape.items())


def peak_gb() -> float:
    """Return the most memory that any device has used so far; 0 where devices do not tell."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    return max(peaks) / 1e9


def step_runner(model: PerceiverAR, config: TrainingConfig, mesh: Mesh) -> Callable[..., None]:
    """Return a function that runs training steps, by default one, and waits for the last."""
    graph, params = nnx.split(model, nnx.Param)
    optimizer = build_optimizer(config, mesh)
    train_step = make_train_step(graph, config, optimizer, mesh, NextTokens(model.config, model.compute, config))
    state = initial_state(params, optimizer, mesh)
    size = (config.batch_size, model.config.window + 1)
    batch = {
        "tokens": np.random.default_rng(0).integers(0, 388, size).astype(np.int32),
        "weights": np.ones((config.batch_size, model.config.latents), np.float32),
    }

    def run(steps: int = 1) -> None:
        nonlocal state
        metrics = {}
        for _ in range(steps):
            state, metrics = train_step(state, shard_batch(batch, mesh), jnp.float32(0.1), [])
        jax.block_until_ready(metrics)

    return run


def timed(run: Callable[[], None]) -> float:
    """Return the seconds that `run` takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def print_kernels(run: Callable[[], None], most: int) -> None:
    """Print the kernels of one step that take longest, and the sum of all."""
    kernels = list(longest_kernels(run))
    for name, count, milliseconds in kernels[:most]:
        print(f"{milliseconds:8.3f} ms  {count:5} x  {name[:110]}")
    print(f"{sum(each[2] for each in kernels):8.3f} ms  {sum(each[1] for each in kernels):5} x  all kernels")


def longest_kernels(run: Callable[[], None], most: int | None = None) -> Iterator[tuple[str, int, float]]:
    """Yield (name, count, milliseconds) of the kernels of one step, longest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        [file] = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        total_ns: collections.Counter[str] = collections.Counter()
        count: collections.Counter[str] = collections.Counter()
        for line in (line for plane in planes if "GPU" in plane.name for line in plane.lines if "Stream" in line.name):
            for event in line.events:
                total_ns[event.name] += event.duration_ns
                count[event.name] += 1
    for name, nanoseconds in total_ns.most_common(most):
        yield name, count[name], nanoseconds / 1e6


if __name__ == "__main__":
    main()
