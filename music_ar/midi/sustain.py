"""Controllers -> longer and shorter notes.

A controller acts on its channel, in the order of the file. On a file in which the pedal moves before the notes of the
same moment, as in MAESTRO, this is `apply_sustain_control_changes` of note-seq 0.0.5, exactly.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int64, Num

SUSTAIN_CONTROLLER = 64
PEDAL_DOWN_VALUE = 64
"""The sustain pedal is down at this value of its controller (0..127) and above. There is no half pedal."""
_MOST_SWITCH_VALUES = 8  # a pedal that takes more values is continuous; notation programs write two to four
ALL_SOUND_OFF, RESET_CONTROLLERS = 120, 121
ALL_NOTES_OFF = 123
"""So do the controllers above it, 124 to 127, which change the channel's mode."""


class Keys(NamedTuple):
    """Notes as they were played, in the order of their note-ons; a note sounds longer than its key is down.

    Attributes:
        onset: time of the note-on, in any unit.
        release: time of the note-off, > onset.
        onset_order: place of the note-on among all events of the file.
        release_order: the same for the note-off.
        channel: 16 times the number of the port, plus the channel, 0..15.
        pitch: 0..127.
        velocity: 1..127.
    """

    onset: Num[np.ndarray, " n"]
    release: Num[np.ndarray, " n"]
    onset_order: Int64[np.ndarray, " n"]
    release_order: Int64[np.ndarray, " n"]
    channel: Int[np.ndarray, " n"]
    pitch: Int[np.ndarray, " n"]
    velocity: Int[np.ndarray, " n"]

    def select(self, index: np.ndarray) -> "Keys":
        """Return some of the notes, by a mask or by indices."""
        return Keys(*(column[index] for column in self))


class Controls(NamedTuple):
    """Movements of controllers in the order of the file; the columns mean the same as in `Keys`."""

    time: Num[np.ndarray, " c"]
    order: Int64[np.ndarray, " c"]
    channel: Int[np.ndarray, " c"]
    number: Int[np.ndarray, " c"]
    value: Int[np.ndarray, " c"]

    def select(self, index: np.ndarray) -> "Controls":
        """Return some of the movements, by a mask or by indices."""
        return Controls(*(column[index] for column in self))


def fold(keys: Keys, controls: Controls) -> tuple[Keys, Num[np.ndarray, " m"]]:
    """Find out when each note stops sounding.

    - A key that is released while the sustain pedal is down sounds until the pedal next comes up, or else until the
      last note-off or movement of these controllers in the file. Resetting all controllers raises the pedal.
    - While the pedal is down, a note-on ends every sounding note of its pitch and channel; of two at one time, the
      later in the file remains.
    - All notes off releases all keys of its channel. All sound off silences it, too.

    Returns:
        The notes that sound, sorted by channel, pitch and order, and when each ends.
    """
    controls = controls.select(np.argsort(controls.channel, kind="stable"))
    keys = _release_all(keys, controls)
    is_sustain = controls.number == SUSTAIN_CONTROLLER
    is_mode = controls.number >= ALL_SOUND_OFF
    last = max(keys.release.max(initial=0), controls.time[is_sustain | is_mode].max(initial=0))
    keys = keys.select(_by_channel_and_pitch(keys))

    pedal, is_down = _pedal_changes(controls.select(is_sustain | (controls.number == RESET_CONTROLLERS)))
    up = pedal.select(~is_down)
    end = np.append(up.time, last)[_next(up, keys.channel, keys.release_order)]
    end = np.where(_state(pedal, is_down, keys.channel, keys.release_order), end, keys.release)
    end = _earlier(end, keys.onset, _next_cut(keys, _state(pedal, is_down, keys.channel, keys.onset_order)))
    silenced = controls.select(controls.number == ALL_SOUND_OFF)
    if len(silenced.order):
        end = _earlier(end, silenced.time, _next(silenced, keys.channel, keys.onset_order))
    sounds = end > keys.onset
    return keys.select(sounds), end[sounds]


