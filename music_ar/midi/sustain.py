"""Sustain pedal -> longer notes: `apply_sustain_control_changes` of note-seq 0.0.5, exactly, in array operations."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32

from music_ar.midi.performance import Performance

SUSTAIN_CONTROLLER = 64
PEDAL_DOWN_VALUE = 64
"""The pedal is down at this value of the sustain controller (0..127) and above."""


class Instrument(NamedTuple):
    """Notes and pedal movements of one instrument; times in seconds. A drum kit has pedal movements only."""

    onset_s: Float64[np.ndarray, " n"]
    offset_s: Float64[np.ndarray, " n"]
    pitch: Int32[np.ndarray, " n"]
    velocity: Int32[np.ndarray, " n"]
    pedal_s: Float64[np.ndarray, " p"]
    pedal_down: Bool[np.ndarray, " p"]


def merge(instruments: Sequence[Instrument]) -> Performance:
    """Merge all instruments into one piano performance, each instrument's pedal applied to its own notes.

    Raises:
        MidiError: a note is invalid.
    """
    ends_s = [time_s for each in instruments for time_s in (each.offset_s, each.pedal_s)]
    last_event_s = max((float(time_s.max(initial=0.0)) for time_s in ends_s), default=0.0)
    sustained = [_sustain(each, last_event_s) for each in instruments if len(each.pitch)]
    if not sustained:
        return Performance.empty()
    onset_s, offset_s, pitch, velocity = (np.concatenate(column) for column in zip(*sustained, strict=True))
    return Performance(onset_s=onset_s, offset_s=offset_s, pitch=pitch, velocity=velocity)


def _sustain(instrument: Instrument, last_event_s: float) -> tuple[np.ndarray, ...]:
    """Extend the notes that end while the pedal is down.

    Simultaneous events are processed in the order pedal down, pedal up, note-on, note-off. A note that ends while the
    pedal is down sounds until the pedal is next released or the file's last event. While the pedal is down, a note-on
    ends every sounding note of its pitch; of two simultaneous ones, the second remains.

    Args:
        instrument: one instrument.
        last_event_s: time of the last note or pedal event of all instruments.

    Returns:
        The columns of `Performance`, without notes cut to zero length.
    """
    pedal_order = np.lexsort((~instrument.pedal_down, instrument.pedal_s))
    pedal_s, pedal_down = instrument.pedal_s[pedal_order], instrument.pedal_down[pedal_order]
    pedal_up_s = np.append(pedal_s[~pedal_down], last_event_s)

    def is_down(time_s: np.ndarray) -> np.ndarray:
        return np.append(pedal_down, False)[np.searchsorted(pedal_s, time_s, side="right") - 1]

    order = np.argsort(instrument.onset_s, kind="stable")
    order = order[np.argsort(instrument.pitch[order].astype(np.int8), kind="stable")]  # int8: a radix sort
    onset_s, offset_s = instrument.onset_s[order], instrument.offset_s[order]
    pitch, velocity = instrument.pitch[order], instrument.velocity[order]

    release = np.searchsorted(pedal_s[~pedal_down], offset_s, side="right")
    sustained_s = np.where(is_down(offset_s), pedal_up_s[release], offset_s)
    cut_s = _next_cut(onset_s, pitch, is_down(onset_s))
    kept = cut_s > onset_s
    return onset_s[kept], np.minimum(sustained_s, cut_s)[kept], pitch[kept], velocity[kept]


def _next_cut(
    onset_s: Float64[np.ndarray, " n"], pitch: Int32[np.ndarray, " n"], cuts: Bool[np.ndarray, " n"]
) -> Float64[np.ndarray, " n"]:
    """Onset of the next cutting note of the same pitch, infinity if there is none; sorted by (pitch, onset)."""
    n = len(pitch)
    # Index of the first cutting note after each note: a running minimum from the right.
    cutting = np.append(np.where(cuts, np.arange(n), n), n)
    following = np.minimum.accumulate(cutting[::-1])[::-1][1:]
    same_pitch = np.append(pitch, -1)[following] == pitch
    return np.where(same_pitch, np.append(onset_s, np.inf)[following], np.inf)
