"""History bias: a bias on the logits towards the pitches and velocities that a piece has had so far.

A model predicts real pieces well, but drifts in its own: it takes a note drawn by chance for a modulation, and the next
notes follow it. After a minute, a generated piece has less in common with its beginning than a real one does, and its
dynamics and register have drifted (docs/results/evaluation.md). So events are reweighted by how common they have been
in the piece, raised to the power of a strength. For a note-on, that is the share of its pitch class and, with less
weight, of the pitches around it; for a velocity, the share of similar velocities. Prior counts represent what is usual
in piano music. The velocity prior is so strong that a piece settles on its own dynamics only after a minute or two:
real pieces that begin softly do not stay soft. The total probability of note-ons, and of velocities, does not change
before the grammar applies.

Dimension key, in addition to that of `music_ar.model.config`: P pitches, L velocity bins.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from music_ar.features.keyboard import times_and_velocities
from music_ar.tokens import vocabulary

_PITCH_CLASSES = 12
_REGISTER_WEIGHT = 0.5
"""Weight of a note-on's register, relative to that of its pitch class."""


class _Prior(NamedTuple):
    """A bell curve of what is usual, which counts as `notes` notes before the first."""

    notes: float
    mean: float
    deviation: float


_PITCH_CLASS_PRIOR_NOTES = 48.0  # over all pitch classes, uniform
_PITCH_PRIOR = _Prior(50.0, 64.0, 14.0)
_VELOCITY_PRIOR = _Prior(1000.0, 16.5, 4.8)  # mean and deviation of the notes of MAESTRO's train split, in bins
_NEAR_PITCHES = 4.0  # deviation of the smoothing, in semitones
_NEAR_BINS = 3.0


class NoteHistory(NamedTuple):
    """Histograms of the notes that a piece has had; any leading batch shape.

    Attributes:
        pitches: count of each pitch.
        velocities: count of each velocity bin, 1 to 32.
    """

    pitches: Int[Any, "*B P"]
    velocities: Int[Any, "*B L"]


def init(batch_shape: tuple[int, ...] = ()) -> NoteHistory:
    """The state before the first token (NumPy)."""
    return NoteHistory(
        pitches=np.zeros((*batch_shape, vocabulary.PITCHES), np.int32),
        velocities=np.zeros((*batch_shape, vocabulary.VELOCITY_BINS), np.int32),
    )


def step(state: NoteHistory, token: Int[Array, " B"], velocity: Int[Array, " B"]) -> NoteHistory:
    """The state after one more token, in JAX; only a note-on changes it.

    Args:
        state: before the token.
        token: the token.
        velocity: the bin in force, 0 before the first.
    """
    is_on = vocabulary.is_note_on(token)[:, None].astype(jnp.int32)
    bin_B = jnp.where(velocity > 0, velocity, vocabulary.DEFAULT_VELOCITY_BIN) - 1
    return NoteHistory(
        pitches=state.pitches + is_on * jax.nn.one_hot(token, vocabulary.PITCHES, dtype=jnp.int32),
        velocities=state.velocities + is_on * jax.nn.one_hot(bin_B, vocabulary.VELOCITY_BINS, dtype=jnp.int32),
    )


def scan(tokens: Integer[np.ndarray, " T"]) -> NoteHistory:
    """The state after a whole sequence, in NumPy."""
    note_on = vocabulary.is_note_on(tokens)
    velocity = times_and_velocities(tokens)[1][note_on]
    bins = np.where(velocity > 0, velocity, vocabulary.DEFAULT_VELOCITY_BIN) - 1
    return NoteHistory(
        pitches=np.bincount(tokens[note_on], minlength=vocabulary.PITCHES).astype(np.int32),
        velocities=np.bincount(bins, minlength=vocabulary.VELOCITY_BINS).astype(np.int32),
    )


def biased(
    logits_BxV: Float[Array, "B V"], history: NoteHistory, strength: Float[Array, "*rows"]
) -> Float[Array, "B V"]:
    """Logits with the history bias.

    Args:
        logits_BxV: of the next token.
        history: of each row.
        strength: 0 leaves the logits as they are; one for all rows, or one per row.
    """
    strength = strength.reshape(-1, 1)
    pitches_BxP, velocities_BxL = (counts.astype(jnp.float32) for counts in history)
    pitch_class_BxP = pitches_BxP @ _same_pitch_class() + _PITCH_CLASS_PRIOR_NOTES / _PITCH_CLASSES
    register_BxP = pitches_BxP @ _smoothing(vocabulary.PITCHES, _NEAR_PITCHES) + _prior(
        vocabulary.PITCHES, 0, _PITCH_PRIOR
    )
    dynamics_BxL = velocities_BxL @ _smoothing(vocabulary.VELOCITY_BINS, _NEAR_BINS) + _prior(
        vocabulary.VELOCITY_BINS, 1, _VELOCITY_PRIOR
    )
    pitch_bias_BxP = jnp.log(pitch_class_BxP) + _REGISTER_WEIGHT * jnp.log(register_BxP)
    for first, bias in ((vocabulary.NOTE_ON, pitch_bias_BxP), (vocabulary.VELOCITY, jnp.log(dynamics_BxL))):
        tokens = slice(first, first + bias.shape[1])
        before = logits_BxV[:, tokens]
        after = before + strength * bias
        # The token type as a whole stays as likely as it was.
        correction = jax.nn.logsumexp(before, axis=1, keepdims=True) - jax.nn.logsumexp(after, axis=1, keepdims=True)
        logits_BxV = logits_BxV.at[:, tokens].set(after + correction)
    return logits_BxV


def _same_pitch_class() -> Float[np.ndarray, "P P"]:
    classes = np.arange(vocabulary.PITCHES) % _PITCH_CLASSES
    return (classes[:, None] == classes[None]).astype(np.float32)


def _smoothing(size: int, deviation: float) -> Float[np.ndarray, "size size"]:
    """Weight of a note at each place for every place; each row sums to 1."""
    places = np.arange(size)
    return _bell(places[None] - places[:, None], deviation)


def _prior(size: int, first: int, prior: _Prior) -> Float[np.ndarray, "1 size"]:
    return np.float32(prior.notes) * _bell(np.arange(first, first + size)[None] - prior.mean, prior.deviation)


def _bell(distance: Any, deviation: float) -> Float[np.ndarray, "rows size"]:
    bell = np.exp(-0.5 * np.square(distance / deviation))
    return (bell / bell.sum(axis=-1, keepdims=True)).astype(np.float32)
