"""A MIDI file and its continuation in one file: the events of the prompt's file as they are, then the new notes.

What a player or a workstation shows of the prompt does not change: tracks and their names, tempos, key releases, pedal,
drums. At the end of the prompt its pedal comes up, and no further events of the file follow. Its last tempo goes on.
The new notes have a track of their own, on that channel of the prompt that has the most notes, so that they sound with
its instrument.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from music_ar.midi.clock import Clock
from music_ar.midi.events import DRUM_CHANNEL
from music_ar.midi.performance import MidiError, Performance
from music_ar.midi.prompt_file import PromptFile
from music_ar.midi.raw_events import CONTROL, META, NOTE_OFF, NOTE_ON, SYSEX, Event, RawFile
from music_ar.midi.sustain import SUSTAIN_CONTROLLER
from music_ar.midi.tracks import PIANO_CHANNELS, TickNotes, note_tracks

TRACK_NAME = "Continuation"

_MAX_BYTES = 2**20  # more than twice the largest file of MAESTRO; bounds time and memory
_HALF_STEP_S = 0.005  # events that round to the last time step of the prompt belong to it
_COARSEST_TICK_S = 0.005  # coarser ticks are divided, so that new notes move by 2.5 ms at most
_PEDALS = (SUSTAIN_CONTROLLER, 66, 67)  # sustain, sostenuto, soft
_POLY_PRESSURE = 0xA0
_MOMENTARY_METAS = (0x01, 0x05, 0x06, 0x07)  # text, lyrics, markers, cue points: nothing that lasts


class _Note(NamedTuple):
    """A note of the prompt, in ticks. `moved` if the performance ends it later than the file."""

    onset: int
    offset: int
    pitch: int
    velocity: int
    moved: bool


class _Part(NamedTuple):
    """The events of a part of a file, from tick 0 to tick `end`, and a clock with its last tempo going on."""

    division: bytes
    tracks: list[list[Event]]
    clock: Clock
    end: int


def continued(prompt: PromptFile, read: Performance, piece: Performance, *, pedal: bool) -> bytes:
    """Write a performance that begins with a part of a MIDI file.

    Notes that sound where the prompt ends are released by their keys when they end in the performance.

    Args:
        prompt: the file, and where the prompt ends.
        read: that part of the file as read, or more of it.
        piece: the performance.
        pedal: whether to unfold the new notes into key releases and pedal.

    Raises:
        MidiError: the file cannot be split into events, or the performance does not begin with its notes.
    """
    part = _part(prompt)
    notes, new = _split(part, prompt, read, piece)
    cut = max([part.end, *(note.offset for note in notes if not note.moved)])
    tracks, channels = _ended(part.tracks, notes, cut)
    _raise_pedals(tracks, cut)
    if len(new.pitch):
        tracks += _new_tracks(new, part, tracks, channels, pedal)
    ordered = [sorted(track, key=lambda event: event.tick) for track in tracks]
    return RawFile(part.division, ordered).to_bytes()


def _new_tracks(
    new: TickNotes, part: _Part, tracks: list[list[Event]], channels: dict[int, list[_Note]], pedal: bool
) -> list[list[Event]]:
    """Write the new notes on the channel that has most notes; those that overlap with a note of it on free channels."""
    main = min(channels, key=lambda channel: (-len(channels[channel]), channel), default=0)
    used = {event.channel for track in tracks for event in track if event.kind < SYSEX}
    held = np.array([note for note in channels[main] if note.moved], np.int64).reshape(-1, len(_Note._fields))
    _, offset, pitch, velocity, _ = held.T
    sounding = TickNotes(np.full(len(held), part.end), offset, pitch, velocity)
    return note_tracks(
        TickNotes(*(np.concatenate(columns) for columns in zip(sounding, new, strict=True))),
        channels=[main, *(channel for channel in PIANO_CHANNELS if channel not in used)],
        name=TRACK_NAME,
        program=None,
        pedal_ticks_per_s=1.0 / part.clock.tick_s[-1] if pedal else None,
        sounding=len(held),
    )


def _part(prompt: PromptFile) -> _Part:
    """Cut the part out of the file, and divide its ticks if they are too coarse for new notes."""
    if len(prompt.midi) > _MAX_BYTES:
        raise MidiError(f"at most {_MAX_BYTES} bytes of a prompt's events are kept")
    midi = RawFile.parse(prompt.midi)
    start, end = _bounds(midi, prompt)
    factor = min(math.ceil(midi.clock().until(end).tick_s[-1] / _COARSEST_TICK_S), midi.finest())
    if factor > 1:
        midi, start, end = midi.finer(factor), start * factor, end * factor
    clock = midi.clock().until(end)
    shifted = Clock(tick=clock.tick - start, start_s=clock.start_s - prompt.start_s, tick_s=clock.tick_s)
    return _Part(midi.division, [_cropped(track, start, end) for track in midi.tracks], shifted, end - start)


def _bounds(midi: RawFile, prompt: PromptFile) -> tuple[int, int]:
    """The ticks at which the part begins, and of its last event."""
    clock = midi.clock()
    start = int(clock.ticks(np.array([prompt.start_s]))[0]) if prompt.start_s else 0
    ticks = np.array([event.tick for track in midi.tracks for event in track], np.int64)
    inside = ticks[clock.seconds(ticks) - prompt.start_s < prompt.end_s + _HALF_STEP_S]
    return start, max(start, int(inside.max(initial=0)))


def _cropped(track: list[Event], start: int, end: int) -> list[Event]:
    """Take the events from `start` to `end`, and before them what earlier events have set that still holds."""
    if start == 0:
        return [event for event in track if event.tick <= end]
    lasting = {_what_it_sets(event): event.data for event in track if event.tick < start}
    return [
        *(Event(0, data) for what, data in lasting.items() if what is not None),
        *(Event(event.tick - start, event.data) for event in track if start <= event.tick <= end),
    ]


def _what_it_sets(event: Event) -> bytes | None:
    """What a later event of the same kind sets anew; None if the event does not last."""
    if event.kind == META:
        return None if event.data[1] in _MOMENTARY_METAS else event.data[:2]
    if event.kind in (NOTE_OFF, NOTE_ON, _POLY_PRESSURE):
        return None
    return event.data[:2] if event.kind == CONTROL else event.data[:1] if event.kind < SYSEX else event.data


def _split(part: _Part, prompt: PromptFile, read: Performance, piece: Performance) -> tuple[list[_Note], TickNotes]:
    """Tell the notes of the prompt in the performance from new ones."""
    places = defaultdict[tuple[float, int, int], list[int]](list)
    for place, key in enumerate(
        zip(piece.onset_s.tolist(), piece.pitch.tolist(), piece.velocity.tolist(), strict=True)
    ):
        places[key].append(place)
    onset, offset = part.clock.ticks(piece.onset_s), part.clock.ticks(piece.offset_s)
    is_new, notes = np.ones(len(piece), bool), []
    rows = zip(*(column.tolist() for column in (read.onset_s, read.offset_s, read.pitch, read.velocity)), strict=True)
    for onset_s, offset_s, pitch, velocity in rows:
        if onset_s >= prompt.end_s + _HALF_STEP_S:
            break
        if not (found := places[onset_s, pitch, velocity]):
            raise MidiError("the performance does not begin with the notes of its prompt")
        place = found.pop(0)
        is_new[place] = False
        moved = float(piece.offset_s[place]) != offset_s
        end = max(int(offset[place]), part.end + 1) if moved else int(offset[place])
        notes.append(_Note(int(onset[place]), end, pitch, velocity, moved))
    onset = np.maximum(onset, part.end)
    new = TickNotes(onset, np.maximum(offset, onset + 1), piece.pitch, piece.velocity)
    return notes, new.select(is_new)


def _ended(tracks: list[list[Event]], notes: list[_Note], cut: int) -> tuple[list[list[Event]], dict[int, list[_Note]]]:
    """End the notes where the performance ends them; also return the notes of each channel."""
    waiting, channels = defaultdict[tuple[int, int, int], list[_Note]](list), defaultdict[int, list[_Note]](list)
    for note in reversed(notes):
        waiting[note.onset, note.pitch, note.velocity].append(note)

    def struck(event: Event) -> _Note | None:
        """The note that an event begins; None if it is no note of the performance, such as a drum."""
        found = [] if event.channel == DRUM_CHANNEL else waiting[event.tick, event.data[1], event.data[2]]
        if found:
            channels[event.channel].append(found[-1])
        return found.pop() if found else None

    ended = [_ended_track(track, struck, cut) for track in tracks]
    if any(waiting.values()):
        raise MidiError("the notes of the prompt are not among the events of its file")
    return ended, channels


def _ended_track(track: list[Event], struck: Callable[[Event], _Note | None], cut: int) -> list[Event]:
    kept, sounding = list[Event](), defaultdict[tuple[int, int], list[_Note | None]](list)
    for event in track:
        key = event.channel, event.data[1]
        if event.is_note_on:
            sounding[key].append(struck(event))
        elif event.is_note_off:
            if any(note is not None and note.moved for note in sounding[key]):
                continue  # the pedal or the end of the prompt would have ended it
            sounding[key].clear()
        kept.append(event)
    for (channel, pitch), held in sounding.items():
        for note in held:
            kept.append(Event(cut if note is None else note.offset, bytes([NOTE_OFF | channel, pitch, 0])))
    return kept


def _raise_pedals(tracks: list[list[Event]], cut: int) -> None:
    """Add events that raise the pedals which are down at the end of the prompt."""
    last: dict[tuple[int, int], tuple[int, int, int]] = {}
    for number, track in enumerate(tracks):
        for event in track:
            if event.kind == CONTROL and event.data[1] in _PEDALS:
                pedal = event.channel, event.data[1]
                if pedal not in last or event.tick >= last[pedal][0]:  # of two at one tick, the later track's counts
                    last[pedal] = event.tick, number, event.data[2]
    for (channel, controller), (_, number, value) in last.items():
        if value:
            tracks[number].append(Event(cut, bytes([CONTROL | channel, controller, 0])))
