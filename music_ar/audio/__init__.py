"""`Performance` -> sound. Needs soundfile and scipy, which come with the extra `audio`."""

from music_ar.audio.synthesis import AudioError, AudioFormat, render, write_audio

__all__ = ["AudioError", "AudioFormat", "render", "write_audio"]
