"""`music-ar bench`: how fast this machine decodes, and what each latent budget costs in likelihood."""

import dataclasses
import itertools
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from app.console import CommandError, ProgressLine, print_table
from data_pipeline.loader import Pieces
from music_ar import events
from music_ar.checkpoint import load_released, write_atomically
from music_ar.decoding import Decoder, DecodeState, WindowMode
from music_ar.evaluation import score_decoding
from music_ar.generator import CHUNK_TOKENS, MAESTRO_TOKENS_PER_S
from music_ar.model import PerceiverAR
from music_ar.sampling import SamplingOptions

_BANDWIDTH_SIZE = 8192


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting's figures, as in the JSON line."""

    context: int
    latents: int
    batch: int
    mode: str
    tokens_per_s: float
    first_note_s: float
    times_real_time: float
    nats_per_token: float | None
    share_of_limit: float


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Times decoding under latent budgets; with prepared data, also scores each budget through the decoder.

    Prints a table and, last, one line of JSON. The limit is the machine's memory bandwidth, measured in the same run by
    a large matrix-vector product: a step must read every weight and every cache once.

    Attributes:
        what: what to time.
        checkpoint: name of a shipped model, a folder, or a hub id (owner/name); by default the shipped one.
        latents: latent budgets.
        mode: how the windows of latents go on once they are full.
        context: contexts to give the model; by default its own.
        batch: pieces at once.
        tokens: tokens a piece to time, after the first chunk.
        data: folder that `music-ar prepare` wrote; without it there is no score.
        pieces: validation pieces to score.
        piece_tokens: how much of each, from its start.
        output: JSON file to write as well.
    """

    what: tyro.conf.Positional[Literal["decode"]]
    checkpoint: str | None = None
    latents: tuple[int, ...] = (64, 256, 1024, 2048)
    mode: tuple[WindowMode, ...] = ("sliding",)
    context: tuple[int, ...] = ()
    batch: tuple[int, ...] = (1, 4)
    tokens: int = 256
    data: Path | None = None
    pieces: int = 8
    piece_tokens: int = 4096
    output: Path | None = None

    def __post_init__(self) -> None:
        if min((self.tokens, self.pieces, self.piece_tokens, *self.latents, *self.context, *self.batch)) < 1:
            raise CommandError("every number must be at least 1")

    def run(self) -> None:
        """Prints the table and the line of JSON."""
        model = load_released(self.checkpoint)
        if max(self.latents) > model.config.latents:
            raise CommandError(f"--latents must be at most {model.config.latents}, got {max(self.latents)}")
        pieces = self._pieces()
        bytes_per_s = read_bandwidth()
        rows = []
        with ProgressLine(f"memory reads {bytes_per_s / 1e9:.1f} GB/s") as line:
            for context, mode, latents in itertools.product(
                self.context or (model.config.context,), self.mode, self.latents
            ):
                decoder = Decoder(with_context(model, context))
                line.report(0.0, f"context {context}, {mode}, {latents} latents")
                nats = score_decoding(decoder, pieces, latents=latents, mode=mode).nats_per_token if pieces else None
                rows += [self._row(decoder, latents, mode, batch, nats, bytes_per_s) for batch in self.batch]
        names = [field.name for field in dataclasses.fields(Row)]
        print_table(
            [name.replace("_", " ") for name in names], [[_cell(getattr(row, n)) for n in names] for row in rows]
        )
        result = json.dumps(
            {
                "device": jax.devices()[0].device_kind,
                "checkpoint": self.checkpoint,
                "bytes_per_s": round(bytes_per_s),
                "rows": [dataclasses.asdict(row) for row in rows],
            }
        )
        if self.output is not None:
            write_atomically(self.output, result.encode() + b"\n")
        print(result)

    def _pieces(self) -> list[np.ndarray]:
        if self.data is None:
            return []
        held_out = Pieces.open(self.data, "validation").tokens[: self.pieces]
        return [tokens[: self.piece_tokens] for tokens in held_out]

    def _row(
        self, decoder: Decoder, latents: int, mode: WindowMode, batch: int, nats: float | None, bytes_per_s: float
    ) -> Row:
        prompt = _some_prompt(decoder.config.context)

        def first_chunk() -> tuple[DecodeState, float]:
            """The state after prefill and a first chunk, as `Generator` would hand it out, and the seconds it took."""
            began = time.perf_counter()
            state = decoder.start([prompt] * batch, latents=latents, seeds=range(batch), limit_steps=2**30, mode=mode)
            state, _ = next_chunk(state)
            return state, time.perf_counter() - began

        def next_chunk(state: DecodeState) -> tuple[DecodeState, float]:
            began = time.perf_counter()
            state, tokens = decoder.decode(state, SamplingOptions().filters(), length=CHUNK_TOKENS)
            tokens.block_until_ready()
            return state, time.perf_counter() - began

        first_chunk()  # compiles
        state, first_note_s = first_chunk()
        chunk_s = []
        for _ in range(-(-self.tokens // CHUNK_TOKENS)):
            state, seconds = next_chunk(state)
            chunk_s.append(seconds)
        step_s = statistics.median(chunk_s) / CHUNK_TOKENS
        read = sum(leaf.nbytes for leaf in jax.tree.leaves((decoder.params, state.caches)))
        return Row(
            context=decoder.config.context,
            latents=latents,
            batch=batch,
            mode=mode,
            tokens_per_s=batch / step_s,
            first_note_s=first_note_s,
            times_real_time=1 / step_s / MAESTRO_TOKENS_PER_S,
            nats_per_token=nats,
            share_of_limit=read / bytes_per_s / step_s,
        )


def with_context(model: PerceiverAR, context: int) -> PerceiverAR:
    """The same weights reading another number of inputs."""
    if context == model.config.context:
        return model
    model = nnx.clone(model)
    model.config = dataclasses.replace(model.config, context=context)
    return model


def read_bandwidth() -> float:
    """Bytes a second that a large matrix-vector product reads, on the default device; the best of ten."""
    matrix, vector = jnp.ones((_BANDWIDTH_SIZE, _BANDWIDTH_SIZE)), jnp.ones(_BANDWIDTH_SIZE)
    product = jax.jit(jnp.dot)
    product(matrix, vector).block_until_ready()
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        product(matrix, vector).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return matrix.nbytes / min(seconds)


def _some_prompt(length: int) -> np.ndarray:
    """Repeated notes; what they are does not matter to the time."""
    note = [events.NOTE_ON + 60, events.TIME_SHIFT + 19, events.NOTE_OFF + 60, events.TIME_SHIFT + 9]
    tokens = np.resize(note, length)
    tokens[:2] = events.START, events.VELOCITY + 15
    return tokens.astype(np.int32)


def _cell(value: float | str | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:,.4g}"
