"""Load a pretrained model, ready to decode in the fastest way known for this machine."""

import os

from music_ar.decoding import backend as backends
from music_ar.decoding.interface import AnyDecoder
from music_ar.model.weights import Weights, read_weights


def load_decoder(source: str | os.PathLike[str] | None = None) -> AnyDecoder:
    """A decoder of a pretrained model.

    Args:
        source: the name of a shipped checkpoint, a folder, or a hub id ("owner/name"); default: the checkpoint that
            ships with the project.

    Raises:
        CheckpointError: the model is missing, damaged, or has a different vocabulary.
        GenerationError: it does not generate.
    """
    return decoder_of(read_weights(source))


def decoder_of(weights: Weights) -> AnyDecoder:
    """A decoder of a model: on a CPU in the native engine, which needs no JAX; where that cannot run, in JAX.

    Raises:
        GenerationError: the model does not generate.
    """
    if backends.native():
        from music_ar.decoding.native.decoder import NativeDecoder

        if NativeDecoder.suits(weights.config):
            return NativeDecoder(weights.config, weights.tensors)
    from music_ar.decoding.decoder import Decoder
    from music_ar.model.pretrained import model_of

    return Decoder(model_of(weights, compute=backends.select().compute))
