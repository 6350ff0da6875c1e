"""Time a training step against the context: Perceiver AR and its baselines.

    python benchmarks/context_length.py [--model transformer-xl] [--contexts 4096 16384 65536 131072] [--layers 6]

Perceiver AR has N latents, the Transformer as many as inputs, and Transformer-XL segments of N tokens. One window a
step, no prefix dropout, no conditioning features. Contexts grow until the device has no memory left. Prints a table
and, last, one line of JSON; --output also appends that line to a file for `draw_context_length.py`.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table
from train_step import print_kernels, step_runner, timed

from music_ar.decoding import backend
from music_ar.model.config import PRESETS, ModelConfig
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.training.config import TrainingConfig

MODELS = ("perceiver-ar", "transformer", "transformer-xl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--model", choices=MODELS, default="perceiver-ar")
    parser.add_argument("--latents", type=int, default=1024, help="or the length of a segment")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--kernels", type=int, default=0, help="show the kernels that take longest", metavar="N")
    parser.add_argument("--output", type=Path, help="append the line of JSON to this file")
    arguments = parser.parse_args()

    out_of_memory_at = None
    console, table = Console(), Table("context", "compilation s", "ms per step", "peak GB")
    results = []
    for context in sorted(arguments.contexts):
        try:
            result = measured(arguments, context)
        except jax.errors.JaxRuntimeError as error:
            print(f"{context}: {error}".splitlines()[0], flush=True)
            out_of_memory_at = context
            break
        results.append(result)
        table.add_row(*(f"{result[key]}" for key in ("context", "compilation_s", "step_ms", "peak_gb")))
    console.print(f"{arguments.model}, {jax.devices()[0].device_kind}, JAX {jax.__version__}")
    console.print(table)
    names = ("model", "latents", "layers", "width")
    line = json.dumps(
        {name: getattr(arguments, name) for name in names}
        | {"device": jax.devices()[0].device_kind, "out_of_memory_at": out_of_memory_at, "results": results}
    )
    if arguments.output is not None:
        with arguments.output.open("a") as file:
            file.write(line + "\n")
    print(line)


def measured(arguments: argparse.Namespace, context: int) -> dict[str, float]:
    """Time of a step of one model in a run of steps, and the most memory used so far."""
    run, compilation_s = runner(arguments, context)
    step_s = statistics.median(timed(lambda: run(arguments.steps)) for _ in range(3)) / arguments.steps
    if arguments.kernels:
        print_kernels(run, arguments.kernels)
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "context": context,
        "compilation_s": round(compilation_s, 1),
        "step_ms": round(step_s * 1e3, 2),
        "peak_gb": round(memory.get("peak_bytes_in_use", 0) / 1e9, 2),
    }


def runner(arguments: argparse.Namespace, context: int):  # noqa: ANN201
    """A function that runs a step, and the seconds that compiling it took."""
    model = PerceiverAR(config_of(arguments, context), rngs=nnx.Rngs(0), compute=backend.select().compute)
    run = step_runner(model, TrainingConfig(steps=1, batch_size=1, dropout=0.0, prefix_keep=1.0))
    began = time.perf_counter()
    run()
    return run, time.perf_counter() - began


def config_of(arguments: argparse.Namespace, context: int) -> ModelConfig:
    """The sizes of the model that the arguments name."""
    sizes = dataclasses.replace(
        PRESETS["small"], layers=arguments.layers, width=arguments.width, onsets=0, retrieval_notes=0
    )
    return of_family(sizes, arguments.model, context, min(context, arguments.latents))


def of_family(sizes: ModelConfig, model: str, context: int, latents: int) -> ModelConfig:
    """The same sizes for Perceiver AR with N latents, a Transformer, or a Transformer-XL with segments of N tokens."""
    return dataclasses.replace(
        sizes,
        context=context,
        latents=latents if model == "perceiver-ar" else context,
        segment=latents if model == "transformer-xl" else 0,
    )


if __name__ == "__main__":
    main()
