"""Voices: overlapping notes of one pitch need separate channels, since a note-off cannot say which of them it ends."""

import heapq

import numpy as np
from jaxtyping import Int, Int64


def voices(
    onset: Int[np.ndarray, " n"], offset: Int[np.ndarray, " n"], pitch: Int[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """Lowest voice that is free at each note's pitch and time; always 0 unless notes of one pitch overlap.

    Args:
        onset: when each note begins, in ticks; sorted.
        offset: when it ends.
        pitch: MIDI pitch.
    """
    voice = np.zeros(len(pitch), np.int64)
    for key in np.unique(pitch).tolist():
        of_key = np.flatnonzero(pitch == key)
        if (onset[of_key][1:] < offset[of_key][:-1]).any():
            voice[of_key] = _of_one_pitch(onset[of_key].tolist(), offset[of_key].tolist())
    return voice


def _of_one_pitch(onset: list[int], offset: list[int]) -> list[int]:
    voice, sounding, free = [], list[tuple[int, int]](), list[int]()
    for start, end in zip(onset, offset, strict=True):
        while sounding and sounding[0][0] <= start:
            heapq.heappush(free, heapq.heappop(sounding)[1])
        number = heapq.heappop(free) if free else len(sounding)
        heapq.heappush(sounding, (end, number))
        voice.append(number)
    return voice
