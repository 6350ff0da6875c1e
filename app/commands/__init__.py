"""The commands of `music-ar`, one module each."""
