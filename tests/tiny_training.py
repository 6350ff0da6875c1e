"""A tiny training run: its model, data and options, shared by the tests of training."""

import dataclasses
import functools
import json
from typing import Any

import numpy as np
from conftest import noisy_model
from flax import nnx

from music_ar.model.config import ModelConfig
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.tokens import vocabulary
from music_ar.training.config import TrainingConfig
from music_ar.training.trainer import Trainer

M, N, B = 12, 8, 4
CONFIG = ModelConfig(
    context=M, latents=N, width=16, layers=1, heads=4, kv_heads=2, head_size=4, hidden=32, conv_width=3
)
# Checkpoints after every step, the hardest case for whatever may be saved while it changes.
TRAINING = TrainingConfig(
    steps=6, batch_size=B, warmup_steps=2, decay_fraction=0.6, log_every=2, checkpoint_minutes=0.0, final_fraction=0.5
)
# Without randomness, and without checkpoints on the way.
EXACT = dataclasses.replace(TRAINING, dropout=0.0, prefix_keep=1.0, checkpoint_minutes=5.0)


class CountingBatches:
    """Batch i consists of rising sequences, easy to learn, drawn from i; some of its weights are not 1."""

    def __init__(self):
        self.next = 0

    def __next__(self):
        rng = np.random.default_rng(self.next)
        tokens = (
            rng.integers(0, 300, (B, 1)) + np.arange(M + 1) * rng.integers(1, 4, (B, 1))
        ) % vocabulary.VOCABULARY_SIZE
        self.next += 1
        return {"tokens": tokens.astype(np.int32), "weights": rng.choice([0.5, 1, 1], (B, N)).astype(np.float32)}

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


@functools.cache
def fresh_model():
    return PerceiverAR(CONFIG, rngs=nnx.Rngs(0))


@functools.cache
def noisy():
    return noisy_model(CONFIG)


def run(output, config=TRAINING, **options: Any):
    """Fits the fresh model to counting batches."""
    options = {"final_batches": CountingBatches()} | options
    return Trainer(fresh_model(), config, CountingBatches(), output=output, **options).fit()


def log_of(output, *names):
    """The log without what depends on the time of day."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [tuple(line.get(name) for name in (names or ("step", "loss", "gradient_norm", "rate"))) for line in lines]