def _pedal_changes(pedal: Controls) -> tuple[Controls, Bool[np.ndarray, " c"]]:
    """The movements with which the pedal of a channel goes down or comes up, and whether it goes down."""
    is_down = _is_down(pedal)
    begins_channel = np.append(True, np.diff(pedal.channel) != 0)[: len(is_down)]
    was_down = np.append(False, is_down[:-1])[: len(is_down)] & ~begins_channel
    changes = is_down != was_down
    return pedal.select(changes), is_down[changes]


def _is_down(pedal: Controls) -> Bool[np.ndarray, " p"]:
    """Whether the pedal is down after each movement.

    Movements at one time count in the order of the file, except those of a continuous pedal. If it is up in one of
    them, it stays up at that time, as in note-seq: 36 moments of MAESTRO are so, and its tokens depend on them.
    """
    is_down = (pedal.number == SUSTAIN_CONTROLLER) & (pedal.value >= PEDAL_DOWN_VALUE)
    begins = np.append(True, (np.diff(pedal.time) != 0) | (np.diff(pedal.channel) != 0))[: len(is_down)]
    if begins.all():
        return is_down
    channel_values = np.bincount(pedal.channel * 128 + pedal.value, minlength=(pedal.channel.max() + 1) * 128)
    is_continuous = np.count_nonzero(channel_values.reshape(-1, 128), axis=1) > _MOST_SWITCH_VALUES
    ups = np.cumsum(~is_down)
    first = np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))
    was_up = ups > (ups - ~is_down)[first]
    return is_down & ~(was_up & is_continuous[pedal.channel])


def _release_all(keys: Keys, controls: Controls) -> Keys:
    """Release the keys that are down at a controller that turns all notes off."""
    offs = controls.select((controls.number == ALL_SOUND_OFF) | (controls.number >= ALL_NOTES_OFF))
    if not len(offs.order):
        return keys
    off = _next(offs, keys.channel, keys.onset_order)
    return keys._replace(
        release=_earlier(keys.release, offs.time, off), release_order=_earlier(keys.release_order, offs.order, off)
    )


def _earlier(
    times: Num[np.ndarray, " n"], others: Num[np.ndarray, " k"], index: Int64[np.ndarray, " n"]
) -> Num[np.ndarray, " n"]:
    """The earlier of each of `times` and that of `others` at the index, if there is one."""
    exists = index < len(others)
    earlier = times.copy()
    earlier[exists] = np.minimum(times[exists], others[index[exists]])
    return earlier


def _by_channel_and_pitch(keys: Keys) -> Int64[np.ndarray, " n"]:
    """Return the order by channel, pitch and note-on."""
    order = np.argsort(keys.pitch, kind="stable")  # uint8: a radix sort
    return order[np.argsort(keys.channel[order], kind="stable")]


def _state(
    pedal: Controls, is_down: Bool[np.ndarray, " p"], channel: Int[np.ndarray, " n"], order: Int64[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Whether the pedal of each channel is down at a place in the file."""
    last = np.searchsorted(_code(pedal.channel, pedal.order), _code(channel, order)) - 1
    return np.append(is_down, False)[last] & (np.append(pedal.channel, -1)[last] == channel)


def _next(events: Controls, channel: Int[np.ndarray, " n"], order: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Index of the next event on each channel after a place in the file; the number of events if there is none."""
    index = np.searchsorted(_code(events.channel, events.order), _code(channel, order), side="right")
    return np.where(np.append(events.channel, -1)[index] == channel, index, len(events.order))


def _code(channel: Int[np.ndarray, " n"], order: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """One number that sorts by channel and then by place in the file, of which there are fewer than 2**40."""
    return (channel.astype(np.int64) << 40) | order


def _next_cut(keys: Keys, cuts: Bool[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Index of the next cutting note of the same channel and pitch, n if there is none."""
    following = first_true(cuts)[1:]
    key = np.append(keys.channel.astype(np.int64) << 7 | keys.pitch, -1)
    return np.where(key[following] == key[:-1], following, len(cuts))


def first_true(mask: Bool[np.ndarray, " n"]) -> Int64[np.ndarray, " n+1"]:
    """Index of the first true value from each index on; n if there is none."""
    n = len(mask)
    index = np.append(np.where(mask, np.arange(n), n), n)
    return np.minimum.accumulate(index[::-1])[::-1]  # a running minimum from the right
