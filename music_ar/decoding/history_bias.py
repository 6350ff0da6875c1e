"""What a piece has been made of so far, and a pull towards it, so that what is made keeps its key and its loudness.

A model predicts real pieces well and wanders in its own: a note that was drawn by chance is a modulation to whoever
reads it, and the next ones follow it. After a minute a piece shares less with its beginning than real ones do, and its
loudness and register have gone anywhere (docs/evaluation.md). So what is likely is weighed by how much of it the piece
has had, to the power of a strength: a note-on by the share of its pitch class, and less so by that of the pitches
around it; a velocity by the share of about as loud notes. What is usual in piano music counts as heard before the
first note, of velocities so much of it that a piece turns to its own loudness after a minute or two: real pieces that
begin softly do not stay soft. How likely a note-on or a velocity is at all does not change, before the grammar.

Dimension key, beside that of `sampling.py`: P pitches, L velocity bins.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from music_ar.features import keyboard
from music_ar.tokens import vocabulary

_PITCH_CLASSES = 12
_REGISTER_SHARE = 0.5
"""How strongly a note-on is weighed by its register, if 1 is how strongly it is by its pitch class."""


class _Usual(NamedTuple):
    """A bell curve of what is usual, that counts as so many notes heard before the first."""

    notes: float
    mean: float
    deviation: float


_USUAL_CLASS_NOTES = 48.0  # of all pitch classes alike
_USUAL_PITCH = _Usual(50.0, 64.0, 14.0)
_USUAL_VELOCITY = _Usual(1000.0, 16.5, 4.8)  # mean and deviation of the notes of MAESTRO's train split, in bins
_NEAR_PITCHES = 4.0  # deviations of what counts as near
_NEAR_BINS = 3.0


class Heard(NamedTuple):
    """How many notes a piece has had; any leading batch shape.

    Attributes:
        pitches: of each pitch.
        velocities: of each velocity bin, 1 to 32.
    """

    pitches: Int[Any, "*B P"]
    velocities: Int[Any, "*B L"]


def after(tokens: Integer[np.ndarray, " T"]) -> Heard:
    """What has been heard after a sequence, in NumPy."""
    notes = vocabulary.is_on(tokens)
    _, velocity = keyboard.times_and_velocities(tokens, np)
    return Heard(
        pitches=np.bincount(tokens[notes], minlength=vocabulary.PITCHES).astype(np.int32),
        velocities=np.bincount(_bin(velocity[notes], np), minlength=vocabulary.VELOCITY_BINS).astype(np.int32),
    )


def advance(heard: Heard, token: Int[Array, " B"], velocity: Int[Array, " B"]) -> Heard:
    """What has been heard after one more token, in JAX.

    Args:
        heard: before it.
        token: the token; only a note-on changes anything.
        velocity: the bin in force, 0 before the first.
    """
    is_on = vocabulary.is_on(token)[:, None].astype(jnp.int32)
    return Heard(
        pitches=heard.pitches + is_on * jax.nn.one_hot(token, vocabulary.PITCHES, dtype=jnp.int32),
        velocities=heard.velocities
        + is_on * jax.nn.one_hot(_bin(velocity, jnp), vocabulary.VELOCITY_BINS, dtype=jnp.int32),
    )


def steadied(logits_BxV: Float[Array, "B V"], heard: Heard, strength: Float[Array, "*rows"]) -> Float[Array, "B V"]:
    """Logits with the pull towards what was heard.

    Args:
        logits_BxV: of the next token.
        heard: by each row.
        strength: 0 leaves the logits as they are; one for all rows, or one a row.
    """
    strength = strength.reshape(-1, 1)
    pitches_BxP, velocities_BxL = (counts.astype(jnp.float32) for counts in heard)
    class_BxP = pitches_BxP @ _of_one_class() + _USUAL_CLASS_NOTES / _PITCH_CLASSES
    register_BxP = pitches_BxP @ _near(vocabulary.PITCHES, _NEAR_PITCHES) + _usual(vocabulary.PITCHES, 0, _USUAL_PITCH)
    loudness_BxL = velocities_BxL @ _near(vocabulary.VELOCITY_BINS, _NEAR_BINS) + _usual(
        vocabulary.VELOCITY_BINS, 1, _USUAL_VELOCITY
    )
    of_pitch_BxP = jnp.log(class_BxP) + _REGISTER_SHARE * jnp.log(register_BxP)
    for first, pull in ((vocabulary.NOTE_ON, of_pitch_BxP), (vocabulary.VELOCITY, jnp.log(loudness_BxL))):
        kind = slice(first, first + pull.shape[1])
        before = logits_BxV[:, kind]
        pulled = before + strength * pull
        as_likely = jax.nn.logsumexp(before, axis=1, keepdims=True) - jax.nn.logsumexp(pulled, axis=1, keepdims=True)
        logits_BxV = logits_BxV.at[:, kind].set(pulled + as_likely)
    return logits_BxV


def _bin(velocity: Any, xp: Any) -> Any:
    """The bin in force, from 0; notes that no velocity precedes have that which they are played with."""
    return xp.where(velocity > 0, velocity, vocabulary.DEFAULT_VELOCITY_BIN) - 1


def _of_one_class() -> Float[np.ndarray, "P P"]:
    classes = np.arange(vocabulary.PITCHES) % _PITCH_CLASSES
    return (classes[:, None] == classes[None]).astype(np.float32)


def _near(size: int, deviation: float) -> Float[np.ndarray, "size size"]:
    """How much a note at each place counts at each other; in all it counts 1."""
    places = np.arange(size)
    return _bell(places[None] - places[:, None], deviation)


def _usual(size: int, first: int, usual: _Usual) -> Float[np.ndarray, "1 size"]:
    return np.float32(usual.notes) * _bell(np.arange(first, first + size)[None] - usual.mean, usual.deviation)


def _bell(distance: Any, deviation: float) -> Float[np.ndarray, "rows size"]:
    bell = np.exp(-0.5 * np.square(distance / deviation))
    return (bell / bell.sum(axis=-1, keepdims=True)).astype(np.float32)
