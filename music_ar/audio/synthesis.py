"""`Performance` -> sound: a sampled grand piano, written as WAV, FLAC, MP3 or Ogg Vorbis.

The samples in `samples/` are one velocity layer of the Salamander Grand Piano V3 by Alexander Holm (CC BY 3.0), every
third key. The keys in between play the nearest sample a semitone higher or lower; softer notes are quieter and duller.
"""

import functools
import io
import math
import os
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import soundfile
from jaxtyping import Float32, Int16
from scipy.signal import lfilter

from music_ar.files import replacing
from music_ar.midi.io import BinaryFile
from music_ar.midi.performance import Performance

SAMPLE_RATE = 48_000
TAIL_S = 1.0
"""Length of the audio after the last note: dampers take time, and the highest strings have none."""
ATTRIBUTION = "Piano: Salamander Grand Piano V3 by Alexander Holm, CC BY 3.0"
AudioFormat = Literal["wav", "flac", "mp3", "ogg"]

_SUBTYPES = {"mp3": "MPEG_LAYER_III", "ogg": "VORBIS"}
_SAMPLED_PITCHES = range(21, 109, 3)
_SAMPLED_VELOCITY = 76
_LONGEST_S = 8  # of a recording
_MAX_LEAD_S = 0.35  # silence before the sound of a recording begins
_HIGHEST_DAMPED = 88  # E6; strings above have no dampers
_DAMPING_S = 0.25
_LOUDNESS = 0.4
_LOUDNESS_EXPONENT = 1.6  # amplitude over velocity: 10 dB from velocity 60 to 120
_PEAK = 0.97
_BLOCK_FRAMES = 10 * SAMPLE_RATE

_Key = tuple[Int16[np.ndarray, "sampled 2"], Int16[np.ndarray, "sampled 2"]]


class AudioError(ValueError):
    """The audio format is not supported."""


def render(performance: Performance) -> Float32[np.ndarray, "frames 2"]:
    """Synthesize a performance in stereo, from time zero to `TAIL_S` after the last note; samples are in -1..1.

    A note keeps sounding under the next note of its pitch. If the mix would clip, it is scaled down as a whole.
    """
    frames = round((performance.duration_s + TAIL_S) * SAMPLE_RATE)
    sound = np.zeros((frames, 2), np.float32)
    begin = np.rint(performance.onset_s * SAMPLE_RATE).astype(int)
    held = np.maximum(np.rint((performance.offset_s - performance.onset_s) * SAMPLE_RATE).astype(int), 1)
    for pitch in np.unique(performance.pitch).tolist():
        fade = _release(pitch > _HIGHEST_DAMPED)
        of_key = performance.pitch == pitch
        key = _key(pitch, _seconds_to_read(int(held[of_key].max()) + len(fade)))
        columns = (begin, held, performance.velocity)
        for start, length, velocity in zip(*(column[of_key].tolist() for column in columns), strict=True):
            note = _note(key, fade, velocity, length)[: frames - start]
            sound[start : start + len(note)] += note
    peak = max(float(sound.max(initial=0)), -float(sound.min(initial=0)))
    if peak > _PEAK:
        sound *= _PEAK / peak
    return sound


def _note(key: _Key, fade: Float32[np.ndarray, "faded 1"], velocity: int, held: int) -> Float32[np.ndarray, "frames 2"]:
    """Synthesize one note that is released after `held` frames."""
    bright, dull = key
    length = min(len(bright), held + len(fade))
    brightness = min(1.0, velocity / 100) ** 1.5
    gain = _LOUDNESS * (velocity / _SAMPLED_VELOCITY) ** _LOUDNESS_EXPONENT / 2**15
    note = np.multiply(bright[:length], np.float32(gain * brightness), dtype=np.float32)
    note += np.multiply(dull[:length], np.float32(gain * (1 - brightness)), dtype=np.float32)
    if length > held:
        note[held:] *= fade[: length - held]
    return note


@functools.cache
def _release(free: bool) -> Float32[np.ndarray, "frames 1"]:
    """Envelope of a released note, down to silence; `free` for a string without a damper."""
    frames = round((TAIL_S if free else _DAMPING_S) * SAMPLE_RATE)
    time = np.linspace(0, 1, frames, dtype=np.float32)[:, None]
    return np.exp((-1.5 if free else -5) * time) * np.cos(np.pi / 2 * time)


def _seconds_to_read(frames: int) -> int:
    """Seconds of a recording to read for a note of this length: one of four lengths, so that the cache stays small."""
    return next((seconds for seconds in (1, 2, 4) if frames <= seconds * SAMPLE_RATE), _LONGEST_S)


