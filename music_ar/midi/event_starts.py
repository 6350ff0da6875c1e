"""Where the events of a MIDI file begin, found in whole arrays instead of one by one.

Where an event ends depends only on where it begins and, under running status, on whether the last message had one data
byte or two. So for every byte and both cases we compute where the next event would begin if one began here, and then
follow these links from the first byte. The work is proportional to the number of bytes, whatever they say.
"""

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt8

MARGIN = 16
"""Bytes that must follow the tracks: more than an event has up to its length, if it tells one."""
META, END_OF_TRACK = 0xFF, 0x2F

_BYTES = np.arange(256)
IS_MESSAGE = (_BYTES >= 0x80) & (_BYTES < 0xF0)
IS_SHORT = (_BYTES >= 0xC0) & (_BYTES < 0xE0)
"""Status bytes of messages with one data byte; the others have two."""
TELLS_LENGTH = np.isin(_BYTES, (0xF0, 0xF7, META))
ENDS_RUNNING_STATUS = np.isin(_BYTES, (0xF0, 0xF1, 0xF2, 0xF3, 0xF6, 0xF7))
"""System exclusive and system common messages. As in most readers, meta-events and real-time messages do not."""

# A summary of what a status byte says: the number of bytes from it on, and four marks. A byte below 0x80 is no status,
# but the first of two data bytes under running status.
_SIZE, _IS_RUNNING, _BECOMES_SHORT, _STAYS_SHORT, _TELLS_LENGTH = 7, 8, 16, 32, 64
_IS_DATA = _BYTES < 0x80
_SUMMARY = (
    np.select([_IS_DATA | IS_SHORT, IS_MESSAGE, _BYTES == 0xF2, (_BYTES == 0xF1) | (_BYTES == 0xF3)], [2, 3, 3, 2], 1)
    + _IS_RUNNING * _IS_DATA
    + _BECOMES_SHORT * IS_SHORT
    + _STAYS_SHORT * (IS_SHORT | ~(IS_MESSAGE | ENDS_RUNNING_STATUS))
    + _TELLS_LENGTH * TELLS_LENGTH
).astype(np.uint8)

_WINDOW = 2**14  # bytes at a time: bounds the memory, and fits the processor's cache
_DOUBLINGS = 3  # 2**3 links are followed at once


def event_starts(
    data: UInt8[np.ndarray, " n"], track_end: Int64[np.ndarray, " t"]
) -> tuple[Int32[np.ndarray, " e"], int]:
    """Find where the events of the tracks begin. What follows an end-of-track event in its track is skipped.

    Args:
        data: the joined tracks, followed by `MARGIN` bytes.
        track_end: where each track ends in `data`.

    Returns:
        The index of each event's first byte, the beginning of its delta time, and where the last event ends. After a
        damaged event they mean nothing.
    """
    size = len(data) - MARGIN
    starts, base, is_short = [np.zeros(0, np.int32)], 0, False
    while base < size:
        window = _Window(data, base, min(_WINDOW, size - base), track_end)
        inside, base, is_short = window.follow(is_short)
        starts.append(inside)
    return np.concatenate(starts), base


