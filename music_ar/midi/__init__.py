"""Standard MIDI Files <-> `Performance`."""

from music_ar.midi.io import read_midi, read_prompt, write_midi
from music_ar.midi.performance import MidiError, Performance

__all__ = ["MidiError", "Performance", "read_midi", "read_prompt", "write_midi"]
