"""A slow MIDI player, event by event: the reference for `read_midi`."""

from collections import defaultdict
from dataclasses import dataclass

TEMPO, PORT, END_OF_TRACK = 0x51, 0x21, 0x2F
SYSTEM_COMMON_BYTES = {0xF1: 1, 0xF2: 2, 0xF3: 1, 0xF6: 0}
REAL_TIME = (0xF8, 0xFA, 0xFB, 0xFC, 0xFE)


class Damaged(Exception):
    """A track cannot be read."""


@dataclass
class Event:
    tick: int
    track: int
    status: int
    data: bytes
    port: int = 0

    @property
    def channel(self) -> int:
        return 16 * self.port + self.status % 16


@dataclass(eq=False)
class Note:
    onset: int
    pitch: int
    velocity: int
    end: int = 0


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def take(self, count: int) -> bytes:
        taken = self.data[self.position : self.position + count]
        if len(taken) < count:
            raise Damaged("incomplete")
        self.position += count
        return taken

    def number(self) -> int:
        value = 0
        for _ in range(4):
            (byte,) = self.take(1)
            value = value << 7 | byte & 127
            if byte < 128:
                return value
        raise Damaged("number too long")


def track_events(data: bytes, track: int) -> list[Event]:
    """The events of a track, with meta-events as status 0xFF and their kind before their contents."""
    source, events, tick, port, running = Bytes(data), [], 0, 0, None
    while source.position < len(data):
        tick += source.number()
        (status,) = source.take(1)
        if status < 0x80:
            if running is None:
                raise Damaged("no running status")
            source.position -= 1
            status = running
        content = contents(source, status)
        if status < 0xF0:
            running = status
        elif status != 0xFF and status not in REAL_TIME:
            running = None
        if status == 0xFF and content[0] == PORT and len(content) == 2:
            port = content[1]
        events.append(Event(tick, track, status, content, port))
        if status == 0xFF and content[0] == END_OF_TRACK:
            break
    return events


def contents(source: Bytes, status: int) -> bytes:
    """What follows a status byte."""
    if status < 0xF0:
        content = source.take(1 if 0xC0 <= status < 0xE0 else 2)
        if max(content) > 127:
            raise Damaged("data")
        return content
    if status == 0xFF:
        return source.take(1) + source.take(source.number())
    if status in (0xF0, 0xF7):
        return source.take(source.number())
    if status in SYSTEM_COMMON_BYTES:
        return source.take(SYSTEM_COMMON_BYTES[status])
    if status in REAL_TIME:
        return b""
    raise Damaged("status")


def play(tracks: list[bytes]) -> list[tuple[int, int, int, int]]:
    """What sounds of the track chunks' contents: onset and end in ticks, pitch, velocity, sorted; without drums."""
    everything = [event for number, data in enumerate(tracks) for event in track_events(data, number)]
    end_tick = max((event.tick for event in everything), default=0)
    events = sorted((event for event in everything if event.status < 0xF0), key=lambda event: event.tick)
    begun, released = pair(events, end_tick)
    player = Player()
    for index, event in enumerate(events):
        if index in begun:
            player.strike(event.channel, begun[index])
        player.release(event.channel, event.tick, released[index])
        if event.status >> 4 == 0xB:
            player.control(event.channel, event.tick, *event.data)
        player.damp(event.channel, event.tick)
    return player.ended(end_tick)


class Player:
    """What sounds and which keys and pedals are down, by channel; `last` is when one of them last moved."""

    def __init__(self) -> None:
        self.notes, self.last = [], 0
        self.sounding, self.keys_down, self.pedal_is_down = defaultdict(list), defaultdict(list), defaultdict(bool)

    def strike(self, channel: int, note: Note) -> None:
        if self.pedal_is_down[channel]:
            self.stop(channel, note.onset, [other for other in self.sounding[channel] if other.pitch == note.pitch])
        for held in (self.notes, self.sounding[channel], self.keys_down[channel]):
            held.append(note)

    def release(self, channel: int, tick: int, keys: list[Note]) -> None:
        for note in [note for note in keys if note in self.keys_down[channel]]:
            self.keys_down[channel].remove(note)
            self.last = tick

    def stop(self, channel: int, tick: int, stopped: list[Note]) -> None:
        for note in [note for note in stopped if note in self.sounding[channel]]:
            note.end = tick
            self.sounding[channel].remove(note)

    def control(self, channel: int, tick: int, number: int, value: int) -> None:
        if number in (120, *range(123, 128)):
            self.release(channel, tick, self.keys_down[channel])
        if number == 120:
            self.stop(channel, tick, self.sounding[channel])
        if number in (64, 121):
            self.pedal_is_down[channel] = number == 64 and value >= 64
        if number == 64 or number >= 120:
            self.last = tick

    def damp(self, channel: int, tick: int) -> None:
        if not self.pedal_is_down[channel]:
            self.stop(channel, tick, [n for n in self.sounding[channel] if n not in self.keys_down[channel]])

    def ended(self, end_tick: int) -> list[tuple[int, int, int, int]]:
        last = end_tick if any(self.keys_down.values()) else self.last
        for channel in self.sounding:
            self.stop(channel, last, self.sounding[channel])
        return sorted((n.onset, n.end, n.pitch, n.velocity) for n in self.notes if n.end > n.onset)


def pair(events: list[Event], end_tick: int) -> tuple[dict[int, Note], dict[int, list[Note]]]:
    """The notes by the index of their note-on, and those that other events release."""
    begun, released, open_notes = {}, defaultdict(list), defaultdict(list)
    for index, event in enumerate(events):
        if event.status >> 4 not in (8, 9) or event.channel % 16 == 9:
            continue
        pitch, velocity = event.data
        held = open_notes[event.track, event.channel, pitch]
        if event.status >> 4 == 9 and velocity:
            begun[index] = Note(event.tick, pitch, velocity)
            held.append(index)
            continue
        earlier = [on for on in held if events[on].tick < event.tick]
        released[index] = [begun[on] for on in earlier]
        for on in earlier or list(held):
            held.remove(on)
            if not earlier:
                del begun[on]  # it has no length
    for on in [on for held in open_notes.values() for on in held]:
        index = next((index for index in range(on + 1, len(events)) if would_end(events[index], events[on])), None)
        if index is not None:
            released[index].append(begun[on])
        elif events[on].tick == end_tick:
            del begun[on]
    return begun, released


def would_end(event: Event, note_on: Event) -> bool:
    """Whether a later event ends a note that its own track never releases."""
    is_same_key = (event.channel, event.data[0]) == (note_on.channel, note_on.data[0])
    return event.status >> 4 in (8, 9) and is_same_key and event.tick > note_on.tick
