"""Augmented copies of whole pieces: parallel mode, dynamics and rubato; and labels to condition a model on them.

A model that reads each piece a hundred times memorizes it. Transposition and stretching do not prevent that, because
they keep every interval and every proportion. An augmented copy still sounds like piano music, but its continuation is
not the one that was memorized. A model conditioned on the augmentation label does not mistake copies for real
performances (Jun et al., "Distribution Augmentation for Generative Modeling", ICML 2020).
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

# How well each pitch class fits a key, from the tonic up: Krumhansl and Kessler (Psychological Review 89, 1982).
_MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
_MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)
_MAX_KEY_WEIGHT_S = 2.0  # of one note: holding a note longer says no more about the key

_MAX_LOG_CONTRAST, _MAX_RUBATO = 0.35, 0.15
_KNOT_STEPS = 100  # the tempo is interpolated between knots at this distance
_RUBATO_CORRELATION = 0.8  # of the tempo at neighboring knots


@dataclass(frozen=True, kw_only=True)
class PieceAugmentation:
    """How an augmented copy differs from the recorded performance; by default, not at all.

    Attributes:
        swap_thirds: swap the major and the minor third above the tonic.
        swap_sixths: swap the major and minor sixths, and the sevenths.
        log_contrast: logarithm of the factor on each velocity's distance from the mean.
        rubato: standard deviation of the logarithm of the tempo, which drifts over a few seconds.
    """

    swap_thirds: bool = False
    swap_sixths: bool = False
    log_contrast: float = 0.0
    rubato: float = 0.0

    @classmethod
    def draw(cls, rng: np.random.Generator) -> PieceAugmentation:
        """Draw one of the three other modes, each with equal probability, and a uniform contrast and rubato."""
        mode = int(rng.integers(1, 3, endpoint=True))
        return cls(
            swap_thirds=bool(mode & 1),
            swap_sixths=bool(mode & 2),
            log_contrast=float(rng.uniform(-_MAX_LOG_CONTRAST, _MAX_LOG_CONTRAST)),
            rubato=float(rng.uniform(0, _MAX_RUBATO)),
        )

    def label(self) -> tuple[float, float, float, float]:
        """The attributes as numbers from -1 to 1, all 0 for a recorded performance."""
        return (
            float(self.swap_thirds),
            float(self.swap_sixths),
            self.log_contrast / _MAX_LOG_CONTRAST,
            self.rubato / _MAX_RUBATO,
        )


ORIGINAL = PieceAugmentation()
LABEL_SIZE = 11 + 3 + len(fields(PieceAugmentation))
"""Length of `augmentation_label`."""


def augmented_copy(
    tokens: Integer[np.ndarray, " T"], augmentation: PieceAugmentation, rng: np.random.Generator
) -> Integer[np.ndarray, " S"]:
    """Copy a piece, with a different mode, dynamics and rubato.

    Args:
        tokens: a canonically encoded piece: START, events, END.
        augmentation: what to change.
        rng: draws the tempo curve.

    Returns:
        The tokens of the copy, in the input's type.
    """
    table = np.arange(VOCABULARY_SIZE)
    pitches = _pitches_in_mode(tonic(decode(tokens)), augmentation)
    table[NOTE_ON:NOTE_OFF], table[NOTE_OFF:TIME_SHIFT] = NOTE_ON + pitches, NOTE_OFF + pitches
    bins = tokens[is_velocity(tokens)].astype(np.int64) - VELOCITY
    table[VELOCITY:EVENT_CLASSES] = VELOCITY + _bins_with_contrast(bins, math.exp(augmentation.log_contrast))
    curve = _tempo_curve(length_steps(tokens), augmentation.rubato, rng)
    moved, _ = retime(table[tokens], lambda steps: np.floor(np.interp(steps, *curve) + 0.5).astype(np.int64))
    return moved[~_is_repeated_velocity(moved)].astype(tokens.dtype)


def augmentation_label(
    semitones: int, factor: float, velocity_bins: int, augmentation: PieceAugmentation
) -> Float[np.ndarray, f" {LABEL_SIZE}"]:
    """How a window was augmented, as numbers of order 1, all 0 for the recorded performance.

    In order: the transposition modulo an octave (one-hot for 1 to 11 semitones), the transposition, the time stretch,
    the velocity shift, and the label of the piece's own augmentation.
    """
    pitch_class = np.zeros(12)
    pitch_class[semitones % 12] = 1
    transforms = [semitones / 6, math.log(factor) / math.log(1.1), velocity_bins / 2]
    return np.array([*pitch_class[1:], *transforms, *augmentation.label()], np.float32)


def tonic(performance: Performance) -> int:
    """Pitch class of the tonic, 0 to 11.

    The key, out of 24, is the one whose profile correlates best with how long each pitch class sounds.
    """
    weights = np.minimum(performance.offset_s - performance.onset_s, _MAX_KEY_WEIGHT_S)
    sounding = np.bincount(performance.pitch % 12, weights, minlength=12)
    profiles = np.array([np.roll(profile, key) for key in range(12) for profile in (_MAJOR, _MINOR)])
    deviations = profiles - profiles.mean(axis=1, keepdims=True)
    fit = deviations @ sounding / np.linalg.norm(deviations, axis=1)
    return int(fit.argmax()) // 2


def _pitches_in_mode(tonic: int, augmentation: PieceAugmentation) -> Int64[np.ndarray, " 128"]:
    """New pitch of each pitch. A pitch that would leave the piano stays as it is."""
    pitch = np.arange(PITCHES)
    moves = np.zeros(12, np.int64)
    swaps = ((3, augmentation.swap_thirds), (8, augmentation.swap_sixths), (10, augmentation.swap_sixths))
    for lower, swap in swaps:
        moves[lower], moves[lower + 1] = int(swap), -int(swap)
    moved = pitch + moves[(pitch - tonic) % 12]
    return np.where((moved < PIANO_LOW) | (moved > PIANO_HIGH), pitch, moved)


def _bins_with_contrast(bins: Int64[np.ndarray, " n"], factor: float) -> Int64[np.ndarray, " 32"]:
    """New velocity bin of each bin, given all the bins of a piece."""
    mean = bins.mean() if len(bins) else 0.0
    spread = np.round(mean + factor * (np.arange(VELOCITY_BINS) - mean))
    return np.clip(spread, 0, VELOCITY_BINS - 1).astype(np.int64)


def _is_repeated_velocity(tokens: Integer[np.ndarray, " T"]) -> Bool[np.ndarray, " T"]:
    """Mask of tokens that set the velocity already in force, because two velocities became one."""
    places = np.flatnonzero(is_velocity(tokens))
    repeats = np.zeros(len(tokens), bool)
    repeats[places[1:]] = np.diff(tokens[places]) == 0
    return repeats


def _tempo_curve(
    length_steps: int, deviation: float, rng: np.random.Generator
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Knots of the map from old to new times, in steps; the log-tempo is a first-order autoregressive process."""
    knots = 2 + length_steps // _KNOT_STEPS
    noise = math.sqrt(1 - _RUBATO_CORRELATION**2) * rng.standard_normal(knots - 1)
    log_tempo = np.asarray(lfilter([1.0], [1.0, -_RUBATO_CORRELATION], noise))
    lengths = _KNOT_STEPS * np.exp(deviation * log_tempo)
    return np.arange(knots) * float(_KNOT_STEPS), np.concatenate([[0.0], np.cumsum(lengths)])