@functools.cache
def _key(pitch: int, seconds: int) -> _Key:
    """Sound of a held key, as recorded and low-pass filtered; 16 bits, to save memory."""
    nearest = min(_SAMPLED_PITCHES, key=lambda sampled: abs(sampled - pitch))
    recording, recorded, rate = _recording(nearest, seconds)
    speed = 2 ** ((pitch - nearest) / 12) * rate / SAMPLE_RATE
    end = min(round(recorded / speed), _LONGEST_S * SAMPLE_RATE)
    frames = min(end, seconds * SAMPLE_RATE)
    if speed != 1:
        places = np.arange(frames) * speed
        recording = np.stack([np.interp(places, np.arange(len(side)), side) for side in recording.T], axis=1)
    bright = recording[:frames].astype(np.float32)
    edge = SAMPLE_RATE // 500  # 2 ms: avoids a click where the recording is cut
    bright[:edge] *= np.linspace(0, 1, edge, dtype=np.float32)[:, None]
    ending = np.arange(max(0, end - SAMPLE_RATE), frames)
    bright[ending] *= ((end - 1 - ending) / (SAMPLE_RATE - 1)).astype(np.float32)[:, None]
    frequency = 440 * 2 ** ((pitch - 69) / 12)
    pole = math.exp(-2 * math.pi * max(500.0, 2 * frequency) / SAMPLE_RATE)
    dull = np.asarray(lfilter([1 - pole], [1, -pole], bright, axis=0))
    return _sixteen_bits(bright), _sixteen_bits(dull)


@functools.lru_cache(maxsize=1)  # keys are rendered in order, and up to three share a recording
def _recording(pitch: int, seconds: int) -> tuple[Float32[np.ndarray, "frames 2"], int, int]:
    """Read a recording from 2 ms before its onset, enough to play a semitone higher; also its total frames and rate."""
    data = resources.files("music_ar.audio").joinpath(f"samples/{pitch}.ogg").read_bytes()
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        sound = file.read(round((1.06 * seconds + _MAX_LEAD_S) * file.samplerate), dtype="float32")
        loud = np.abs(sound[: file.samplerate]).max(axis=1)
        first = max(0, int(np.argmax(loud > 0.02 * loud.max())) - file.samplerate // 500)
        return sound[first:], file.frames - first, file.samplerate


def _sixteen_bits(sound: np.ndarray) -> Int16[np.ndarray, "frames 2"]:
    return np.rint(np.clip(sound, -1, 1) * (2**15 - 1)).astype(np.int16)


def write_audio(
    performance: Performance,
    target: str | os.PathLike[str] | BinaryFile,
    *,
    format: AudioFormat | None = None,
    title: str | None = None,
    comment: str | None = None,
) -> None:
    """Synthesize a performance and write it as 16-bit WAV, 16-bit FLAC, MP3 or Ogg Vorbis.

    Args:
        performance: the notes.
        target: a path, which is replaced atomically, or an open binary file.
        format: "wav", "flac", "mp3" or "ogg"; default: the extension of the path.
        title: title tag.
        comment: comment tag, appended to the attribution of the piano samples.

    Raises:
        AudioError: the format is not one of them.
        OSError: the target cannot be written.
    """
    if not isinstance(target, str | os.PathLike):
        _write(performance, target, format, title, comment)
        return
    path = Path(target)
    chosen = _checked(path.suffix[1:].lower() if format is None else format)
    with replacing(path) as file:
        _write(performance, file, chosen, title, comment)


def _checked(format: str | None) -> str:
    if format is None or format not in get_args(AudioFormat):
        raise AudioError(f"expected an audio format of {', '.join(get_args(AudioFormat))}, got {format!r}")
    return format


def _write(
    performance: Performance,
    file: BinaryIO | BinaryFile,
    format: str | None,
    title: str | None,
    comment: str | None,
) -> None:
    chosen = _checked(format)
    sound = render(performance)
    subtype = _SUBTYPES.get(chosen, "PCM_16")
    stream: Any = file  # the stubs of soundfile list fewer types than it accepts
    with soundfile.SoundFile(stream, "w", SAMPLE_RATE, 2, subtype, format=chosen.upper()) as output:
        output.comment = ATTRIBUTION if comment is None else f"{ATTRIBUTION}. {comment}"
        if title is not None:
            output.title = title
        for start in range(0, len(sound), _BLOCK_FRAMES):
            output.write(sound[start : start + _BLOCK_FRAMES])
