"""`Performance` <-> event tokens: vocabulary, encoding, grammar, fingerprint.

The 388 event classes, their order and the encoding are those of note-seq 0.0.5's `Performance` with
`PerformanceOneHotEncoding(num_velocity_bins=32, max_shift_steps=100)` at 100 steps a second, as used by Music
Transformer and Perceiver AR (Hawthorne et al. 2022, section 5.2); three control tokens follow them.
Time is counted in steps of 10 ms.

All 1276 files of MAESTRO v3.0.0 were read and encoded here and by note-seq: the times agree to the last bit and the
tokens one for one. No time rounds the other way, because `music_ar.midi` computes seconds as pretty_midi does.
Only one order is not note-seq's: that of two notes of one pitch which different instruments strike at the very
same time.
"""

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer, Shaped

from music_ar.midi.io import Performance

PITCHES = 128
STEPS_PER_SECOND = 100
MAX_SHIFT_STEPS = 100
VELOCITY_BINS = 32
VELOCITY_BIN_SIZE = 128 // VELOCITY_BINS

NOTE_ON = 0  # + pitch 0..127
NOTE_OFF = NOTE_ON + PITCHES  # + pitch 0..127
TIME_SHIFT = NOTE_OFF + PITCHES  # + steps - 1, for 1..100 steps
VELOCITY = TIME_SHIFT + MAX_SHIFT_STEPS  # + bin - 1, for bins 1..32
EVENT_CLASSES = VELOCITY + VELOCITY_BINS
PAD = EVENT_CLASSES
START = PAD + 1
END = START + 1
VOCABULARY_SIZE = END + 1
KIND_STARTS = (NOTE_OFF, TIME_SHIFT, VELOCITY, EVENT_CLASSES)
"""Where each kind of token after note-ons begins; the last is the control tokens."""

# The bin of a note-on that no velocity precedes, as in a window cut from the middle of a piece.
DEFAULT_VELOCITY_BIN = 16


class EventError(ValueError):
    """Something that cannot be encoded as, or is not an array of, event tokens."""


def _fingerprint() -> str:
    description = {
        "classes": {
            "note_on": [NOTE_ON, PITCHES],
            "note_off": [NOTE_OFF, PITCHES],
            "time_shift": [TIME_SHIFT, MAX_SHIFT_STEPS],
            "velocity": [VELOCITY, VELOCITY_BINS],
            "pad": PAD,
            "start": START,
            "end": END,
        },
        "steps_per_second": STEPS_PER_SECOND,
        "encoding": "note-seq 0.0.5 Performance after apply_sustain_control_changes",
    }
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


FINGERPRINT = _fingerprint()
"""Names the vocabulary and the encoding rules; shards and checkpoints carry it and are checked against it."""


def is_on(tokens: Any) -> Any:
    """Which tokens are note-ons."""
    return (tokens >= NOTE_ON) & (tokens < NOTE_OFF)


def is_shift(tokens: Any) -> Any:
    """Which tokens are time shifts."""
    return (tokens >= TIME_SHIFT) & (tokens < VELOCITY)


def is_velocity(tokens: Any) -> Any:
    """Which tokens are velocities."""
    return (tokens >= VELOCITY) & (tokens < EVENT_CLASSES)


def quantize(seconds: np.ndarray) -> Int64[np.ndarray, " n"]:
    """Seconds >= 0 to the nearest step, halves up, by the same float64 operations as note-seq."""
    return (seconds * STEPS_PER_SECOND + 0.5).astype(np.int64)


