"""Pieces that were not played: real ones in another mode, with other dynamics and another rubato; and `view`.

A model that reads each piece a hundred times knows it by heart, transposed and stretched or not, since those leave
every interval and every proportion as it was. What is made here sounds like piano music still, and what comes next
cannot be looked up in what was played. A model that is told how each window was made does not take it for music that
was played; what that is worth was found with pictures (Jun et al., "Distribution augmentation for generative modeling",
ICML 2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float, Int64, Integer
from scipy.signal import lfilter

from data_pipeline.augmentation.transforms import PIANO_HIGH, PIANO_LOW, retime
from music_ar.midi.performance import Performance
from music_ar.tokens.codec import decode, length_steps
from music_ar.tokens.vocabulary import (
    EVENT_CLASSES,
    NOTE_OFF,
    NOTE_ON,
    PITCHES,
    TIME_SHIFT,
    VELOCITY,
    VELOCITY_BINS,
    VOCABULARY_SIZE,
    is_velocity,
)

# How well each pitch class fits a key, from its tonic up: Krumhansl and Kessler (Psychological Review 89, 1982).
_MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
_MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)
_LONGEST_WEIGHED_S = 2.0  # of a note, for its key: a pedal held for long says no more

_MOST_LOG_CONTRAST, _MOST_RUBATO = 0.35, 0.15
_KNOT_STEPS = 100  # tempo is interpolated between knots this far apart
_RUBATO_MEMORY = 0.8  # correlation of the tempo of neighbouring knots


@dataclass(frozen=True, kw_only=True)
class Variation:
    """How a piece differs from what was played; the default is not at all.

    Attributes:
        thirds: major and minor third above the tonic change places.
        sixths: so do the sixths, and the sevenths.
        log_contrast: logarithm of the factor on each velocity's distance from their mean.
        rubato: standard deviation of the logarithm of the tempo, which wavers over some seconds.
    """

    thirds: bool = False
    sixths: bool = False
    log_contrast: float = 0.0
    rubato: float = 0.0

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Variation:
        """Another mode, each of three as often, and a contrast and a rubato, uniform."""
        mode = int(rng.integers(1, 3, endpoint=True))
        return cls(
            thirds=bool(mode & 1),
            sixths=bool(mode & 2),
            log_contrast=float(rng.uniform(-_MOST_LOG_CONTRAST, _MOST_LOG_CONTRAST)),
            rubato=float(rng.uniform(0, _MOST_RUBATO)),
        )

    def numbers(self) -> list[float]:
        """The attributes as numbers between about -1 and 1, all 0 for what was played."""
        return [
            float(self.thirds),
            float(self.sixths),
            self.log_contrast / _MOST_LOG_CONTRAST,
            self.rubato / _MOST_RUBATO,
        ]


AS_PLAYED = Variation()
VIEW_SIZE = 11 + 3 + len(fields(Variation))
"""How many numbers `view` gives."""


def vary(
    tokens: Integer[np.ndarray, " T"], variation: Variation, rng: np.random.Generator
) -> Integer[np.ndarray, " S"]:
    """A whole piece, `START`, events, `END`, as `variation` says; of the input's type.

    Args:
        tokens: a canonically encoded piece.
        variation: how to change it.
        rng: for the course of the tempo.
    """
    table = np.arange(VOCABULARY_SIZE)
    pitches = _in_mode(tonic(decode(tokens)), variation)
    table[NOTE_ON:NOTE_OFF], table[NOTE_OFF:TIME_SHIFT] = NOTE_ON + pitches, NOTE_OFF + pitches
    bins = tokens[is_velocity(tokens)].astype(np.int64) - VELOCITY
    table[VELOCITY:EVENT_CLASSES] = VELOCITY + _with_contrast(bins, math.exp(variation.log_contrast))
    knots = _wavering(length_steps(tokens), variation.rubato, rng)
    moved, _ = retime(table[tokens], lambda steps: np.floor(np.interp(steps, *knots) + 0.5).astype(np.int64))
    return moved[~_repeats(moved)].astype(tokens.dtype)


def view(semitones: int, factor: float, louder: int, variation: Variation) -> Float[np.ndarray, f" {VIEW_SIZE}"]:
    """What was done to a window as numbers of order 1, all 0 for music as it was played.

    By how many semitones it was transposed, modulo an octave (one number for each of 1 to 11) and in all, by how much
    stretched, by how many velocity bins made louder, and the numbers of the piece's variation.
    """
    away = np.zeros(12)
    away[semitones % 12] = 1
    numbers = [semitones / 6, math.log(factor) / math.log(1.1), louder / 2]
    return np.array([*away[1:], *numbers, *variation.numbers()], np.float32)


def tonic(performance: Performance) -> int:
    """The tonic's pitch class: of the 24 keys that whose profile correlates best with how long each class sounds."""
    weights = np.minimum(performance.offset_s - performance.onset_s, _LONGEST_WEIGHED_S)
    sounding = np.bincount(performance.pitch % 12, weights, minlength=12)
    profiles = np.array([np.roll(profile, key) for key in range(12) for profile in (_MAJOR, _MINOR)])
    deviations = profiles - profiles.mean(axis=1, keepdims=True)  # all 12 of a mode are as long as each other
    fit = deviations @ sounding / np.linalg.norm(deviations, axis=1)
    return int(fit.argmax()) // 2


def _in_mode(tonic: int, variation: Variation) -> Int64[np.ndarray, " 128"]:
    """What becomes of each pitch; the keys at the ends of the piano stay where they would leave it."""
    pitch = np.arange(PITCHES)
    moves = np.zeros(12, np.int64)
    for lower, swapped in ((3, variation.thirds), (8, variation.sixths), (10, variation.sixths)):
        moves[lower], moves[lower + 1] = int(swapped), -int(swapped)
    moved = pitch + moves[(pitch - tonic) % 12]
    return np.where((moved < PIANO_LOW) | (moved > PIANO_HIGH), pitch, moved)


def _with_contrast(bins: Int64[np.ndarray, " n"], factor: float) -> Int64[np.ndarray, " 32"]:
    """What becomes of each velocity bin."""
    mean = bins.mean() if len(bins) else 0.0
    spread = np.round(mean + factor * (np.arange(VELOCITY_BINS) - mean))
    return np.clip(spread, 0, VELOCITY_BINS - 1).astype(np.int64)


def _repeats(tokens: Integer[np.ndarray, " T"]) -> Bool[np.ndarray, " T"]:
    """Which tokens tell the velocity that is in force already, as louder and softer ones became one."""
    places = np.flatnonzero(is_velocity(tokens))
    repeats = np.zeros(len(tokens), bool)
    repeats[places[1:]] = np.diff(tokens[places]) == 0
    return repeats


def _wavering(
    length_steps: int, deviation: float, rng: np.random.Generator
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Times in steps as they were, and as they are where the logarithm of the tempo wavers so much."""
    knots = 2 + length_steps // _KNOT_STEPS
    fresh = math.sqrt(1 - _RUBATO_MEMORY**2) * rng.standard_normal(knots - 1)
    wave = np.asarray(lfilter([1.0], [1.0, -_RUBATO_MEMORY], fresh))
    lengths = _KNOT_STEPS * np.exp(deviation * wave)
    return np.arange(knots) * float(_KNOT_STEPS), np.concatenate([[0.0], np.cumsum(lengths)])
