"""`music-ar bench`: how fast this machine decodes and renders, and what each latent budget costs in likelihood."""

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from app.console import CommandError, ProgressLine, print_table
from data_pipeline.loader import Pieces
from music_ar.decoding.continuous_batching import chunk_tokens
from music_ar.decoding.decoder import Decoder
from music_ar.decoding.sampling import SamplingOptions
from music_ar.decoding.step import WindowMode
from music_ar.evaluation.likelihood import score_decoding
from music_ar.files import write_atomically
from music_ar.generator import MAESTRO_TOKENS_PER_S, Chunk, Generator, Piece, Request
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.pretrained import load_released
from music_ar.tokens import vocabulary

_BANDWIDTH_BYTES = 2**28
_ACCELERATOR_BANDWIDTH_BYTES = 2**32  # so that a large one is busy for more than its start


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
class RenderRow:
    """One way to make many pieces, as in the JSON line."""

    way: str
    latents: int
    batch: int
    pieces: int
    seconds_of_music: float
    seconds_spent: float
    tokens_per_s: float
    times_real_time: float
    times_the_loop: float


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Times decoding under latent budgets, or rendering many pieces.

    Example: music-ar bench render --latents 1024 --made 32 --seconds 60

    decode: with prepared data, also scores each budget through the decoder.

    render: `Generator.generate_many`, which `music-ar render` is made of, beside a plain loop over `generate`; both
    warmed up, both with the seeds 0, 1, ….

    Prints a table and, last, one line of JSON. For decode, the limit is the machine's memory bandwidth, measured in the
    same run by a large matrix-vector product and a sum: a step must read every weight and every cache once.

    Attributes:
        what: what to time.
        checkpoint: name of a shipped model, a folder, or a hub id (owner/name); by default the shipped one.
        latents: latent budgets.
        mode: how the windows of latents go on once they are full.
        context: decode: how many tokens attention reads; by default the model's own. What it recalls from is not cut.
        batch: pieces at once; by default 1 and 4 to decode, and what `music-ar render` takes to render.
        tokens: decode: tokens a piece to time, after the first chunk.
        data: decode: folder that `music-ar prepare` wrote; without it there is no score.
        pieces: decode: validation pieces to score.
        piece_tokens: decode: how much of each, from its start.
        made: render: pieces to make.
        looped: render: how many of them the plain loop makes; it is timed by these.
        seconds: render: music a piece.
        output: JSON file to write as well.
    """

    what: Annotated[tyro.conf.Positional[Literal["decode", "render"]], tyro.conf.arg(metavar="{decode,render}")]
    checkpoint: str | None = None
    latents: tuple[int, ...] = (64, 256, 1024, 2048)
    mode: tuple[WindowMode, ...] = ("sliding",)
    context: Annotated[tuple[int, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    batch: Annotated[tuple[int, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    tokens: int = 256
    data: Path | None = None
    pieces: int = 8
    piece_tokens: int = 4096
    made: int = 32
    looped: int = 4
    seconds: float = 60.0
    output: Path | None = None

    def __post_init__(self) -> None:
        if min((self.tokens, self.pieces, self.piece_tokens, *self.latents, *self.context, *self.batch)) < 1:
            raise CommandError("every number must be at least 1")
        if not 1 <= self.looped <= self.made or not 0 < self.seconds < float("inf"):
            raise CommandError("expected 1 <= --looped <= --made and --seconds above 0")

    def run(self) -> None:
        """Prints the table and the line of JSON."""
        model = load_released(self.checkpoint)
        if max(self.latents) > model.config.latents:
            raise CommandError(f"--latents must be at most {model.config.latents}, got {max(self.latents)}")
        rows, facts = self._render(model) if self.what == "render" else self._decode(model)
        names = [field.name for field in dataclasses.fields(rows[0])]
        print_table(
            [name.replace("_", " ") for name in names], [[_cell(getattr(row, n)) for n in names] for row in rows]
        )
        result = json.dumps(
            {
                "benchmark": self.what,
                "device": jax.devices()[0].device_kind,
                "checkpoint": self.checkpoint,
                **facts,
                "rows": [dataclasses.asdict(row) for row in rows],
            }
        )
        if self.output is not None:
            write_atomically(self.output, result.encode() + b"\n")
        print(result)

    def _decode(self, model: PerceiverAR) -> tuple[list[Row], dict[str, float]]:
        pieces = self._pieces()
        bytes_per_s = read_bandwidth()
        rows = []
        with ProgressLine(f"memory reads {bytes_per_s / 1e9:.1f} GB/s") as line:
            for context, mode in itertools.product(self.context or (model.config.context,), self.mode):
                decoder = Decoder(with_context(model, context))
                nats: dict[int, float | None] = dict.fromkeys(self.latents)
                if pieces:
                    for latents in self.latents:
                        line.report(0.0, f"context {context}, {mode}: scoring with {latents} latents")
                        nats[latents] = score_decoding(decoder, pieces, latents=latents, mode=mode).nats_per_token
                timed: list[Row] = []
                for batch in self.batch or (1, 4):
                    line.report(0.0, f"context {context}, {mode}: timing {batch} at once")
                    timed += self._rows(decoder, mode, batch, nats, bytes_per_s)
                rows += sorted(timed, key=lambda row: self.latents.index(row.latents))
        return rows, {"bytes_per_s": round(bytes_per_s)}

    def _render(self, model: PerceiverAR) -> tuple[list[RenderRow], dict[str, float]]:
        generator, rows = Generator(model), []
        with ProgressLine("rendering") as line:
            for latents, mode in itertools.product(self.latents, self.mode):
                loop = self._loop(generator, latents, mode)
                rows.append(loop)
                line.report(0.0, f"a plain loop: {loop.tokens_per_s:.0f} tokens/s")
                batches = self.batch or (generator.batch_size(latents, mode),)
                rows += [self._many(generator, latents, mode, batch, loop) for batch in batches]
        return rows, {"seconds": self.seconds}

    def _loop(self, generator: Generator, latents: int, mode: WindowMode) -> RenderRow:
        generator.generate(seconds=0.1, latents=latents, mode=mode, seed=0)  # compiles
        tokens, music_s, began = 0, 0.0, time.perf_counter()
        for seed in range(self.looped):
            chunks: list[Chunk] = []
            generator.generate(seconds=self.seconds, latents=latents, mode=mode, seed=seed, progress=chunks.append)
            tokens += chunks[-1].tokens
            music_s += chunks[-1].seconds_made
        spent_s = time.perf_counter() - began
        return RenderRow(
            way="loop",
            latents=latents,
            batch=1,
            pieces=self.looped,
            seconds_of_music=music_s,
            seconds_spent=spent_s,
            tokens_per_s=tokens / spent_s,
            times_real_time=music_s / spent_s,
            times_the_loop=1.0,
        )

    def _many(self, generator: Generator, latents: int, mode: WindowMode, batch: int, loop: RenderRow) -> RenderRow:
        def pieces(seconds: float) -> Iterator[Piece]:
            requests = (Request(seconds=seconds, latents=latents, mode=mode, seed=seed) for seed in range(self.made))
            return generator.generate_many(requests, batch_size=batch)

        next(pieces(0.1))  # compiles
        tokens, music_s, began = 0, 0.0, time.perf_counter()
        for piece in pieces(self.seconds):
            tokens += piece.tokens
            music_s += min(piece.continuation.duration_s, self.seconds)
        spent_s = time.perf_counter() - began
        return RenderRow(
            way="render",
            latents=latents,
            batch=batch,
            pieces=self.made,
            seconds_of_music=music_s,
            seconds_spent=spent_s,
            tokens_per_s=tokens / spent_s,
            times_real_time=music_s / spent_s,
            times_the_loop=tokens / spent_s / loop.tokens_per_s,
        )

    def _pieces(self) -> list[np.ndarray]:
        if self.data is None:
            return []
        held_out = Pieces.open(self.data, "validation").tokens[: self.pieces]
        return [tokens[: self.piece_tokens] for tokens in held_out]

    def _rows(
        self, decoder: Decoder, mode: WindowMode, batch: int, nats: dict[int, float | None], bytes_per_s: float
    ) -> list[Row]:
        """A row a budget; the budgets take turns, chunk by chunk, so that a noisy machine is unjust to all alike."""
        timed = {latents: _Timed(decoder, latents, mode, batch) for latents in self.latents}
        for _ in range(-(-self.tokens // chunk_tokens(batch))):
            for each in timed.values():
                each.next_chunk()
        return [
            Row(
                context=decoder.config.context,
                latents=latents,
                batch=batch,
                mode=mode,
                tokens_per_s=batch / each.step_s,
                first_note_s=each.first_note_s,
                times_real_time=1 / each.step_s / MAESTRO_TOKENS_PER_S,
                nats_per_token=nats[latents],
                share_of_limit=each.bytes_read / bytes_per_s / each.step_s,
            )
            for latents, each in timed.items()
        ]


class _Timed:
    """Decoding under one budget, after a full prompt, a chunk at a time.

    Attributes:
        first_note_s: seconds that prefill and the first chunk took, compiled before.
        bytes_read: what a step must read, with all of the tables that it takes some rows of (3 % of it).
    """

    def __init__(self, decoder: Decoder, latents: int, mode: WindowMode, batch: int):
        self._decoder, self._length = decoder, chunk_tokens(batch)
        self._chunk_s: list[float] = []
        prompt = _some_prompt(decoder.config.context)

        def first_chunk() -> None:
            self._state = decoder.start(
                [prompt] * batch, latents=latents, seeds=range(batch), limit_steps=2**30, mode=mode
            )
            self.next_chunk()

        first_chunk()  # compiles
        began = time.perf_counter()
        first_chunk()
        self.first_note_s = time.perf_counter() - began
        self._chunk_s.clear()
        self.bytes_read = sum(
            leaf.nbytes for leaf in jax.tree.leaves((decoder.params, self._state.caches, self._state.memory))
        )

    def next_chunk(self) -> None:
        """Decodes a chunk, as `Generator` would hand it out."""
        began = time.perf_counter()
        self._state, tokens = self._decoder.decode(self._state, SamplingOptions().filters(), length=self._length)
        tokens.block_until_ready()
        self._chunk_s.append(time.perf_counter() - began)

    @property
    def step_s(self) -> float:
        """Seconds a step, by the median chunk."""
        return statistics.median(self._chunk_s) / self._length


def with_context(model: PerceiverAR, context: int) -> PerceiverAR:
    """The same weights with attention reading another number of inputs."""
    if context == model.config.context:
        return model
    model = nnx.clone(model)
    model.config = dataclasses.replace(model.config, context=context)
    return model


def read_bandwidth() -> float:
    """Bytes a second that a large matrix-vector product or sum reads, on the default device; the best of ten each."""
    device = jax.devices()[0]
    most = (device.memory_stats() or {}).get("bytes_limit", 2**33)
    size = _BANDWIDTH_BYTES if device.platform == "cpu" else min(_ACCELERATOR_BANDWIDTH_BYTES, most // 4)
    rows = int((size / 4) ** 0.5)
    matrix, vector = jnp.ones((rows, rows)), jnp.ones(rows)
    best_s = float("inf")
    for read in (jax.jit(jnp.dot), jax.jit(lambda matrix, _: matrix.sum())):
        read(matrix, vector).block_until_ready()
        for _ in range(10):
            began = time.perf_counter()
            read(matrix, vector).block_until_ready()
            best_s = min(best_s, time.perf_counter() - began)
    return matrix.nbytes / best_s


def _some_prompt(length: int) -> np.ndarray:
    """Repeated notes; what they are does not matter to the time."""
    note = [vocabulary.NOTE_ON + 60, vocabulary.TIME_SHIFT + 19, vocabulary.NOTE_OFF + 60, vocabulary.TIME_SHIFT + 9]
    tokens = np.resize(note, length)
    tokens[:2] = vocabulary.START, vocabulary.VELOCITY + 15
    return tokens.astype(np.int32)


def _cell(value: float | str | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:,.4g}"
