"""Measure the loader alone: training windows and target tokens per second, for several numbers of threads.

    python benchmarks/loader.py data/maestro [--context 4096] [--latents 2048] [--batch-size 32]

Prints a table and, as the last line, JSON. Runs on the CPU only. For comparison: a training step on one H100 consumes
about 1.2 million targets per second (benchmarks/train_step.py).
"""

import argparse
import itertools
import json
import os
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_pipeline.augmentation.transforms import Augmentation
from data_pipeline.dataset import Pieces
from data_pipeline.loader import LoaderConfig, batches
from data_pipeline.windows import Windows

GOAL = 1_000_000  # target tokens per second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="dataset written by `music-ar prepare`")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--latents", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=4.0, help="duration of the measurement of each row")
    arguments = parser.parse_args()

    start = time.perf_counter()
    pieces = Pieces.open(arguments.data, "train")
    opening_s = time.perf_counter() - start
    rows = [
        {"augmented": augmented, "threads": threads, **measure(pieces, augmented, threads, arguments)}
        for augmented, threads in itertools.product((False, True), (0, 1, 2, 4))
    ]
    table = Table("augmented", "threads", "windows/s", "targets/s", "CPU cores used")
    for row in rows:
        table.add_row(
            "yes" if row["augmented"] else "no",
            str(row["threads"]),
            f"{row['windows_per_s']:,}",
            f"{row['targets_per_s']:,}",
            f"{row['cores']:.2f}",
        )
    console = Console()
    console.print(table)
    best = max(row["targets_per_s"] for row in rows if row["augmented"])
    verdict = "reaches" if best >= GOAL else "does not reach"
    windows = Windows(pieces=pieces, context=arguments.context, latents=arguments.latents, seed=0, augmentation=None)
    overlap = len(windows) * arguments.latents / pieces.targets - 1
    console.print(
        f"{len(pieces)} pieces opened and checked in {opening_s:.2f} s; {len(windows):,} windows per epoch, "
        f"{overlap:.1%} of the targets twice\n"
        f"with augmentation, the loader {verdict} {GOAL:,} targets/s"
    )
    print(json.dumps({"benchmark": "loader", "opening_s": round(opening_s, 2), "best": best, "rows": rows}))


def measure(pieces: Pieces, augmented: bool, threads: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Rates over `arguments.seconds`, after the first batches; CPU time includes all threads."""
    config = LoaderConfig(
        context=arguments.context,
        latents=arguments.latents,
        batch_size=arguments.batch_size,
        seed=0,
        augmentation=Augmentation() if augmented else None,
        threads=threads,
    )
    iterator = batches(pieces, config=config)
    # The buffer is full when the clock starts, and full again when it stops.
    for _ in range(4 * threads + 1):
        next(iterator)
    count, cpu, start = 0, os.times(), time.perf_counter()
    while (seconds := time.perf_counter() - start) < arguments.seconds:
        next(iterator)
        count += 1
    used = os.times()
    windows = count * arguments.batch_size / seconds
    return {
        "windows_per_s": round(windows),
        "targets_per_s": round(windows * arguments.latents),
        "cores": round((used.user + used.system - cpu.user - cpu.system) / seconds, 2),
    }


if __name__ == "__main__":
    main()
