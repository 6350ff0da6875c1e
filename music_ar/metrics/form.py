"""How a continuation holds to its prompt over minutes: notes that return, and texture."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import wasserstein_distance

from music_ar.metrics.memorization import melody
from music_ar.midi.performance import Performance

RUN_NOTES = 6
"""Consecutive notes with the same intervals that make a return."""

_WINDOW_S = 5.0
_STEP = 2  # semitones from one note of a scale to the next, at most


def returning_share(prompt: Performance, later: Performance) -> float:
    """Return the share of the notes of `later` that lie in runs of `RUN_NOTES` or more notes of the prompt.

    Runs are compared by their intervals, so in any key and rhythm; the notes of a chord go from low to high. Trills,
    tremolos and scales do not count: they return everywhere. Broken chords do.
    """
    if not len(later):
        return 0.0
    known = {run.tobytes() for run in _runs(prompt) if not _is_figure(run)}
    inside = np.zeros(len(later), bool)
    for first, run in enumerate(_runs(later)):
        if run.tobytes() in known:
            inside[first : first + RUN_NOTES] = True
    return float(inside.mean())


def _runs(performance: Performance) -> np.ndarray:
    """Return the intervals of each run of `RUN_NOTES` notes, [runs, RUN_NOTES - 1]."""
    intervals = np.diff(melody(performance))
    if len(intervals) < RUN_NOTES - 1:
        return np.zeros((0, RUN_NOTES - 1), np.int64)
    return np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(intervals, RUN_NOTES - 1), np.int64)


def _is_figure(intervals: np.ndarray) -> bool:
    """Whether a run repeats one or two intervals, or goes up or down by steps."""
    one_way = (intervals > 0).all() or (intervals < 0).all()
    by_steps = one_way and (np.abs(intervals) <= _STEP).all()
    return bool(by_steps or (intervals[2:] == intervals[:-2]).all())


class Texture(NamedTuple):
    """Texture in windows of 5 s.

    Attributes:
        density: notes a second.
        register: mean pitch, in semitones; of windows with notes.
        polyphony: mean number of notes that sound.
    """

    density: Float[np.ndarray, " w"]
    register: Float[np.ndarray, " _"]
    polyphony: Float[np.ndarray, " w"]


def texture(performance: Performance, start_s: int | float, stop_s: int | float) -> Texture:
    """Measure the texture between two times."""
    edges_s = np.arange(start_s, stop_s + 1e-9, _WINDOW_S)
    count = np.histogram(performance.onset_s, edges_s)[0]
    pitch_sum = np.histogram(performance.onset_s, edges_s, weights=performance.pitch)[0]
    begins, ends = (
        np.maximum(performance.onset_s[:, None], edges_s[:-1]),
        np.minimum(performance.offset_s[:, None], edges_s[1:]),
    )
    return Texture(
        density=count / _WINDOW_S,
        register=pitch_sum[count > 0] / count[count > 0],
        polyphony=np.maximum(ends - begins, 0).sum(axis=0) / _WINDOW_S,
    )


def texture_distances(prompt: Texture, later: Texture) -> dict[str, float | None]:
    """Return the Wasserstein distance of each part of the texture, in its unit; None where there are no notes."""
    return {
        name: float(wasserstein_distance(ours, theirs)) if len(ours) and len(theirs) else None
        for name, ours, theirs in zip(Texture._fields, prompt, later, strict=True)
    }
