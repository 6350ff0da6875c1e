"""Piano rolls as pictures. Needs matplotlib, which comes with the extra `plot`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.report.charts import blank, save

if TYPE_CHECKING:
    from music_ar.midi.performance import Performance


def draw(rolls: "Sequence[tuple[str, Performance]]", picture: Path, *, seconds: float | None = None) -> None:
    """Draws piano rolls, one below the other, on one scale of time; darker is louder.

    Args:
        rolls: a title and a performance each.
        picture: PNG, SVG or PDF file to write, by its ending.
        seconds: how much of each; by default as much as the longest has.

    Raises:
        CommandError: matplotlib is missing.
        OSError: the picture cannot be written.
    """
    end_s = max(piece.duration_s for _, piece in rolls) if seconds is None else seconds
    figure = blank(12, 2.1 * len(rolls) + 0.3)
    from matplotlib import colormaps  # it is there, as `blank` found out

    axes: Any = figure.subplots(len(rolls), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, piece) in zip(axes, rolls, strict=True):
        colors = colormaps["viridis_r"](piece.velocity / 127)
        axis.barh(piece.pitch, piece.offset_s - piece.onset_s, left=piece.onset_s, height=1.0, color=colors)
        axis.set(ylim=(20, 109), yticks=range(24, 109, 12), ylabel="MIDI pitch", xlim=(0, end_s))
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(axis="y", linewidth=0.3)
    axes[-1].set_xlabel("seconds")
    save(figure, picture)
