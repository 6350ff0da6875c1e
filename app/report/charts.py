"""Charts of a report. Needs matplotlib, which comes with the extra `plot`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.console import CommandError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REAL, GENERATED = "tab:gray", "tab:blue"


def blank(width: float, height: float) -> "Figure":
    """A figure to draw on, in inches.

    Raises:
        CommandError: matplotlib is missing.
    """
    try:
        from matplotlib import figure  # not pyplot: that would look for a screen
    except ImportError as error:
        raise CommandError(
            f"a picture needs matplotlib ({error}): install the extra, pip install 'music-ar[plot]'"
        ) from error
    return figure.Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", picture: Path) -> None:
    """Writes PNG, SVG or PDF, by the ending; makes the folder."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def draw_curves(latents: Mapping[int, float], contexts: Mapping[int, float], picture: Path) -> None:
    """Nats a token against latents and against context."""
    figure = blank(9, 3.4)
    axes: Any = figure.subplots(1, 2)
    for axis, curve, label in zip(axes, (latents, contexts), ("latents", "context, tokens"), strict=True):
        axis.plot(list(curve), list(curve.values()), marker="o", color=GENERATED)
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(curve), [f"{size:,}" for size in curve])
        axis.minorticks_off()
        axis.set(xlabel=label, ylabel="nats a token")
        axis.grid(linewidth=0.3)
    save(figure, picture)


def draw_recall(natural: Sequence[Mapping[str, Any]], planted: Sequence[Mapping[str, Any]], picture: Path) -> None:
    """Nats a note by how far back its place occurred, a line a context; nats a token of themes heard before and not."""
    figure = blank(9, 3.4)
    axes: Any = figure.subplots(1, 2)
    for context in natural[0]["pitch_nats"]:
        axes[0].plot([row["pitch_nats"][context] for row in natural], marker="o", label=f"context {int(context):,}")
    axes[0].set_xticks(range(len(natural)), [row["tokens_ago"] for row in natural], fontsize=8)
    axes[0].set(xlabel="tokens since its place occurred", ylabel="nats a note-on")
    distances = [f"{row['distance']:,}" for row in planted]
    axes[1].plot(distances, [row["unheard"] for row in planted], marker="o", color=REAL, label="not heard before")
    axes[1].plot(distances, [row["heard"] for row in planted], marker="o", color=GENERATED, label="heard before")
    axes[1].set(xlabel="tokens between", ylabel="nats a token of a theme")
    for axis in axes:
        axis.grid(linewidth=0.3)
        axis.legend(fontsize=8)
    save(figure, picture)


def draw_distributions(
    generated: Mapping[str, np.ndarray], real: Mapping[str, np.ndarray], units: Mapping[str, str], picture: Path
) -> None:
    """Histograms of every figure, generated over real, each of area 1; the outermost 1 % is cut off."""
    names = [name for name in units if len(generated[name]) and len(real[name])]
    rows = -(-len(names) // 4)
    figure = blank(13, 2.4 * rows)
    axes: Any = figure.subplots(rows, 4, squeeze=False).ravel()
    for axis in axes[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes, names, strict=False):
        low, high = np.percentile(np.concatenate([generated[name], real[name]]), [0.5, 99.5])
        whole = name in ("pitch class", "melodic interval", "velocity", "polyphony")
        bins = (
            np.arange(low - 0.5, high + 1) if whole and high - low < 60 else np.linspace(low, max(high, low + 1e-3), 40)
        )
        axis.hist(real[name], bins, density=True, color=REAL, alpha=0.6, label="real")
        axis.hist(
            generated[name], bins, density=True, histtype="step", color=GENERATED, linewidth=1.4, label="generated"
        )
        axis.set_title(name, loc="left", fontsize=9)
        axis.set_xlabel("" if name == "pitch class" else units[name], fontsize=8)
        axis.set_yticks([])
        axis.tick_params(labelsize=8)
    axes[0].legend(fontsize=8)
    save(figure, picture)


def draw_runs(generated: Sequence[int], real: Sequence[int], picture: Path) -> None:
    """How many notes of each piece stand in a row in the training set: share of pieces with at least so many."""
    figure = blank(6, 3.2)
    axis: Any = figure.subplots()
    for runs, color, label in ((real, REAL, "real"), (generated, GENERATED, "generated")):
        falling = np.sort(runs)[::-1]
        axis.step(falling, np.arange(1, len(falling) + 1) / len(falling), where="post", color=color, label=label)
    axis.set(
        xlabel="longest run of notes found in the training set, all notes", ylabel="share of pieces", ylim=(0, 1.02)
    )
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=8)
    save(figure, picture)
