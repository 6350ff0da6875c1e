"""`decoder_of_rows`: the decoder whose rows are whole pieces, however many rows of the model each takes."""

from typing import Any

from music_ar.decoding.guidance import GuidedDecoder
from music_ar.decoding.interface import AnyDecoder
from music_ar.decoding.request import Request


def decoder_of_rows(decoder: AnyDecoder, request: Request) -> Any:
    """Return a decoder of pieces like this one: with guidance and with choices, if it asks for them."""
    guided = GuidedDecoder(decoder) if request.wishes.is_guided else decoder
    if request.choices == 1:
        return guided
    from music_ar.decoding.choosing import ChoosingDecoder  # takes long to import

    return ChoosingDecoder(guided, request.choices)
