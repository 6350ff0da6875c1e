"""Numbers that describe how music sounds, measured from event tokens: what a wish can ask for (see `wishes`)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Integer

from music_ar.midi.pedalling import unfold
from music_ar.tokens.codec import event_steps, length_steps, lowest_velocity, pair_notes, velocity_bins
from music_ar.tokens.vocabulary import STEPS_PER_SECOND, flat_integers, is_note_on

_LEAST_S = 0.5  # of music, to measure anything
_LEAST_BEATS_S, _LEAST_ONSETS = 4.0, 12  # to measure how steady they are
_BEAT_STEPS = (20, 150)  # between onsets that recur: 40 to 300 a minute
_SPREAD_STEPS = 3.0  # by which onsets may miss the beat; notes of a chord are about as far apart


class Measured(NamedTuple):
    """What was measured; None where there is too little music.

    Attributes:
        density: note-ons a second.
        loudness: mean MIDI velocity of the notes.
        register: mean MIDI pitch of the notes.
        pedal_share: share of the time in which the sustain pedal is down. Tokens have the pedal folded into the notes;
            it is unfolded again (`midi.pedalling`), which agrees with pianists by an F1 of 0.93.
        tempo_stability: 0 to 1, how exactly onsets recur after one same time (pulse clarity, by autocorrelation of the
            onsets: Lartillot et al., ISMIR 2008). A metronome has about 1, rubato little.
    """

    density: float | None = None
    loudness: float | None = None
    register: float | None = None
    pedal_share: float | None = None
    tempo_stability: float | None = None


def measure(tokens: Integer[np.ndarray, " T"], start: int = 0) -> Measured:
    """Measure the music of the tokens from `start` on.

    Args:
        tokens: event tokens; PAD, START and END are skipped.
        start: the tokens before it only tell which velocity is in force.
    """
    every = flat_integers(tokens)
    part, bins = every[start:], velocity_bins(every)[start:]
    steps, length = event_steps(part), length_steps(part)
    struck = is_note_on(part)
    if length < _LEAST_S * STEPS_PER_SECOND or not struck.any():
        return Measured()
    return Measured(
        density=float(struck.sum() * STEPS_PER_SECOND / length),
        loudness=float(lowest_velocity(bins[struck]).mean()),
        register=float(part[struck].mean()),
        pedal_share=_pedal_share(part, steps, length),
        tempo_stability=_pulse_clarity(steps[struck], length),
    )


def _pedal_share(tokens: Int64[np.ndarray, " T"], steps: Int64[np.ndarray, " T"], length: int) -> float:
    pairs = pair_notes(tokens)
    onset = steps[pairs.on]
    offset = np.maximum(np.where(pairs.off >= 0, steps[pairs.off], length), onset + 1)
    playing = unfold(onset, offset, tokens[pairs.on], float(STEPS_PER_SECOND))
    return min(1.0, float((playing.pedal_up - playing.pedal_down).sum() / length))


def _pulse_clarity(onset_steps: Int64[np.ndarray, " n"], length: int) -> float | None:
    """The highest autocorrelation of the smoothed onsets at the distance of a beat."""
    times = np.unique(onset_steps)
    if length < _LEAST_BEATS_S * STEPS_PER_SECOND or len(times) < _LEAST_ONSETS:
        return None
    size = 1 << (length + _BEAT_STEPS[1]).bit_length()  # padded, so that the end does not meet the beginning
    struck = np.zeros(size)
    struck[times] = 1
    smooth = np.exp(-0.5 * (2 * np.pi * np.fft.rfftfreq(size) * _SPREAD_STEPS) ** 2)
    inside = np.where(np.arange(size) <= length, 1.0, 0.0)
    curve = np.fft.irfft(np.fft.rfft(struck) * smooth, size)
    curve = (curve - curve[: length + 1].mean()) * inside
    correlation = np.fft.irfft(np.abs(np.fft.rfft(curve)) ** 2, size)
    lags = np.arange(*_BEAT_STEPS)
    found = correlation[lags] * length / (length - lags) / max(correlation[0], 1e-12)
    return float(np.clip(found.max(), 0, 1))
