"""Standard MIDI Files <-> `Performance`."""

from music_ar.midi.io import read_midi, write_midi
from music_ar.midi.performance import MidiError, Performance

__all__ = ["MidiError", "Performance", "read_midi", "write_midi"]
