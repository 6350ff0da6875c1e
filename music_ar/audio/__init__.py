"""`Performance` -> sound."""

from music_ar.audio.synthesis import render, write_audio

__all__ = ["render", "write_audio"]
