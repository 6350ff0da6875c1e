"""Generated music beside real music: how far apart the two are, in units of how far apart real pieces are."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.stats import wasserstein_distance

from music_ar.metrics.memorization import melody
from music_ar.midi.performance import Performance

LAGS_S = (5, 15, 30, 60)
"""Lags at which music is compared with itself, in seconds."""

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
"""Each figure with the unit of its distances."""

_BLOCK_S = 5.0  # what density and self-similarity are counted over
_HOP_S = 1.0
_POLYPHONY_STEP_S = 0.1


def features(performance: Performance) -> dict[str, Float[np.ndarray, " _"]]:
    """Samples of every figure of `FEATURES` from one performance.

    pitch class 0..11, duration and velocity: one a note. Melodic interval: from each note to the next, a chord taken
    from the lowest note up. Inter-onset: between notes that do not begin together. Density: in blocks of 5 s.
    Polyphony: notes sounding (the pedal counts), every 0.1 s. Longest silence: one, within the piece. Self-similarity:
    the cosine between how often each pitch begins in 5 s and in the 5 s that begin a lag later, every second, where
    both have notes.

    A figure that the performance is too short for has no samples.
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
    found = {
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
    return {name: np.asarray(samples, np.float64) for name, samples in found.items()}


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
    """The 1-Wasserstein distance between the distributions of two samples, in the figure's unit.

    It needs no bins, and its unit is the figure's: the least work of moving the one distribution onto the other. Pitch
    classes have no order; every two of them count as 1 apart, which makes it the total variation distance.
    """
    if name == "pitch class":
        shares = [np.bincount(sample.astype(int), minlength=12) / len(sample) for sample in (first, second)]
        return float(np.abs(shares[0] - shares[1]).sum() / 2)
    return float(wasserstein_distance(first, second))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far generated music is from real music in one figure.

    Attributes:
        distance: from generated to real pieces.
        yardstick: from as many real pieces to the same other real ones.
        yardstick_most: the same, in the draw where it was largest.
        unit: of all three.
    """

    distance: float
    yardstick: float
    yardstick_most: float
    unit: str

    @property
    def ratio(self) -> float:
        """1 if generated pieces are as near to real ones as other real ones are; infinite if those are all alike."""
        return self.distance / self.yardstick if self.yardstick else float("inf") if self.distance else 1.0


def compare(
    generated: Sequence[Performance], real: Sequence[Performance], *, draws: int = 50, seed: int = 0
) -> dict[str, Comparison]:
    """Sets generated pieces beside real ones, figure by figure; notes of all pieces of a side are pooled.

    In each draw the real pieces are dealt to two sides. The yardstick is the distance between the two; the distance is
    that of as many generated pieces as the first side has to the second side. Both are averaged over the draws. So
    few pieces, whose figures are a matter of luck, are held to a yardstick of equally few.

    Args:
        generated: at least one.
        real: at least two, as long as the generated ones.
        draws: how often.
        seed: other draws.

    Returns:
        Figure -> comparison; without the figures that either side has no samples of.

    Raises:
        ValueError: there are too few pieces.
    """
    if not generated or len(real) < 2:
        raise ValueError(f"expected a generated and two real pieces, got {len(generated)} and {len(real)}")
    ours, theirs = [features(piece) for piece in generated], [features(piece) for piece in real]
    count = min(len(generated), len(real) // 2)
    random = np.random.default_rng(seed)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in FEATURES}
    for _ in range(draws):
        order, chosen = random.permutation(len(real)), random.permutation(len(generated))[:count]
        for name, pairs in found.items():
            made = np.concatenate([ours[number][name] for number in chosen])
            side, other = (np.concatenate([theirs[n][name] for n in part]) for part in np.split(order, [count]))
            if min(len(made), len(side), len(other)):
                pairs.append((distance(name, made, other), distance(name, side, other)))
    return {
        name: Comparison(
            distance=float(np.mean([far for far, _ in pairs])),
            yardstick=float(np.mean([usual for _, usual in pairs])),
            yardstick_most=max(usual for _, usual in pairs),
            unit=FEATURES[name],
        )
        for name, pairs in found.items()
        if pairs
    }
