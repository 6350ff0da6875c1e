"""Plot what a budget trades: tokens per second against NLL, with a point per number of latents.

    music-ar bench decode --data data/maestro --latents 64 256 512 1024 2048 --tokens 1024 --output curve.json
    python benchmarks/curve.py curve.json --picture docs/images/curve.png

Takes any number of such files, for example from different machines. Each device has its own axes, with a line per
batch size and depth.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", type=Path, nargs="+", help="files that `music-ar bench decode --output` wrote")
    parser.add_argument("--picture", type=Path, required=True, help="PNG file to write")
    arguments = parser.parse_args()

    lines: dict[str, dict[tuple[int, int, float], list[dict]]] = defaultdict(lambda: defaultdict(list))
    for path in arguments.curves:
        curve = json.loads(path.read_text(encoding="utf-8"))
        for row in curve["rows"]:
            if row["nats_per_token"] is not None:
                line = row["batch"], row.get("layers", 0), row.get("tolerance", 0.0)
                lines[curve["device"]][line].append(row)
    if not lines:
        parser.error("expected rows with an NLL, found none: run `music-ar bench decode` with --data")

    size = {"figsize": (1.5 + 5.5 * len(lines), 4.2), "layout": "constrained"}
    figure, axes = plt.subplots(1, len(lines), sharey=True, squeeze=False, **size)
    for axis, (device, of_device) in zip(axes[0], lines.items(), strict=True):
        depths = {line[1:] for line in of_device}
        for (batch, layers, tolerance), rows in sorted(of_device.items()):
            depth = f", {layers} layers" if not tolerance else f", exits below {tolerance:g} nats"
            draw(axis, rows, f"{batch} at once" + depth * (len(depths) > 1))
        axis.set_title(device, loc="left", fontsize=10)
        axis.set_xlabel("tokens per second")
        axis.locator_params(axis="x", nbins=6)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.margins(0.1)
        axis.grid(linewidth=0.3)
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("NLL of real music through the decoder, nats per token")
    figure.suptitle("Budget: speed and likelihood", fontsize=11)
    figure.savefig(arguments.picture, dpi=110)


def draw(axis: Axes, rows: list[dict], label: str) -> None:
    """Plot one line, with a point per number of latents."""
    rows = sorted(rows, key=lambda row: row["latents"])
    speeds, nats = [row["tokens_per_s"] for row in rows], [row["nats_per_token"] for row in rows]
    axis.plot(speeds, nats, marker="o", label=label)
    for row, speed, loss in zip(rows, speeds, nats, strict=True):
        axis.annotate(str(row["latents"]), (speed, loss), textcoords="offset points", xytext=(6, 4), fontsize=8)


if __name__ == "__main__":
    main()
