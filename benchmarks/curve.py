"""Draws what a latent budget costs and gives: tokens a second against likelihood, a point a budget.

    music-ar bench decode --data data/maestro --latents 64 256 512 1024 2048 --tokens 1024 --output curve.json
    python benchmarks/curve.py curve.json --picture docs/curve.png

Takes any number of such files, of different machines for example: each device, mode and batch is a line.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", type=Path, nargs="+", help="files that `music-ar bench decode --output` wrote")
    parser.add_argument("--picture", type=Path, required=True, help="PNG file to write")
    arguments = parser.parse_args()

    lines: dict[tuple[str, str, int], list[dict]] = defaultdict(list)
    for path in arguments.curves:
        curve = json.loads(path.read_text(encoding="utf-8"))
        for row in curve["rows"]:
            if row["nats_per_token"] is not None:
                lines[curve["device"], row["mode"], row["batch"]].append(row)
    if not lines:
        parser.error("no row has a likelihood: run `music-ar bench decode` with --data")

    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (device, mode, batch), rows in sorted(lines.items()):
        rows.sort(key=lambda row: row["latents"])
        speeds, nats = [row["tokens_per_s"] for row in rows], [row["nats_per_token"] for row in rows]
        axis.plot(speeds, nats, marker="o", label=f"{device}, {mode}, {batch} at once")
        for row, speed, loss in zip(rows, speeds, nats, strict=True):
            axis.annotate(str(row["latents"]), (speed, loss), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axis.set(xlabel="tokens a second", ylabel="nats a token, real music through the decoder")
    axis.set_title("Latent budget: speed against coherence", loc="left", fontsize=10)
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=8)
    figure.savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
