"""Files to download: MIDI with the pedal, audio, and an archive of everything."""

import io
import json
import zipfile
from pathlib import Path
from typing import Literal, get_args

from app.web.session import Revision, Session
from app.web.settings import WebError
from music_ar import write_midi
from music_ar.audio import write_audio

FileKind = Literal["mid", "wav", "mp3", "zip"]
MAX_SOUND_SECONDS = 1800.0  # an audio file of this length takes half a gigabyte of memory to render


def write_file(session: Session, kind: str, folder: Path) -> Path:
    """Write the chosen variation or, as "zip", all of them with their settings, into an empty folder.

    Raises:
        WebError: there is no music, or too much for an audio file.
    """
    if kind not in get_args(FileKind):
        raise WebError(f"a download must be one of {', '.join(get_args(FileKind))}, got {kind!r}")
    revision = session.revision
    seed = revision.seeds[0 if kind == "zip" else session.chosen]
    path = folder / f"music-ar-{seed}.{kind}"
    if kind == "zip":
        path.write_bytes(_archive(revision))
        return path
    piece = revision.shown(session.chosen)
    if not len(piece):
        raise WebError("this variation has no notes yet: wait for some, or choose another")
    if kind == "mid":
        write_midi(piece, path, pedal=True)
    elif piece.duration_s > MAX_SOUND_SECONDS:
        raise WebError(
            f"an audio file may last at most {MAX_SOUND_SECONDS / 60:g} minutes; download the MIDI file instead"
        )
    else:
        write_audio(piece, path, title=f"Music AR, seed {seed}", comment=f"seed {seed}, {revision.latents} latents")
    return path


def _archive(revision: Revision) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as files:
        settings = revision.settings.flat() | {"latents_used": revision.latents, "seeds": revision.seeds}
        files.writestr("settings.json", json.dumps(settings, indent=2))
        for number, seed in enumerate(revision.seeds):
            piece = revision.shown(number)
            if not len(piece):
                continue
            midi, sound = io.BytesIO(), io.BytesIO()
            write_midi(piece, midi, pedal=True)
            files.writestr(f"{number + 1}-seed-{seed}.mid", midi.getvalue())
            if piece.duration_s <= MAX_SOUND_SECONDS:
                write_audio(piece, sound, format="mp3", title=f"Music AR, seed {seed}")
                files.writestr(f"{number + 1}-seed-{seed}.mp3", sound.getvalue())
    return archive.getvalue()
