"""Times the loader alone: training windows a second, and target tokens a second, for several numbers of threads.

    python benchmarks/loader.py data/maestro [--context 4096] [--latents 2048] [--batch-size 32]

Prints a table and, last, one line of JSON. A training step on one H100 takes about 1.2 million targets a second
(benchmarks/train_step.py); nothing here touches a device.
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
from data_pipeline.loader import Pieces, batches, windows_per_epoch

GOAL = 1_000_000  # target tokens a second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a prepared folder")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--latents", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each row")
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
    epoch = windows_per_epoch(pieces, latents=arguments.latents)
    console.print(
        f"{len(pieces)} pieces opened and checked in {opening_s:.2f} s; {epoch:,} windows an epoch, "
        f"{epoch * arguments.latents / pieces.targets - 1:.1%} of their targets seen twice\n"
        f"augmented, it {verdict} {GOAL:,} targets/s"
    )
    print(json.dumps({"benchmark": "loader", "opening_s": round(opening_s, 2), "best": best, "rows": rows}))


def measure(pieces: Pieces, augmented: bool, threads: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Rates over `arguments.seconds` after the first batches; CPU time includes all threads."""
    iterator = batches(
        pieces,
        context=arguments.context,
        latents=arguments.latents,
        batch_size=arguments.batch_size,
        seed=0,
        augmentation=Augmentation() if augmented else None,
        threads=threads,
    )
    # The buffer that fills before the clock starts is made up for by the one that is full when it stops.
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
