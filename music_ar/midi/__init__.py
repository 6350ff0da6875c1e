"""Standard MIDI Files <-> `Performance`."""
