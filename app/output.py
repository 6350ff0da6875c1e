"""The files that commands write pieces to: MIDI or sound, by their ending."""

from collections.abc import Callable
from pathlib import Path

from app.console import CommandError

MIDI_ENDINGS = (".mid", ".midi")
AUDIO_ENDINGS = (".wav", ".mp3", ".flac", ".ogg")


def is_audio(path: Path) -> bool:
    """Whether a piece is written to this file as sound, and not as MIDI.

    Raises:
        CommandError: the ending is of neither.
    """
    ending = path.suffix.lower()
    if ending not in (*MIDI_ENDINGS, *AUDIO_ENDINGS):
        got = f"it ends in {path.suffix}" if ending else "it has no ending"
        raise CommandError(
            f"cannot write {path}: {got}; name a MIDI file ({', '.join(MIDI_ENDINGS)}) or a sound file "
            f"({', '.join(AUDIO_ENDINGS)})"
        )
    return ending in AUDIO_ENDINGS


def import_write_audio(asked: str) -> Callable[..., None]:
    """Import `music_ar.audio.write_audio`.

    Args:
        asked: the option that needs it, for the message.

    Raises:
        CommandError: the extra is not installed.
    """
    try:
        from music_ar.audio import write_audio
    except ImportError as error:
        raise CommandError(f"{asked} needs the extra `audio` (pip install '.[audio]'); {error}") from error
    return write_audio
