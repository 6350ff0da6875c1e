"""Note-ons and note-offs -> keys that are pressed and released.

Notes are paired as in pretty_midi 0.2: track by track, and a note-off releases all notes of its pitch and channel, as
synthesizers do. Only notes that no note-off of their track releases are treated differently.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from music_ar.midi.sustain import Keys, first_true


class NoteEvents(NamedTuple):
    """Note-ons and note-offs in the order in which they are played; a note-off has velocity 0.

    Attributes:
        tick: time.
        order: place among all events of the file.
        track: number of the track.
        channel: 16 times the number of the port, plus the channel, 0..15.
        pitch: 0..127.
        velocity: 0..127.
    """

    tick: Int64[np.ndarray, " n"]
    order: Int64[np.ndarray, " n"]
    track: Int64[np.ndarray, " n"]
    channel: Int32[np.ndarray, " n"]
    pitch: UInt8[np.ndarray, " n"]
    velocity: UInt8[np.ndarray, " n"]


def press_keys(events: NoteEvents, end_tick: int) -> Keys:
    """Find out when each key is released. Notes without length are dropped.

    A note that no note-off of its track releases ends with the next note-on or note-off of its pitch and channel in any
    track, or else at the end of the file.
    """
    by_key = _by_key(events)
    is_off = events.velocity[by_key] == 0
    begins_key = _changes(events.pitch[by_key]) | _changes(events.channel[by_key]) | _changes(events.track[by_key])
    begins_moment = begins_key | _changes(events.tick[by_key])
    key = np.append(np.cumsum(begins_key), -1)
    off = first_true(is_off)[_search_start(is_off, begins_key, begins_moment)]
    release_index = np.empty(len(by_key), np.int64)
    release_index[by_key] = np.where(key[off] == key[:-1], np.append(by_key, -1)[off], -1)

    on = np.flatnonzero(events.velocity > 0)
    release_index = release_index[on]
    held = np.flatnonzero(release_index < 0)
    if len(held):
        release_index[held] = _next_of_pitch(events, on[held])
    release = np.append(events.tick, end_tick)[release_index]
    keys = Keys(
        onset=events.tick[on],
        release=release,
        onset_order=events.order[on],
        release_order=np.append(events.order, _AFTER_ALL)[release_index],
        channel=events.channel[on],
        pitch=events.pitch[on],
        velocity=events.velocity[on],
    )
    has_length = release > keys.onset
    return keys if has_length.all() else keys.select(has_length)


_AFTER_ALL = 2**40 - 1


def _by_key(events: NoteEvents) -> Int64[np.ndarray, " n"]:
    """Return the order by track, channel, pitch and time."""
    order = np.argsort(events.pitch, kind="stable")  # uint8: a radix sort
    for column in (events.channel, events.track):
        order = order[np.argsort(column[order], kind="stable")]
    return order


def _changes(column: np.ndarray) -> Bool[np.ndarray, " n"]:
    """Whether each value differs from the one before; true for the first."""
    return np.concatenate([np.ones(min(1, len(column)), bool), column[1:] != column[:-1]])


def _search_start(
    is_off: Bool[np.ndarray, " n"], begins_key: Bool[np.ndarray, " n"], begins_moment: Bool[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """From which event on the note-off of a note is to be looked for.

    It is the next event, except where a note sounds, is struck again, and then released once at the same tick. That
    note-off belongs to the first note: files in which note-ons precede note-offs are common.
    """
    start = np.arange(len(is_off))
    if not (is_off[1:] & ~is_off[:-1] & ~begins_moment[1:]).any():
        return start
    first = np.flatnonzero(begins_moment)
    after = np.append(first[1:], len(is_off))
    has_one_off = np.add.reduceat(is_off, first, dtype=np.int64) == 1
    # Whether notes sound after each moment: yes if it ends with a note-on; as before it if its only note-off comes
    # after note-ons; no otherwise.
    ends_with_on = ~is_off[after - 1]
    is_decided = ends_with_on | ~has_one_off | (after - first == 1) | begins_key[first]
    decided = np.maximum.accumulate(np.where(is_decided, np.arange(len(first)), 0))
    sounds_before = np.append(False, ends_with_on[decided][:-1]) & ~begins_key[first]
    skips_moment = np.repeat(has_one_off & sounds_before, after - first)
    return np.where(skips_moment & ~is_off, np.repeat(after, after - first), start)


def _next_of_pitch(events: NoteEvents, note: Int64[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
    """Index of the next event of the same channel and pitch at a later tick; -1 if there is none."""
    code = ((events.channel.astype(np.int64) << 7) | events.pitch) << 40
    later = np.searchsorted(events.tick, events.tick[note], side="right")
    order = np.argsort(code, kind="stable")
    following = np.searchsorted(code[order] | order, code[note] | later)
    found = np.append(code[order], -1)[following] == code[note]
    return np.where(found, np.append(order, -1)[following], -1)
