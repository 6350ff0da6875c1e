"""Parity, the task of the AdaTape paper that Transformers fail: whether the number of ones among random bits is odd.

    python benchmarks/parity.py --output parity [--lengths 8 16 32] [--models tape perceiver-ar decoder-only]

Trains each model on sequences of one bit up to a length, then scores it on new sequences of half of that length, of the
length and of twice as many bits as it was trained on. Prints one line of JSON for each model and length. The models
have about as many parameters: those without a tape have a layer more.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from music_ar.model.config import ModelConfig, TapeConfig
from music_ar.model.perceiver_ar import PerceiverAR, parameter_count
from music_ar.tokens import vocabulary
from music_ar.training.config import TrainingConfig
from music_ar.training.trainer import Trainer

MODELS = ("tape", "perceiver-ar", "decoder-only")
_ASK = 2  # the token after the bits, which are 0 and 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--models", choices=MODELS, nargs="+", default=MODELS)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.01, help="of Muon")
    parser.add_argument("--ponder-weight", type=float, default=0.0003)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--held-out", type=int, default=1024, help="sequences to score", metavar="N")
    arguments = parser.parse_args()
    for length in arguments.lengths:
        for name in arguments.models:
            for seed in arguments.seeds:
                print(json.dumps(result(arguments, name, length, seed)), flush=True)


def result(arguments: argparse.Namespace, name: str, length: int, seed: int) -> dict[str, Any]:
    """Train a model and score it."""
    began = time.monotonic()
    config = model_config(name, length, width=arguments.width, layers=arguments.layers)
    training = TrainingConfig(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        muon_learning_rate=arguments.learning_rate,
        adamw_learning_rate=arguments.learning_rate / 10,
        weight_decay=0.0,
        dropout=0.0,
        decay_fraction=0.5,
        ema_decay=0.99,
        prefix_keep=1.0,
        ponder_weight=arguments.ponder_weight,
        seed=seed,
        log_every=max(1, arguments.steps // 10),
        checkpoint_minutes=1e5,
    )
    batches = ParityBatches(length, config, training.batch_size, seed)
    folder = arguments.output / f"{name}-{length}-{seed}-{time.time_ns()}"
    fitted = Trainer(PerceiverAR(config, rngs=nnx.Rngs(seed)), training, batches, output=folder).fit()
    scores = {
        f"{bits} bits": score(fitted.model, bits, arguments.held_out) for bits in (length // 2, length, 2 * length)
    }
    return {
        "benchmark": "parity",
        "model": name,
        "length": length,
        "seed": seed,
        "parameters": parameter_count(fitted.model),
        "scores": scores,
        "seconds": round(time.monotonic() - began),
    }


def model_config(name: str, length: int, *, width: int, layers: int) -> ModelConfig:
    """A model that reads so many bits, and may take a tape token for each."""
    return ModelConfig(
        context=length + 2,
        latents=length + 2 if name == "decoder-only" else 1,
        width=width,
        layers=layers if name == "tape" else layers + 1,
        heads=4,
        kv_heads=4,
        head_size=width // 4,
        hidden=2 * width,
        tape=TapeConfig(tokens=length + 1, learned=4) if name == "tape" else None,
    )


class ParityBatches(Iterator[dict[str, np.ndarray]]):
    """Sequences of one bit up to a length, each followed by whether its ones are odd; `training.trainer.Batches`."""

    def __init__(self, length: int, config: ModelConfig, rows: int, seed: int):
        self._length, self._config, self._rows = length, config, rows
        self._rng = np.random.default_rng(seed)

    def __next__(self) -> dict[str, np.ndarray]:
        counts = self._rng.integers(1, self._length + 1, self._rows)
        weights = np.zeros((self._rows, self._config.latents), np.float32)
        weights[:, -1] = 1  # of the answer alone
        return {"tokens": sequences(self._rng, counts, self._config.context), "weights": weights}

    def get_state(self) -> Any:
        """The state of the random numbers."""
        return self._rng.bit_generator.state

    def set_state(self, state: Any) -> None:
        """Continue from a state."""
        self._rng.bit_generator.state = state


def sequences(rng: np.random.Generator, counts: Int[np.ndarray, " B"], context: int) -> Int[np.ndarray, "B T"]:
    """START, so many random bits each, the question and its answer, left-padded."""
    tokens = np.full((len(counts), context + 1), vocabulary.PAD, np.int32)
    for row, count in zip(tokens, counts, strict=True):
        bits = rng.integers(0, 2, count)
        row[-count - 3 :] = [vocabulary.START, *bits, _ASK, bits.sum() % 2]
    return tokens


def score(model: PerceiverAR, bits: int, rows: int) -> dict[str, float]:
    """Share of right answers, of sequences that training does not see, and the tape tokens that they took."""
    context = bits + 2
    config = dataclasses.replace(model.config, context=context, latents=min(model.config.latents, context))
    if config.latents > 1:  # the decoder-only Transformer
        config = dataclasses.replace(config, latents=context)
    graph = nnx.split(nnx.eval_shape(lambda: PerceiverAR(config, rngs=nnx.Rngs(0))), nnx.Param)[0]
    tokens = sequences(np.random.default_rng([bits, 2**31]), np.full(rows, bits), config.context)
    answers, taken = _answers(graph, nnx.state(model, nnx.Param), jnp.asarray(tokens[:, :-1]))
    found = {"percent": round(100 * float((np.asarray(answers) == tokens[:, -1]).mean()), 1)}
    return found if taken is None else found | {"tape tokens": round(float(taken.mean()), 2)}


@functools.partial(jax.jit, static_argnums=0)
def _answers(
    graph: nnx.GraphDef[PerceiverAR], params: nnx.State, tokens_BxT: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    model = nnx.merge(graph, params)
    depths, _, tape = model.predict(tokens_BxT, depths=model.config.depths)
    return depths[-1][:, -1, :2].argmax(axis=-1), None if tape is None else tape.reads_B


if __name__ == "__main__":
    main()
