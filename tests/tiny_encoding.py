"""A tiny training run of a piece encoder: its model, data and options."""

import functools

import numpy as np
from flax import nnx
from tiny_maestro import pieces_of

from data_pipeline.passage_loader import passage_batches
from data_pipeline.passages import AUGMENTATION, PassageConfig, Passages
from music_ar.embedding.config import PieceEncoderConfig
from music_ar.embedding.encoder import PieceEncoder
from music_ar.midi.performance import Performance
from music_ar.tokens.codec import encode
from music_ar.training.config import EncoderTrainingConfig
from music_ar.training.piece_encoding import PieceEncoding
from music_ar.training.trainer import Trainer

B = 4
CONFIG = PieceEncoderConfig(
    size=8,
    earlier=3,
    time_bands=4,
    channels=24,
    latents=4,
    width=16,
    layers=1,
    reads=1,
    heads=2,
    kv_heads=1,
    head_size=8,
    hidden=24,
)
TRAINING = EncoderTrainingConfig(
    steps=6, batch_size=B, warmup_steps=2, log_every=2, checkpoint_minutes=0.0, validate_every=0
)
PASSAGES = PassageConfig(notes=48, min_passage=5.0, max_passage=8.0)


def regular_performance(number, notes=160):
    """Notes at equal distances, each some semitones above the one before, until they begin again below."""
    onset_s = np.arange(notes) * (0.12 + 0.06 * number)
    return Performance(
        onset_s=onset_s,
        offset_s=onset_s + 0.1 * (number + 1),
        pitch=40 + np.arange(notes) * (number + 2) % 41,
        velocity=np.full(notes, 40 + 10 * number),
    )


@functools.cache
def passages(seed=0):
    """Passages of five pieces of 20 to 60 seconds, each with an interval and a rhythm of its own."""
    pieces = pieces_of([encode(regular_performance(number)) for number in range(5)])
    return Passages.of(pieces, config=PASSAGES, augmentation=AUGMENTATION, seed=seed)


@functools.cache
def fresh_encoder():
    return PieceEncoder(CONFIG, rngs=nnx.Rngs(0))


def run(output, config=TRAINING, *, batches=None, **options):
    """Fits the fresh encoder."""
    batches = passage_batches(passages(), config.batch_size, threads=0) if batches is None else batches
    return Trainer(fresh_encoder(), config, batches, objective=PieceEncoding(config), output=output, **options).fit()
