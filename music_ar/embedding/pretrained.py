"""Pretrained piece encoders on disk: safetensors and JSON.

A folder with `config.json` (the `PieceEncoderConfig`, the fingerprint of the vocabulary whose steps the notes have, the
format, the SHA-256 of the weights) and `model.safetensors`, all parameters in float16.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flax import nnx

from music_ar.embedding.config import PieceEncoderConfig
from music_ar.embedding.encoder import PieceEncoder
from music_ar.files import parse_json, read_file, write_atomically
from music_ar.model import weights
from music_ar.model.config import Compute
from music_ar.model.pretrained import build, parameters
from music_ar.model.weights import CONFIG, ENCODER_FORMAT, WEIGHTS, CheckpointError
from music_ar.tokens.vocabulary import FINGERPRINT

_MAX_CONFIG_BYTES = 2**16


def save_encoder(encoder: PieceEncoder, folder: Path) -> None:
    """Write an encoder to a folder; see the module.

    Args:
        encoder: the encoder.
        folder: created if it is missing; files in it are replaced one by one, each atomically.
    """
    data = encoder_bytes(encoder)
    config = {
        "format": ENCODER_FORMAT,
        "fingerprint": FINGERPRINT,
        "weights_sha256": hashlib.sha256(data).hexdigest(),
        "encoder": dataclasses.asdict(encoder.config),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, data)
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def encoder_bytes(encoder: PieceEncoder) -> bytes:
    """Return the file of weights that `save_encoder` writes."""
    tensors = {name: array.astype(np.float16) for name, array in parameters(encoder).items()}
    return safetensors.numpy.save(tensors, metadata={"format": ENCODER_FORMAT})


def load_encoder(source: str | os.PathLike[str], *, compute: Compute = Compute()) -> tuple[PieceEncoder, str]:
    """Load a pretrained encoder, and the SHA-256 of its weights.

    Args:
        source: name of an encoder that ships with the project, a folder, or the id of a Hugging Face hub repository.
        compute: how it computes.

    Raises:
        CheckpointError: there is no such encoder, a file is missing or damaged, or the folder holds something else.
    """
    folder = weights.folder_of(source)
    config, sha256 = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    tensors = weights.read_tensors(path, sha256)

    def checked(name: str, shape: tuple[int, ...]) -> np.ndarray:
        array = tensors.get(name)
        if array is None or array.shape != shape or array.dtype != np.float16:
            found = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
            raise CheckpointError(f"{path}: expected {name} as float16 {list(shape)} by {CONFIG}, found {found}")
        if not np.isfinite(array).all():
            raise CheckpointError(f"{path}: {name} has numbers that are infinite or not a number; fetch it again")
        return array.astype(np.float32)

    encoder = build(lambda: PieceEncoder(config, rngs=nnx.Rngs(0), compute=compute), checked)
    if unknown := tensors.keys() - parameters(encoder).keys():
        raise CheckpointError(f"{path} has tensors that do not belong to {CONFIG}: {sorted(unknown)}")
    return encoder, sha256


def _read_config(path: Path) -> tuple[PieceEncoderConfig, str]:
    """Return the sizes of an encoder and the SHA-256 of its weights."""
    try:
        record = parse_json(read_file(path, max_bytes=_MAX_CONFIG_BYTES))
        _check_format(record["format"], path)
        if record["fingerprint"] != FINGERPRINT:
            raise CheckpointError(
                f"{path}: the encoder was trained on notes in other steps (fingerprint {record['fingerprint'][:12]}…, "
                f"expected {FINGERPRINT[:12]}…); train it again with this version"
            )
        if not isinstance(record["weights_sha256"], str):
            raise CheckpointError(f"{path} lacks the SHA-256 of the weights, so it is not a piece encoder")
        return PieceEncoderConfig(**_all_sizes(record["encoder"], path)), record["weights_sha256"]
    except OSError as error:
        raise weights.unreadable(path, error) from error
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error.args[0]}, so it is not a piece encoder") from error
    except (AttributeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not the configuration of a piece encoder: {error}") from error


def _check_format(found: Any, path: Path) -> None:
    if found == ENCODER_FORMAT:
        return
    what = "this is a model that makes music" if str(found).startswith("music-ar ") else f'the format is "{found}"'
    raise CheckpointError(f"{path}: {what}; expected a piece encoder, as `music-ar train-encoder` saves it")


def _all_sizes(sizes: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the sizes, if none is missing: weights do not show all of them, and a default would be another encoder."""
    if missing := [field.name for field in dataclasses.fields(PieceEncoderConfig) if field.name not in sizes]:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}, so it is not a piece encoder")
    return sizes
