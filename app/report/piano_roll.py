"""Piano rolls as images. Matplotlib comes with the extra `plot`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.report.charts import new_figure, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from music_ar.midi.performance import Performance


def draw(rolls: "Sequence[tuple[str, Performance]]", picture: Path, *, seconds: float | None = None) -> None:
    """Draw piano rolls into a file.

    Args:
        rolls: as in `piano_rolls`.
        picture: file to write; its extension chooses PNG, SVG or PDF.
        seconds: as in `piano_rolls`.

    Raises:
        CommandError: Matplotlib is not installed.
        OSError: the picture cannot be written.
    """
    save(piano_rolls(rolls, seconds=seconds), picture)


def piano_rolls(rolls: "Sequence[tuple[str, Performance]]", *, seconds: float | None = None) -> "Figure":
    """Piano rolls, one below the other, with a common time axis; darker notes are louder.

    Args:
        rolls: titles and performances.
        seconds: length of the time axis; default: the longest performance.

    Raises:
        CommandError: Matplotlib is not installed.
    """
    end_s = max(piece.duration_s for _, piece in rolls) if seconds is None else seconds
    figure = new_figure(12, 2.1 * len(rolls) + 0.3)
    from matplotlib import colormaps  # installed, or `new_figure` would have raised

    axes: Any = figure.subplots(len(rolls), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, piece) in zip(axes, rolls, strict=True):
        colors = colormaps["viridis_r"](piece.velocity / 127)
        axis.barh(piece.pitch, piece.offset_s - piece.onset_s, left=piece.onset_s, height=1.0, color=colors)
        axis.set(ylim=(20, 109), yticks=range(24, 109, 12), ylabel="MIDI pitch", xlim=(0, end_s))
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(axis="y", linewidth=0.3)
    axes[-1].set_xlabel("seconds")
    return figure
