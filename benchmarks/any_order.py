"""What the benchmarks of pixels and of text share: windows of any sequences, training on them, and nats a symbol."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Bool, Int

from music_ar.decoding import backend
from music_ar.evaluation.likelihood import ScoringConfig, score_tokens
from music_ar.model.config import ModelConfig
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.pretrained import save_pretrained
from music_ar.training.config import TrainingConfig
from music_ar.training.trainer import Trainer

Sequences = Sequence[Int[np.ndarray, " _"]]


class WindowBatches(Iterator[dict[str, np.ndarray]]):
    """Windows that end anywhere in a sequence; `training.trainer.Batches`.

    Args:
        sequences: token arrays; long ones are chosen more often.
        config: the model's sizes.
        rows: windows of a batch.
        is_symbol: which tokens are targets.
        seed: of the windows.
    """

    def __init__(
        self, sequences: Sequences, config: ModelConfig, rows: int, is_symbol: Bool[np.ndarray, " V"], seed: int
    ):
        self._sequences, self._config, self._rows, self._is_symbol = sequences, config, rows, is_symbol
        lengths = np.array([len(sequence) for sequence in sequences])
        self._chances = lengths / lengths.sum()
        self._rng = np.random.default_rng(seed)

    def __next__(self) -> dict[str, np.ndarray]:
        M, N = self._config.context, self._config.latents
        tokens = np.full((self._rows, M + 1), self._config.pad, np.int32)
        for row, index in zip(tokens, self._rng.choice(len(self._chances), self._rows, p=self._chances), strict=True):
            length = len(self._sequences[index])
            # Each token is in as many windows as any other, but for those at the end.
            end = min(length, self._rng.integers(2, length + 1) + self._rng.integers(N))
            window = self._sequences[index][max(0, end - M - 1) : end]
            row[M + 1 - len(window) :] = window
        weights = self._is_symbol[tokens[:, -N:]] & (tokens[:, -N - 1 : -1] != self._config.pad)
        return {"tokens": tokens, "weights": weights.astype(np.float32)}

    def get_state(self) -> Any:
        """The state of the random numbers."""
        return self._rng.bit_generator.state

    def set_state(self, state: Any) -> None:
        """Continue from a state."""
        self._rng.bit_generator.state = state


def trained(
    config: ModelConfig, sequences: Sequences, is_symbol: Bool[np.ndarray, " V"], steps: int, seed: int, output: Path
) -> PerceiverAR:
    """Train a new model on windows of the sequences, and save it."""
    training = TrainingConfig(
        steps=steps, batch_size=32, dropout=0.0, prefix_keep=1.0, ema_decay=0.99, checkpoint_minutes=1e5, seed=seed
    )
    model = PerceiverAR(config, rngs=nnx.Rngs(seed), compute=backend.select().compute)
    batches = WindowBatches(sequences, config, training.batch_size, is_symbol, seed)
    fitted = Trainer(model, training, batches, output=output).fit()
    save_pretrained(fitted.model, output / "model")
    return fitted.model


def nats_per_symbol(model: PerceiverAR, sequences: Sequences, is_symbol: Bool[np.ndarray, " V"], stride: int) -> float:
    """Mean NLL of the targets of held-out sequences, each predicted once."""
    nats = score_tokens(model, sequences, ScoringConfig(stride=stride))
    of_symbols = [of_each[0][is_symbol[each[1:]]] for of_each, each in zip(nats, sequences, strict=True)]
    return float(np.concatenate(of_symbols).mean())


def report(**result: str | float) -> None:
    """Print a line of JSON."""
    print(json.dumps(result), flush=True)
