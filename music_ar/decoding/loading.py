"""Load a pretrained model, ready to decode in the fastest way known for this machine."""

import os

from music_ar.decoding import backend as backends
from music_ar.decoding.interface import AnyDecoder


def load_decoder(source: str | os.PathLike[str] | None = None) -> AnyDecoder:
    """A decoder of a pretrained model: on a CPU the native engine, which needs no JAX; JAX where that cannot run.

    Args:
        source: the name of a shipped checkpoint, a folder, or a hub id ("owner/name"); default: the checkpoint that
            ships with the project.

    Raises:
        CheckpointError: the model is missing, damaged, or has a different vocabulary.
    """
    native = backends.native()
    if native is not None:
        from music_ar.decoding.native.decoder import NativeDecoder
        from music_ar.model.weights import read_weights

        return NativeDecoder(read_weights(source), native)
    from music_ar.decoding.decoder import Decoder
    from music_ar.model.pretrained import load_pretrained

    return Decoder(load_pretrained(source, compute=backends.select().compute))
