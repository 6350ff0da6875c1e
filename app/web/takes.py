"""What the browser sends back: takes that it has kept, and what was played."""

import base64
import io
import math
import zlib
from typing import Annotated, Any
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from app.web.session import MAX_PROMPT_BYTES, MAX_PROMPT_NOTES, Revision
from app.web.settings import MAX_PROMPT_SECONDS, MAX_SECONDS, Settings, WebError
from music_ar import MidiError, Performance, read_midi, write_midi
from music_ar.decoding.request import MAX_SEED

_LONGEST_S = MAX_PROMPT_SECONDS + 10 * MAX_SECONDS
_MAX_LINK_NOTES = 1500  # characters; longer addresses are cut by some programs
_UNUSABLE = "this take cannot be read: delete it, or make it again"


class _Take(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False, frozen=True)

    take: Annotated[str, StringConstraints(min_length=1, max_length=100)]
    join: Annotated[float, Field(ge=0, le=_LONGEST_S)]
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    latents: Annotated[int, Field(ge=0)]
    settings: Annotated[str, StringConstraints(max_length=4000)]
    midi: str


def read_take(sent: Any, most_latents: int) -> Revision:
    """A take from the browser's storage as a revision, for `Session.adopt`.

    Args:
        sent: data of an event of the page.
        most_latents: what the model was trained with.

    Raises:
        WebError: it is damaged, or from another version of the page.
    """
    try:
        take = _Take.model_validate(sent)
    except ValidationError as error:
        raise WebError(_UNUSABLE) from error
    piece = read_notes(take.midi)
    values = dict(parse_qsl(take.settings.removeprefix("?"))) | {"seed": str(take.seed), "start_s": "0"}
    values = {name: value for name, value in values.items() if name not in ("end_s", "fill")}
    settings = Settings.read(values, most_latents=most_latents)
    return Revision(
        number=0,
        piece=0,
        pieces=(piece,),
        until_s=(piece.duration_s,),
        final_s=(math.inf,),
        join_s=min(take.join, piece.duration_s),
        seeds=(take.seed,),
        latents=min(take.latents, most_latents),
        settings=settings.model_copy(update={"continuation_only": False}),
        takes=(take.take,),
    )


def read_notes(midi: str) -> Performance:
    """Notes that the page has sent: a MIDI file, compressed with zlib, in base64 (also that of addresses).

    Raises:
        WebError: they cannot be read.
    """
    content = unpacked(midi)
    try:
        return read_midi(content, max_bytes=MAX_PROMPT_BYTES, max_notes=2 * MAX_PROMPT_NOTES, max_seconds=_LONGEST_S)
    except MidiError as error:
        raise WebError(_UNUSABLE) from error


def unpacked(midi: str) -> bytes:
    """The MIDI file in such a text.

    Raises:
        WebError: it is damaged, or too large.
    """
    try:
        packed = base64.b64decode(midi.replace("-", "+").replace("_", "/"), validate=True)
        content = zlib.decompressobj().decompress(packed, MAX_PROMPT_BYTES + 1)
    except (ValueError, zlib.error) as error:
        raise WebError(_UNUSABLE) from error
    if len(content) > MAX_PROMPT_BYTES:
        raise WebError(f"these are more notes than a file of {MAX_PROMPT_BYTES // 2**20} MB can hold")
    return content


def notes_for_link(piece: Performance) -> str | None:
    """The notes of a short prompt as a part of a link; None for a long one. `unpacked` reads them."""
    if not len(piece):
        return None
    file = io.BytesIO()
    write_midi(piece, file)
    text = base64.urlsafe_b64encode(zlib.compress(file.getvalue(), 9)).decode()
    return text if len(text) <= _MAX_LINK_NOTES else None
