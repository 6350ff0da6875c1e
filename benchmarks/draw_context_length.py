"""Draw training speed against context and against depth, from what `context_length.py --output` wrote.

    python benchmarks/draw_context_length.py docs/results/context-length.jsonl --picture docs/images/context-length.png

Lines with several contexts make the left chart; those with one, at several depths, the right one.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

NAMES = {"perceiver-ar": "Perceiver AR", "transformer": "Transformer", "transformer-xl": "Transformer-XL"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", type=Path, help="file of JSON lines")
    parser.add_argument("--picture", type=Path, required=True, help="PNG file to write")
    arguments = parser.parse_args()

    lines = [json.loads(line) for line in arguments.series.read_text(encoding="utf-8").splitlines()]
    by_context = {
        line["model"]: [(row["context"], row["step_ms"]) for row in line["results"]]
        for line in lines
        if len(line["results"]) > 1
    }
    by_depth: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in lines:
        if len(line["results"]) == 1:
            by_depth[line["model"]].append((line["layers"], line["results"][0]["step_ms"]))
    context = next(line["results"][0]["context"] for line in lines if len(line["results"]) == 1)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    draw(left, by_context, "context, tokens (6 layers)")
    draw(right, by_depth, f"self-attention layers (context {context:,})")
    left.legend(fontsize=9)
    figure.suptitle(f"Training steps per second, one {lines[0]['device']}", fontsize=11)
    figure.savefig(arguments.picture, dpi=110)


def draw(axis: Any, series: dict[str, list[tuple[int, float]]], label: str) -> None:
    """Plot steps per second, a line per model, both axes logarithmic."""
    for model, name in NAMES.items():
        sizes, step_ms = zip(*sorted(series[model]), strict=True)
        axis.plot(sizes, [1000 / milliseconds for milliseconds in step_ms], marker="o", label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({size for points in series.values() for size, _ in points})
    axis.set_xticks(ticks, [f"{tick // 1024}k" if tick >= 1024 else str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set(xlabel=label, ylabel="training steps per second")
    axis.grid(linewidth=0.3)


if __name__ == "__main__":
    main()