class _Window:
    """What an event would be that begins at each of `size` bytes of the data. Indices are the window's own."""

    def __init__(self, data: UInt8[np.ndarray, " n"], base: int, size: int, track_end: Int64[np.ndarray, " t"]) -> None:
        self._base, self._size = base, size
        delta_bytes, self._summary = _read_ahead(data[base : base + size + MARGIN], size)
        self._end = np.arange(size, dtype=np.int32)
        self._end += delta_bytes
        self._end += self._summary & _SIZE
        long = np.flatnonzero(self._summary & _TELLS_LENGTH)
        if len(long):
            self._end[long] = _told_end(data, base + long + delta_bytes[long], track_end) - base

    def follow(self, is_short: bool) -> tuple[Int32[np.ndarray, " e"], int, bool]:
        """Follow the links from the first byte.

        Args:
            is_short: whether the running status is a short message.

        Returns:
            Indices of the events' first bytes in the data, that of the first event beyond the window, and whether the
            running status is a short message there.
        """
        if not is_short:
            starts = self._walk_long()
            marks = self._summary.take(starts)
            if not ((marks[:-1] & _BECOMES_SHORT) & ((marks[1:] & _STAYS_SHORT) >> 1)).any():
                is_short = bool(marks[-1] & _BECOMES_SHORT)
                return starts + np.int32(self._base), self._base + int(self._end[starts[-1]]), is_short
        return self._walk_both(is_short)

    def _walk_long(self) -> Int32[np.ndarray, " e"]:
        """The events' first bytes, if no short message is followed by one under running status."""
        links = np.empty(self._size + 1, np.int32)
        np.minimum(self._end, self._size, out=links[:-1])
        links[-1] = self._size
        starts = _walk(links, 0)
        return starts[: np.searchsorted(starts, self._size)]

    def _walk_both(self, is_short: bool) -> tuple[Int32[np.ndarray, " e"], int, bool]:
        """As `follow`, with two links for each byte. Those where the running status is short come after the others."""
        out = self._size
        short_case = np.int32(out + 1)
        is_running = (self._summary & _IS_RUNNING) > 0
        links = np.empty((2, out + 1), np.int32)
        links[0, :-1] = np.minimum(self._end, out) + ((self._summary & _BECOMES_SHORT) > 0) * short_case
        links[1, :-1] = np.minimum(self._end - is_running, out) + ((self._summary & _STAYS_SHORT) > 0) * short_case
        links[:, -1] = out, out + short_case
        nodes = _walk(links.ravel(), int(short_case) * is_short)
        is_short_at = nodes >= short_case
        starts = np.where(is_short_at, nodes - short_case, nodes)
        count = int(np.searchsorted(starts, out))
        last = starts[count - 1]
        end = int(self._end[last]) - bool(is_short_at[count - 1] and is_running[last])
        return starts[:count] + np.int32(self._base), self._base + end, bool(is_short_at[-1])


def _read_ahead(window: UInt8[np.ndarray, " m"], size: int) -> tuple[UInt8[np.ndarray, " n"], UInt8[np.ndarray, " n"]]:
    """For an event at each of the first `size` bytes: the bytes of its delta time, and the summary of its status."""
    is_high = window[: size + 2] >= 0x80
    summaries = _SUMMARY.take(window[: size + 4])
    delta_bytes, summary = np.ones(size, np.uint8), summaries[1 : size + 1].copy()
    goes_on = np.ones(size, bool)
    for more in (1, 2, 3):
        goes_on &= is_high[more - 1 : more - 1 + size]
        delta_bytes += goes_on
        np.copyto(summary, summaries[more + 1 : more + 1 + size], where=goes_on)
    return delta_bytes, summary


def _told_end(
    data: UInt8[np.ndarray, " n"], status_at: Int[np.ndarray, " k"], track_end: Int64[np.ndarray, " t"]
) -> Int[np.ndarray, " k"]:
    """Where the events end that tell their length; an end-of-track event ends where its track does."""
    is_meta = data[status_at] == META
    length_at = status_at + 1 + is_meta
    length, length_bytes = read_numbers(data, length_at)
    end = length_at + length_bytes + length
    ends_track = is_meta & (data[status_at + 1] == END_OF_TRACK)
    if ends_track.any():
        limit = track_end[np.searchsorted(track_end, status_at[ends_track], side="right").clip(max=len(track_end) - 1)]
        end[ends_track] = np.maximum(limit, end[ends_track])
    return end


def _walk(links: Int32[np.ndarray, " n"], start: int) -> Int32[np.ndarray, " s"]:
    """Follow the links from `start` to a node that links to itself, which may come several times."""
    strides = links
    for _ in range(_DOUBLINGS):
        strides = strides.take(strides)
    stride, nodes = memoryview(strides.data), [start]
    while (node := stride[nodes[-1]]) != nodes[-1]:
        nodes.append(node)
    steps = np.empty((len(nodes), 2**_DOUBLINGS), np.int32)
    steps[:, 0] = nodes
    for step in range(1, 2**_DOUBLINGS):
        steps[:, step] = links.take(steps[:, step - 1])
    return steps.ravel()


def read_numbers(
    data: UInt8[np.ndarray, " n"], at: Int[np.ndarray, " k"]
) -> tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"]]:
    """Read variable-length numbers, and count their bytes: 5 for those that are longer than MIDI allows."""
    byte = data[at]
    value, bytes_read = (byte & 0x7F).astype(np.int64), np.ones(len(at), np.int64)
    unfinished = np.flatnonzero(byte >= 0x80)
    for more in (1, 2, 3):
        if not len(unfinished):
            break
        byte = data[at[unfinished] + more]
        value[unfinished] = value[unfinished] << 7 | byte & 0x7F
        bytes_read[unfinished] += 1
        unfinished = unfinished[byte >= 0x80]
    bytes_read[unfinished] += 1
    return value, bytes_read
