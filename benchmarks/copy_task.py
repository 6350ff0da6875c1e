"""The copy task of the Perceiver AR paper: random tokens, then the same again, up to 131,072 tokens in all.

    python benchmarks/copy_task.py --output copy [--lengths 2048 8192 32768 131072] [--minutes 1 1 1.5 3]
        [--model transformer-xl]

Trains one model on growing lengths, then scores held-out sequences: the share of the second half that is the likeliest
token, in a forward pass and through the decoder's caches. Prints one line of JSON for each score.
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
from context_length import MODELS, of_family
from flax import nnx
from jaxtyping import Bool, Int

from music_ar.decoding import backend
from music_ar.decoding.decoder import Decoder
from music_ar.model.config import ModelConfig
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.pretrained import load_pretrained, save_pretrained
from music_ar.tokens import vocabulary
from music_ar.training.config import TrainingConfig
from music_ar.training.log import Progress
from music_ar.training.trainer import Trainer

SYMBOLS = 256
_TOKENS_PER_STEP = 131_072


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768, 131072])
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 1, 1.5, 3])
    parser.add_argument("--latents", type=int, default=1024, help="or the length of a segment")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--start", help="a folder or a name: begin with the weights of this model")
    parser.add_argument("--model", choices=MODELS, default="perceiver-ar")
    parser.add_argument("--held-out", type=int, default=4, help="sequences to score", metavar="N")
    parser.add_argument("--decoded", type=int, default=4096, help="tokens to score through the caches", metavar="N")
    arguments = parser.parse_args()

    model = load_pretrained(arguments.start) if arguments.start else None
    for stage, (length, minutes) in enumerate(zip(arguments.lengths, arguments.minutes, strict=True)):
        last = stage == len(arguments.lengths) - 1
        model = trained(arguments, model, length, minutes, last=last)
        report(arguments, model, length, minutes=minutes)
    assert model is not None
    save_pretrained(model, arguments.output / "model")
    report_decoding(arguments, model, arguments.lengths[-1])


def trained(
    arguments: argparse.Namespace, before: PerceiverAR | None, length: int, minutes: float, *, last: bool
) -> PerceiverAR:
    """Train on sequences of one length, from the weights of the shorter ones."""
    sizes = ModelConfig(
        width=arguments.width,
        layers=arguments.layers,
        heads=arguments.width // 64,
        kv_heads=max(1, arguments.width // 256),
        hidden=3 * arguments.width,
        conv_width=8,
    )
    model_config = of_family(sizes, arguments.model, length, min(arguments.latents, length // 2))
    model = PerceiverAR(model_config, rngs=nnx.Rngs(0), compute=backend.select().compute)
    if before is not None:
        nnx.update(model, nnx.state(before, nnx.Param))
    config = TrainingConfig(
        minutes=minutes,
        batch_size=max(1, _TOKENS_PER_STEP // length),
        dropout=0.0,
        weight_decay=0.0,
        prefix_keep=1.0,
        decay_fraction=0.5 if last else 0.1,
        ema_decay=0.99,
        log_every=100,
        checkpoint_minutes=1e5,
    )
    batches = CopyBatches(length, model_config.latents, config.batch_size, seed=length)
    folder = arguments.output / f"{length}-{time.time_ns()}"
    return Trainer(model, config, batches, output=folder, on_progress=print_progress).fit().model


def print_progress(progress: Progress) -> None:
    """Print a log line of training."""
    speed = f"{progress.tokens_per_s / 1e6:.3f} M targets/s"
    print(f"{progress.elapsed_s:6.0f} s  step {progress.step:6}  loss {progress.loss:.4f}  {speed}", flush=True)


class CopyBatches(Iterator[dict[str, np.ndarray]]):
    """Windows that end anywhere in the second half of a new random sequence; `training.trainer.Batches`.

    Args:
        length: tokens of a sequence.
        latents: targets of a window.
        rows: windows of a batch.
        seed: of the sequences.
    """

    def __init__(self, length: int, latents: int, rows: int, seed: int):
        self._length, self._latents, self._rows = length, latents, rows
        self._rng = np.random.default_rng(seed)

    def __next__(self) -> dict[str, np.ndarray]:
        half = self._length // 2
        tokens = np.full((self._rows, self._length + 1), vocabulary.PAD, np.int32)
        for row in tokens:
            end = self._rng.integers(half + self._latents, self._length + 1) if self._latents <= half else self._length
            row[self._length + 1 - end :] = sequence(self._rng, self._length)[:end]
        # A model without a prefix also predicts the first half, which is random.
        copied = np.arange(self._latents)[::-1] < half
        weights = np.broadcast_to(copied.astype(np.float32), (self._rows, self._latents))
        return {"tokens": tokens, "weights": np.ascontiguousarray(weights)}

    def get_state(self) -> Any:
        """The state of the random numbers."""
        return self._rng.bit_generator.state

    def set_state(self, state: Any) -> None:
        """Continue from a state."""
        self._rng.bit_generator.state = state


def sequence(rng: np.random.Generator, length: int) -> Int[np.ndarray, " length"]:
    """START and random symbols, then the same again."""
    symbols = rng.integers(0, SYMBOLS, length // 2 - 1)
    return np.tile(np.concatenate([[vocabulary.START], symbols]), 2).astype(np.int32)


def held_out(length: int, number: int) -> Int[np.ndarray, " length"]:
    """A sequence that training does not see."""
    return sequence(np.random.default_rng([number, 2**31]), length)


def report(arguments: argparse.Namespace, model: PerceiverAR, length: int, **more: Any) -> None:
    """Print the share of the second halves of held-out sequences that is predicted."""
    right = np.concatenate([predicted(model, held_out(length, number)) for number in range(arguments.held_out)])
    result = {"benchmark": "copy_task", "length": length, "right": int(right.sum()), "of": len(right)}
    print(json.dumps(result | {"percent": 100 * right.mean()} | more), flush=True)


def predicted(model: PerceiverAR, tokens: Int[np.ndarray, " T"]) -> Bool[np.ndarray, " half"]:
    """Whether each token of the second half, after START, is the likeliest."""
    length, latents = len(tokens), model.config.latents
    graph, params = nnx.split(model, nnx.Param)
    right = np.zeros(length + 1, bool)
    for end in {*range(length // 2 + latents, length, latents), length - 1}:
        row = np.full((1, length), vocabulary.PAD, np.int32)
        row[0, length - end :] = tokens[:end]
        best = np.asarray(_likeliest(graph, params, jnp.asarray(row)))[0]
        right[end + 1 - latents : end + 1] = best == tokens[end + 1 - latents : end + 1]
    return right[length // 2 + 1 : length]


@functools.partial(jax.jit, static_argnums=0)
def _likeliest(graph: nnx.GraphDef[PerceiverAR], params: nnx.State, tokens_BxT: jax.Array) -> jax.Array:
    return nnx.merge(graph, params)(tokens_BxT).argmax(axis=-1)


def report_decoding(arguments: argparse.Namespace, model: PerceiverAR, length: int) -> None:
    """Print the share of tokens that the decoder predicts, one by one, from the start and the end of the second half.

    If all are right, decoding without randomness copies them.
    """
    decoder = Decoder(model, dataclasses.replace(backend.select(), attention="plain", micro_batch_rows=None))
    tokens = held_out(length, 0)
    for first in (length // 2 + 1, length - arguments.decoded):
        following = tokens[first : first + arguments.decoded]
        began = time.perf_counter()
        state = decoder.start([tokens[:first]], latents=model.config.most_latents, seeds=[0], limit_steps=2**30)
        _, logits = decoder.teacher_force(state, following[None])
        right = np.asarray(logits)[0].argmax(axis=-1) == following
        result = {"benchmark": "copy_task_decoding", "length": length, "first": first, "percent": 100 * right.mean()}
        print(json.dumps(result | {"seconds": round(time.perf_counter() - began, 1)}), flush=True)


if __name__ == "__main__":
    main()