def encode(performance: Performance) -> Int32[np.ndarray, " T"]:
    """The event tokens of a performance, all below `EVENT_CLASSES`: no `START`, no `END`.

    Within a step the note-offs come first, then the note-ons, each in the order of (onset, pitch) of their notes.
    A note that is shorter than a step lasts one step. A velocity is told where it changes.

    Raises:
      EventError: the performance lasts more than 2**31 steps (248 days).
    """
    if performance.duration_s * STEPS_PER_SECOND >= 2**31:
        raise EventError(f"a performance must end before step 2**31, got one of {performance.duration_s} s")
    n = len(performance)
    on_step = quantize(performance.onset_s)
    off_step = np.maximum(quantize(performance.offset_s), on_step + 1)
    # The notes are sorted already, so a note's index breaks ties. A note that ends in a step began in an earlier
    # one, hence has a lower index than any note that begins in it: offs come before ons.
    # The stable sort merges the sorted runs that are there.
    order = np.argsort(np.concatenate([off_step, on_step]) * n + np.tile(np.arange(n), 2), kind="stable")
    step = np.concatenate([off_step, on_step])[order]
    is_on = order >= n
    note_token = np.concatenate([NOTE_OFF + performance.pitch, NOTE_ON + performance.pitch])[order]

    bins = (performance.velocity - 1) // VELOCITY_BIN_SIZE + 1
    velocity_changes = np.zeros(2 * n, bool)
    velocity_changes[is_on] = np.diff(bins, prepend=0) != 0  # the note-ons appear in the order of the notes

    wait = np.diff(step, prepend=0)
    shifts = -(-wait // MAX_SHIFT_STEPS)
    end = np.cumsum(shifts + velocity_changes + 1)  # each event: shifts, maybe a velocity, the note token
    tokens = np.full(end[-1] if n else 0, TIME_SHIFT + MAX_SHIFT_STEPS - 1, np.int32)
    tokens[end - 1] = note_token
    tokens[(end - 2)[velocity_changes]] = VELOCITY + bins[velocity_changes[is_on]] - 1
    last_shift = (end - 2 - velocity_changes)[shifts > 0]
    tokens[last_shift] = TIME_SHIFT + (wait[shifts > 0] - 1) % MAX_SHIFT_STEPS
    return tokens


def event_steps(tokens: Integer[np.ndarray, " T"]) -> Int64[np.ndarray, " T"]:
    """The time of each token, in steps: the sum of the shifts before it."""
    tokens = _flat_integers(tokens)
    shift = np.where(is_shift(tokens), tokens - (TIME_SHIFT - 1), 0)
    return np.cumsum(shift) - shift


def _flat_integers(tokens: np.ndarray) -> Int64[np.ndarray, " T"]:
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not (np.issubdtype(tokens.dtype, np.integer) or tokens.size == 0):
        raise EventError(f"tokens must be a flat array of integers, got {tokens.dtype} of shape {tokens.shape}")
    return tokens.astype(np.int64)


class DecodeReport(NamedTuple):
    """What `decode` had to mend.

    Attributes:
      dangling_notes: notes without a note-off, closed at the last step.
      stray_note_offs: note-offs of a pitch that was not held, ignored.
      unknown_tokens: tokens outside the vocabulary, ignored.
    """

    dangling_notes: int
    stray_note_offs: int
    unknown_tokens: int


def decode(tokens: Shaped[np.ndarray, "..."]) -> Performance:
    """The performance that event tokens describe; any integer array has one. See `decode_report`."""
    return decode_report(tokens)[0]


def decode_report(tokens: Shaped[np.ndarray, "..."]) -> tuple[Performance, DecodeReport]:
    """The performance that event tokens describe, and what had to be mended in them.

    A note-off ends the oldest held note of its pitch, as in note-seq. `PAD`, `START`, `END` and whatever is outside
    the vocabulary are skipped, stray note-offs too; notes left without a note-off end with the last event. Every
    note lasts at least one step. A velocity bin becomes its lowest velocity, 1, 5, … 125.

    Raises:
      EventError: `tokens` is not a flat integer array.
    """
    tokens = _flat_integers(tokens)
    step = event_steps(tokens)
    velocity = _velocity_bins(tokens)
    is_note = (tokens >= 0) & (tokens < TIME_SHIFT)
    position = np.flatnonzero(is_note)
    position = position[_by_pitch(tokens[position])]
    pitch = tokens[position] % PITCHES
    is_on = tokens[position] < NOTE_OFF

    stray = _stray_offs(pitch, is_on)
    on, on_pitch = position[is_on], pitch[is_on]
    off, off_pitch = position[~is_on & ~stray], pitch[~is_on & ~stray]
    # The k-th note-off of a pitch ends its k-th note-on.
    rank = np.arange(len(off)) - np.searchsorted(off_pitch, off_pitch)
    ended = np.searchsorted(on_pitch, off_pitch) + rank
    off_step = np.full(len(on), length_steps(tokens))
    off_step[ended] = step[off]
    performance = Performance(
        onset_s=step[on] / STEPS_PER_SECOND,
        offset_s=np.maximum(off_step, step[on] + 1) / STEPS_PER_SECOND,
        pitch=on_pitch,
        velocity=1 + (velocity[on] - 1) * VELOCITY_BIN_SIZE,
    )
    unknown = int(((tokens < 0) | (tokens >= VOCABULARY_SIZE)).sum())
    return performance, DecodeReport(len(on) - len(off), int(stray.sum()), unknown)


def length_steps(tokens: Integer[np.ndarray, " T"]) -> int:
    """The time after the last token, in steps: the sum of all shifts."""
    tokens = _flat_integers(tokens)
    return int((tokens[is_shift(tokens)] - (TIME_SHIFT - 1)).sum())


def _velocity_bins(tokens: Int64[np.ndarray, " T"]) -> Int64[np.ndarray, " T"]:
    """The velocity bin in force at each token."""
    is_velocity = (tokens >= VELOCITY) & (tokens < EVENT_CLASSES)
    last = np.maximum.accumulate(np.where(is_velocity, np.arange(len(tokens)), -1))
    return np.where(last >= 0, tokens[last] - (VELOCITY - 1), DEFAULT_VELOCITY_BIN)


def _by_pitch(note_tokens: Int64[np.ndarray, " e"]) -> Int64[np.ndarray, " e"]:
    """The order of note-ons and note-offs by pitch, then by position."""
    return np.argsort((note_tokens % PITCHES).astype(np.int8), kind="stable")  # int8: a radix sort


def _stray_offs(pitch: Int64[np.ndarray, " e"], is_on: Bool[np.ndarray, " e"]) -> Bool[np.ndarray, " e"]:
    """Which note-offs find nothing held, for note events sorted by pitch and then by time.

    Per pitch let S count note-ons less note-offs. A note-off is stray exactly where S falls below zero and below
    everything before it. To do this for all pitches at once, each pitch's walk begins far below the one before it.
    """
    walk = np.cumsum(np.where(is_on, 1, -1))
    first = np.searchsorted(pitch, pitch)  # index of the pitch's first event
    floor = -pitch * (2 * len(pitch) + 2)
    walk = floor + walk - np.append(0, walk)[first]
    lowest_before = np.minimum(floor, np.append(0, np.minimum.accumulate(walk))[:-1])
    return walk < lowest_before


class GrammarState(NamedTuple):
    """What the next event depends on; any leading batch shape. See `advance` and `allowed_events`.

    Attributes:
      held: `int32 [..., 128]`, how many notes of each pitch are held.
      velocity: `int32 [...]`, the velocity bin in force, 0 before the first.
      previous: `int32 [...]`, the last token that was not `PAD`, -1 before the first.
    """

    held: Any
    velocity: Any
    previous: Any


def grammar_start(batch_shape: tuple[int, ...] = (), xp: Any = np) -> GrammarState:
    """The state before the first token, where only `START` may come.

    Args:
      batch_shape: leading axes of the state.
      xp: the array module, `numpy` or `jax.numpy`.
    """
    return GrammarState(
        held=xp.zeros((*batch_shape, PITCHES), xp.int32),
        velocity=xp.zeros(batch_shape, xp.int32),
        previous=xp.full(batch_shape, -1, xp.int32),
    )


def allowed_events(state: GrammarState, xp: Any = np) -> Bool[Any, "*batch 391"]:
    """Which tokens may come next: exactly what `START`, `encode` of some performance and `END` can hold there.

    - The first token is `START`, and only the first; after `END` nothing but `PAD`, and `PAD` nowhere else.
    - A note-on needs a velocity in force. A velocity differs from the one in force and a note-on follows it.
    - A note-off needs a held note of its pitch, and in a step no note-off comes after a note-on.
    - A shift follows a shift only if that one has the full length.
    - `END` comes after the note-off that ends the last held note.

    The rules look at one state only; `advance` takes it from token to token. Both are pure array operations, so
    the same rule filters logits under `jax.jit` and checks arrays in the tests.
    """
    held, velocity, previous = state
    unstarted, ended = previous == -1, previous == END
    after_on = is_on(previous)
    after_off = (previous >= NOTE_OFF) & (previous < TIME_SHIFT)
    after_short_shift = (previous >= TIME_SHIFT) & (previous < TIME_SHIFT + MAX_SHIFT_STEPS - 1)
    after_velocity = is_velocity(previous)
    playing = ~(unstarted | ended)
    free = playing & ~after_velocity

    def row(permission: Any, width: int) -> Any:
        return xp.broadcast_to(permission[..., None], (*permission.shape, width))

    bins = xp.arange(1, VELOCITY_BINS + 1).reshape((1,) * velocity.ndim + (VELOCITY_BINS,))
    return xp.concatenate(
        [
            row(playing & (velocity > 0), PITCHES),
            row(free & ~after_on, PITCHES) & (held > 0),
            row(free & ~after_short_shift, MAX_SHIFT_STEPS),
            row(free, VELOCITY_BINS) & (bins != velocity[..., None]),
            row(ended, 1),
            row(unstarted, 1),
            row(after_off & (held == 0).all(axis=-1), 1),
        ],
        axis=-1,
    )


def playable_events(state: GrammarState, xp: Any = np) -> Bool[Any, "*batch 391"]:
    """Which tokens may be drawn next: those allowed, but no note-on of a pitch that is held.

    A key struck again ends the note that the pedal held, so MAESTRO's performances do not hold a pitch twice (6 of its
    7,040,164 note-ons do). A model that once slips into it goes on so, and leaves notes sounding for ever.
    """
    struck = xp.concatenate(
        [state.held > 0, xp.zeros((*state.velocity.shape, VOCABULARY_SIZE - PITCHES), bool)], axis=-1
    )
    return allowed_events(state, xp) & ~struck


def advance(state: GrammarState, token: Integer[Any, "*batch"] | int, xp: Any = np) -> GrammarState:
    """The state after `token`, allowed or not; `PAD` changes nothing, so neither does padding on either side."""
    held, velocity, previous = state
    event: Any = xp.asarray(token, xp.int32)
    pitches = xp.arange(PITCHES).reshape((1,) * event.ndim + (PITCHES,))
    begins = event[..., None] - NOTE_ON == pitches
    ends = (event[..., None] - NOTE_OFF == pitches) & (held > 0)
    is_velocity = (event >= VELOCITY) & (event < EVENT_CLASSES)
    return GrammarState(
        held=held + begins.astype(held.dtype) - ends.astype(held.dtype),
        velocity=xp.where(is_velocity, event - (VELOCITY - 1), velocity).astype(velocity.dtype),
        previous=xp.where(event == PAD, previous, event).astype(previous.dtype),
    )


def grammar_after(tokens: Integer[np.ndarray, " T"]) -> GrammarState:
    """The state after a token sequence: `advance` from `grammar_start`, over all tokens at once."""
    tokens = _flat_integers(tokens)
    notes = tokens[(tokens >= 0) & (tokens < TIME_SHIFT)]
    notes = notes[_by_pitch(notes)]
    pitch, is_on = notes % PITCHES, notes < NOTE_OFF
    counts = is_on | ~_stray_offs(pitch, is_on)
    held = np.bincount(pitch[is_on], minlength=PITCHES) - np.bincount(pitch[~is_on & counts], minlength=PITCHES)
    velocities = tokens[(tokens >= VELOCITY) & (tokens < EVENT_CLASSES)]
    real = tokens[tokens != PAD]
    return GrammarState(
        held=held.astype(np.int32),
        velocity=np.int32(velocities[-1] - (VELOCITY - 1) if len(velocities) else 0),
        previous=np.int32(real[-1] if len(real) else -1),
    )
