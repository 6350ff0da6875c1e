"""The charts of a report, as Matplotlib figures. Matplotlib comes with the extra `plot`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.console import CommandError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REAL, GENERATED = "tab:gray", "tab:blue"
# Features with integer values: one bin per value if their range is small.
_WHOLE = ("pitch class", "melodic interval", "velocity", "polyphony")


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure; sizes in inches.

    Raises:
        CommandError: Matplotlib is not installed.
    """
    try:
        from matplotlib import figure  # not pyplot, which would look for a display
    except ImportError as error:
        raise CommandError(f"charts need Matplotlib ({error}): pip install '.[plot]'") from error
    return figure.Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, SVG or PDF, by the file's extension; create the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def curves(latents: Mapping[int, float], contexts: Mapping[int, float]) -> "Figure":
    """NLL per token against the number of latents (left) and the context length (right)."""
    figure = new_figure(9, 3.4)
    axes: Any = figure.subplots(1, 2)
    for axis, curve, label in zip(axes, (latents, contexts), ("latents", "context, tokens"), strict=True):
        axis.plot(list(curve), list(curve.values()), marker="o", color=GENERATED)
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(curve), [f"{size:,}" for size in curve])
        axis.minorticks_off()
        axis.set(xlabel=label, ylabel="NLL, nats per token")
        axis.grid(linewidth=0.3)
    return figure


def retrieval(natural: Sequence[Mapping[str, Any]], planted: Sequence[Mapping[str, Any]]) -> "Figure":
    """NLL of notes by how far back the music repeats (left, a line per context); NLL of planted motifs (right).

    Args:
        natural: rows of `natural_recall` in a report.
        planted: rows of `planted_recall` in a report.
    """
    figure = new_figure(9, 3.4)
    axes: Any = figure.subplots(1, 2)
    for context in natural[0]["pitch_nats"]:
        axes[0].plot([row["pitch_nats"][context] for row in natural], marker="o", label=f"context {int(context):,}")
    axes[0].set_xticks(range(len(natural)), [row["tokens_ago"] for row in natural], fontsize=8)
    axes[0].set(xlabel="tokens since the same six pitches", ylabel="NLL, nats per note-on")
    distances = [f"{row['distance']:,}" for row in planted]
    axes[1].plot(distances, [row["unheard"] for row in planted], marker="o", color=REAL, label="did not occur before")
    axes[1].plot(distances, [row["heard"] for row in planted], marker="o", color=GENERATED, label="occurred before")
    axes[1].set(xlabel="tokens in between", ylabel="NLL of a motif, nats per token")
    for axis in axes:
        axis.grid(linewidth=0.3)
        axis.legend(fontsize=8)
    return figure


def distributions(
    generated: Mapping[str, np.ndarray], real: Mapping[str, np.ndarray], units: Mapping[str, str]
) -> "Figure":
    """A histogram per feature, generated over real, each of area 1.

    Args:
        generated, real: samples of each feature, pooled over all pieces.
        units: unit of each feature to draw, in this order.
    """
    names = [name for name in units if len(generated[name]) and len(real[name])]
    rows = -(-len(names) // 4)
    figure = new_figure(13, 2.4 * rows)
    axes: Any = figure.subplots(rows, 4, squeeze=False).ravel()
    for axis in axes[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes, names, strict=False):
        bins = _bins(name, np.concatenate([generated[name], real[name]]))
        axis.hist(real[name], bins, density=True, color=REAL, alpha=0.6, label="real")
        axis.hist(
            generated[name], bins, density=True, histtype="step", color=GENERATED, linewidth=1.4, label="generated"
        )
        axis.set_title(name, loc="left", fontsize=9)
        axis.set_xlabel("" if name == "pitch class" else units[name], fontsize=8)
        axis.set_yticks([])
        axis.tick_params(labelsize=8)
    axes[0].legend(fontsize=8)
    return figure


def _bins(name: str, samples: np.ndarray) -> np.ndarray:
    """Edges of a histogram's bins, without the outermost 1 % of the samples."""
    low, high = np.percentile(samples, [0.5, 99.5])
    if name in _WHOLE and high - low < 60:
        return np.arange(low - 0.5, high + 1)
    return np.linspace(low, max(high, low + 1e-3), 40)


def shared_runs(generated: Sequence[int], real: Sequence[int]) -> "Figure":
    """Share of pieces whose longest run of notes shared with the training split is at least this long."""
    figure = new_figure(6, 3.2)
    axis: Any = figure.subplots()
    for runs, color, label in ((real, REAL, "real"), (generated, GENERATED, "generated")):
        falling = np.sort(runs)[::-1]
        axis.step(falling, np.arange(1, len(falling) + 1) / len(falling), where="post", color=color, label=label)
    axis.set(xlabel="longest run shared with the training split, notes", ylabel="share of pieces", ylim=(0, 1.02))
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=8)
    return figure
