"""What an encoder is told about each note, as numbers, so that keys and tempi do not matter more than they should.

Pitch is told as such and as intervals to the notes before, times as logarithms relative to the mean of the piece, so
that ratios are sums, and the place of a note as a fraction of the piece. The mean is a feature of its own: what a tempo
and a key say is not lost, but nothing else depends on it.

Dimension key, in addition to that of `model.config`: E earlier notes, W wavelengths.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from music_ar.embedding.notes import DURATION, ONSET, PITCH, VELOCITY
from music_ar.features.categorical import Categorical, one_hot
from music_ar.tokens.vocabulary import PITCHES, VELOCITY_BINS

_MAX_INTERVAL = 24  # semitones, up and down; wider ones are told as this
_INTERVALS = 2 * _MAX_INTERVAL + 1
_RATIO_BANDS = 3
_PER_RATIO = 1 + 2 * _RATIO_BANDS
_LEAST_STEPS = 2.0  # added to times: differences far below it are not heard as rhythm
_WHOLE = 4  # numbers of the whole piece, or not of time: tempo, length, velocity and velocity less its mean


def channels(earlier: int, time_bands: int) -> int:
    """Number of features of a note; see `note_features`."""
    return PITCHES + earlier * _INTERVALS + (earlier + 1) * _PER_RATIO + _WHOLE + 2 * time_bands


def note_features(
    notes_BxMx4: Int[Array, "B M 4"], mask_BxM: Bool[Array, "B M"], earlier: int, time_bands: int
) -> Float[Array, "B M C"]:
    """Features of each note.

    Args:
        notes_BxMx4: notes sorted by (onset, pitch), as `notes.notes_of` gives them; then anything.
        mask_BxM: which of them are there.
        earlier: E, notes before each note to tell its distance from.
        time_bands: wavelengths of `places`.
    """
    notes_BxMx4 = jnp.where(mask_BxM[..., None], notes_BxMx4, 0)
    onset, pitch = notes_BxMx4[..., ONSET], notes_BxMx4[..., PITCH]
    exists_BxMxE = (_before(mask_BxM.astype(jnp.int32), earlier) > 0) & mask_BxM[..., None]
    interval_BxMxE = jnp.clip(pitch[..., None] - _before(pitch, earlier), -_MAX_INTERVAL, _MAX_INTERVAL)
    classes = [
        Categorical(pitch[..., None], PITCHES),
        Categorical(jnp.where(exists_BxMxE, interval_BxMxE + _MAX_INTERVAL, -1), _INTERVALS),
    ]
    wait_BxMxE = _logarithm(onset[..., None] - _before(onset, earlier))
    tempo_B = _mean(wait_BxMxE[..., -1], exists_BxMxE[..., -1])
    wait_BxMxE = jnp.where(exists_BxMxE, wait_BxMxE - tempo_B[:, None, None], 0.0)
    duration_BxM = _logarithm(notes_BxMx4[..., DURATION]) - tempo_B[:, None]
    velocity_BxM = notes_BxMx4[..., VELOCITY] / VELOCITY_BINS
    length_B = _logarithm(span(notes_BxMx4, mask_BxM)[1])
    numbers = [
        _ratio_bands(jnp.concatenate([wait_BxMxE, duration_BxM[..., None]], axis=-1)),
        jnp.broadcast_to(tempo_B[:, None] / 4, mask_BxM.shape)[..., None],
        jnp.broadcast_to(length_B[:, None] / 8, mask_BxM.shape)[..., None],
        velocity_BxM[..., None],
        4 * (velocity_BxM - _mean(velocity_BxM, mask_BxM)[:, None])[..., None],
        places(onset, *span(notes_BxMx4, mask_BxM), time_bands),
    ]
    return jnp.concatenate([one_hot(classes), *numbers], axis=-1)


def span(notes_BxMx4: Int[Array, "B M 4"], mask_BxM: Bool[Array, "B M"]) -> tuple[Array, Array]:
    """Onset of the first note, int32 [B], and steps from there to the last one's, int32 [B], at least 1."""
    onset = notes_BxMx4[..., ONSET]
    last_B = jnp.where(mask_BxM, onset, 0).max(axis=1)
    return onset[:, 0], jnp.maximum(last_B - onset[:, 0], 1)


def places(
    onset_BxT: Int[Array, "B T"], start_B: Int[Array, " B"], span_B: Int[Array, " B"], bands: int
) -> Float[Array, "B T W"]:
    """Sines and cosines of times as fractions of a piece; see `span`. The longest wavelength is two pieces.

    Each wavelength is half of the one before. Remainders are taken of whole numbers: of a fraction, the shortest waves
    would show the rounding.
    """
    place_BxT, wave_Bx1 = onset_BxT - start_B[:, None], 2 * span_B[:, None]
    remainders = []
    for _ in range(bands):
        place_BxT = jnp.mod(place_BxT, wave_Bx1)
        remainders.append(place_BxT)
        place_BxT = 2 * place_BxT
    return _waves(2 * math.pi * (jnp.stack(remainders, axis=-1) / wave_Bx1[..., None]))


def _before(values_BxM: Array, count: int) -> Int[Array, "B M E"]:
    """The values of the notes before each note, nearest first; 0 where there are none."""
    M = values_BxM.shape[1]
    padded = jnp.pad(values_BxM, ((0, 0), (count, 0)))
    return jnp.stack([padded[:, count - back : count - back + M] for back in range(1, count + 1)], axis=-1)


def _logarithm(steps: Array) -> Float[Array, "..."]:
    return jnp.log(jnp.maximum(steps, 0).astype(jnp.float32) + _LEAST_STEPS)


def _mean(values_BxM: Array, mask_BxM: Array) -> Float[Array, " B"]:
    return jnp.where(mask_BxM, values_BxM, 0.0).sum(axis=1) / jnp.maximum(mask_BxM.sum(axis=1), 1)


def _ratio_bands(ratio_BxMxE: Array) -> Float[Array, "B M W"]:
    """Logarithms of ratios, and sines and cosines of them: a linear layer can then tell a half from a third."""
    rates = math.pi / 2.0 ** jnp.arange(_RATIO_BANDS, dtype=jnp.float32)
    B, M, E = ratio_BxMxE.shape
    waves = _waves((ratio_BxMxE[..., None] * rates[None, None, None]).reshape(B, M, E * _RATIO_BANDS))
    return jnp.concatenate([ratio_BxMxE, waves], axis=-1)


def _waves(angles: Array) -> Float[Array, "..."]:
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
