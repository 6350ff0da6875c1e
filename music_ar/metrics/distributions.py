"""Distances between the feature distributions of generated and real music, with a real-vs-real baseline."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.stats import wasserstein_distance

from music_ar.metrics.memorization import melody
from music_ar.midi.performance import Performance

LAGS_S = (5, 15, 30, 60)
"""Lags of the self-similarity, in seconds."""

FEATURES = {
    "pitch class": "share of notes",
    "melodic interval": "semitones",
    "inter-onset": "s",
    "duration": "s",
    "velocity": "MIDI velocity",
    "density": "notes/s",
    "polyphony": "notes",
    "longest silence": "s",
    **{f"self-similarity, {lag} s": "cosine" for lag in LAGS_S},
}
"""The features, each with the unit of its distances."""

_BLOCK_S = 5.0  # of density and self-similarity
_HOP_S = 1.0
_POLYPHONY_STEP_S = 0.1


def features(performance: Performance) -> dict[str, Float[np.ndarray, " _"]]:
    """Measure all `FEATURES` of one performance; each yields any number of samples.

    - pitch class (0..11), duration, velocity: one sample per note;
    - melodic interval: from each note to the next, the notes of a chord from low to high;
    - inter-onset: between successive notes that do not begin together;
    - density: per block of 5 s;
    - polyphony: notes sounding (the pedal counts), every 0.1 s;
    - longest silence: one sample, within the piece;
    - self-similarity: cosine between the pitch counts (note-ons) of 5 s and of the 5 s that begin one lag later, every
      second, where both have notes.

    A feature has no samples if the performance is too short for it.
    """
    onset_s, offset_s, pitch = performance.onset_s, performance.offset_s, performance.pitch
    if not len(performance):
        return {name: np.zeros(0) for name in FEATURES}
    onset_s, offset_s = onset_s - onset_s[0], offset_s - onset_s[0]
    end_s = float(offset_s.max())
    wait_s = np.diff(onset_s)
    silence_s = onset_s[1:] - np.maximum.accumulate(offset_s)[:-1]
    times_s = np.arange(0.0, end_s, _POLYPHONY_STEP_S)
    sounding = np.searchsorted(onset_s, times_s, side="right") - np.searchsorted(
        np.sort(offset_s), times_s, side="right"
    )
    blocks = np.histogram(onset_s, np.arange(0.0, end_s + 1e-9, _BLOCK_S))[0] if end_s >= _BLOCK_S else np.zeros(0)
    samples = {
        "pitch class": pitch % 12,
        "melodic interval": np.diff(melody(performance)),
        "inter-onset": wait_s[wait_s > 0],
        "duration": offset_s - onset_s,
        "velocity": performance.velocity,
        "density": blocks / _BLOCK_S,
        "polyphony": sounding,
        "longest silence": np.array([silence_s.max(initial=0.0)]),
        **_self_similarity(onset_s, pitch, end_s),
    }
    return {name: np.asarray(values, np.float64) for name, values in samples.items()}


def _self_similarity(onset_s: np.ndarray, pitch: np.ndarray, end_s: float) -> dict[str, np.ndarray]:
    begins_s = np.arange(0.0, end_s - _BLOCK_S + 1e-9, _HOP_S)
    first, last = (np.searchsorted(onset_s, begins_s + shift_s) for shift_s in (0.0, _BLOCK_S))
    struck = np.zeros((len(onset_s) + 1, 128))
    struck[np.arange(1, len(onset_s) + 1), pitch] = 1
    struck = struck.cumsum(axis=0)
    counts = struck[last] - struck[first]
    length = np.linalg.norm(counts, axis=1)
    found = {}
    for lag in LAGS_S:
        hops = round(lag / _HOP_S)
        early, late = slice(0, max(len(counts) - hops, 0)), slice(hops, None)
        both = length[early] * length[late]
        found[f"self-similarity, {lag} s"] = (counts[early] * counts[late]).sum(axis=1)[both > 0] / both[both > 0]
    return found


def distance(name: str, first: Float[np.ndarray, " a"], second: Float[np.ndarray, " b"]) -> float:
    """Compute the 1-Wasserstein distance between two samples of a feature, in the feature's unit.

    It needs no bins. Pitch classes are unordered: any two are 1 apart, which gives the total variation distance.
    """
    if name == "pitch class":
        shares = [np.bincount(sample.astype(int), minlength=12) / len(sample) for sample in (first, second)]
        return float(np.abs(shares[0] - shares[1]).sum() / 2)
    return float(wasserstein_distance(first, second))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Distance between generated and real music in one feature.

    Attributes:
        distance: from generated to real pieces.
        baseline: from the same number of real pieces to the same other real pieces.
        baseline_max: the largest baseline over all draws.
        unit: of all three.
    """

    distance: float
    baseline: float
    baseline_max: float
    unit: str

    @property
    def ratio(self) -> float:
        """Distance over baseline: 1 if generated pieces are as close to real ones as real ones are to each other.

        Infinite if the baseline is 0 and the distance is not.
        """
        if self.baseline:
            return self.distance / self.baseline
        return math.inf if self.distance else 1.0


def compare(
    generated: Sequence[Performance], real: Sequence[Performance], *, draws: int = 50, seed: int = 0
) -> dict[str, Comparison]:
    """Compare generated with real pieces, feature by feature; samples are pooled over the pieces of a side.

    Each draw splits the real pieces at random into two sides. The baseline is the distance from the first side to the
    second. The distance is measured to the second side too, from as many generated pieces as the first side has. Both
    are averaged over the draws. A small sample is thus compared with a baseline of equally few pieces.

    Args:
        generated: at least one piece.
        real: at least two pieces, of the same length as the generated ones.
        draws: number of draws.
        seed: random seed of the draws.

    Returns:
        The comparison of each feature for which both sides have samples.

    Raises:
        ValueError: there are too few pieces.
    """
    if not generated or len(real) < 2:
        raise ValueError(f"expected at least 1 generated and 2 real pieces, got {len(generated)} and {len(real)}")
    generated_features, real_features = [features(piece) for piece in generated], [features(piece) for piece in real]
    count = min(len(generated), len(real) // 2)
    random = np.random.default_rng(seed)
    distances: dict[str, list[tuple[float, float]]] = {name: [] for name in FEATURES}
    for _ in range(draws):
        order, chosen = random.permutation(len(real)), random.permutation(len(generated))[:count]
        first, second = np.split(order, [count])
        for name, pairs in distances.items():
            ours = np.concatenate([generated_features[number][name] for number in chosen])
            side, other = (np.concatenate([real_features[number][name] for number in part]) for part in (first, second))
            if min(len(ours), len(side), len(other)):
                pairs.append((distance(name, ours, other), distance(name, side, other)))
    return {
        name: Comparison(
            distance=float(np.mean([to_real for to_real, _ in pairs])),
            baseline=float(np.mean([baseline for _, baseline in pairs])),
            baseline_max=max(baseline for _, baseline in pairs),
            unit=FEATURES[name],
        )
        for name, pairs in distances.items()
        if pairs
    }
