"""The timed runs of `music-ar bench`."""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from app.console import ProgressLine
from music_ar.decoding.autotune import MAESTRO_TOKENS_PER_S
from music_ar.decoding.decoder import Decoder
from music_ar.decoding.interface import option_arrays
from music_ar.decoding.request import Request
from music_ar.decoding.sampling import SamplingOptions
from music_ar.evaluation.likelihood import score_decoding
from music_ar.generator import Generator
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.tokens import vocabulary

_BANDWIDTH_BYTES = 2**28
_ACCELERATOR_BANDWIDTH_BYTES = 2**32  # an accelerator then spends longer reading than launching the read


@dataclass(frozen=True, kw_only=True)
class DecodeRow:
    """The result of one setting, as in the JSON line.

    Attributes:
        tokens_per_s: over all pieces.
        first_note_s: time to read the prompt and decode the first chunk, without compilation.
        times_real_time: seconds of average MAESTRO music per second, in each piece.
        nats_per_token: NLL of real music through the decoder; None if not scored.
        share_of_limit: speed as a fraction of what the memory bandwidth allows.
    """

    context: int
    latents: int
    batch: int
    mode: str = "sliding"
    tokens_per_s: float
    first_note_s: float
    times_real_time: float
    nats_per_token: float | None
    share_of_limit: float


@dataclass(frozen=True, kw_only=True)
class RenderRow:
    """The result of one way to generate many pieces, as in the JSON line.

    The ways are "loop", over `Generator.stream`, and "render", by `Generator.generate_many`.
    """

    way: str
    latents: int
    batch: int
    pieces: int
    seconds_of_music: float
    seconds_spent: float
    tokens_per_s: float
    times_real_time: float
    times_the_loop: float


def decode_rows(
    model: PerceiverAR,
    contexts: Sequence[int],
    latents: Sequence[int],
    batches: Sequence[int],
    tokens: int,
    scored: Sequence[np.ndarray],
    bytes_per_s: float,
) -> list[DecodeRow]:
    """Time decoding for every context, number of latents and batch; score `scored`, if any, through the decoder."""
    rows = []
    with ProgressLine(f"memory bandwidth {bytes_per_s / 1e9:.1f} GB/s") as line:
        for context in contexts:
            decoder = Decoder(_with_context(model, context))
            nats: dict[int, float | None] = dict.fromkeys(latents)
            for number in latents if scored else ():
                line.report(0.0, f"context {context}: scoring with {number} latents")
                nats[number] = score_decoding(decoder, scored, latents=number).nats_per_token
            timed: list[DecodeRow] = []
            for batch in batches:
                line.report(0.0, f"context {context}: timing {batch} at once")
                timed += _interleaved(decoder, batch, tokens, nats, bytes_per_s)
            rows += sorted(timed, key=lambda row: latents.index(row.latents))
    return rows


def _interleaved(
    decoder: Decoder, batch: int, tokens: int, nats: dict[int, float | None], bytes_per_s: float
) -> list[DecodeRow]:
    """Return a row per number of latents. They alternate chunk by chunk, so that noise slows all of them alike."""
    runs = {latents: _Run(decoder, latents, batch) for latents in nats}
    for _ in range(-(-tokens // decoder.backend.chunk_tokens(batch))):
        for run in runs.values():
            run.next_chunk()
    return [
        DecodeRow(
            context=decoder.config.context,
            latents=latents,
            batch=batch,
            tokens_per_s=batch / run.step_s,
            first_note_s=run.first_note_s,
            times_real_time=1 / run.step_s / MAESTRO_TOKENS_PER_S,
            nats_per_token=nats[latents],
            share_of_limit=run.bytes_read / bytes_per_s / run.step_s,
        )
        for latents, run in runs.items()
    ]


class _Run:
    """Decoding with one number of latents, after a full prompt, one chunk at a time.

    Attributes:
        first_note_s: seconds for prefill and the first chunk, without compilation.
        bytes_read: bytes that a step must read. It counts the whole embedding tables (3 %), of which a step reads rows.
    """

    def __init__(self, decoder: Decoder, latents: int, batch: int):
        self._decoder, self._options = decoder, option_arrays([SamplingOptions()] * batch)
        self._length = decoder.backend.chunk_tokens(batch)
        self._chunk_s: list[float] = []
        prompt = _prompt(decoder.config.context)

        def first_chunk() -> None:
            self._state = decoder.start([prompt] * batch, latents=latents, seeds=range(batch), limit_steps=2**30)
            self.next_chunk()

        first_chunk()  # compiles
        began = time.perf_counter()
        first_chunk()
        self.first_note_s = time.perf_counter() - began
        self._chunk_s.clear()
        read = (decoder.params, self._state.caches, self._state.notes, self._state.match)
        self.bytes_read = sum(leaf.nbytes for leaf in jax.tree.leaves(read))

    def next_chunk(self) -> None:
        """Decode a chunk as long as those of a stream."""
        began = time.perf_counter()
        self._state, tokens = self._decoder.decode(self._state, self._options, length=self._length)
        tokens.block_until_ready()
        self._chunk_s.append(time.perf_counter() - began)

    @property
    def step_s(self) -> float:
        """Seconds per step, of the median chunk."""
        return statistics.median(self._chunk_s) / self._length


def render_rows(
    model: PerceiverAR,
    latents: Sequence[int],
    batches: Sequence[int],
    pieces: int,
    loop_pieces: int,
    seconds: float,
) -> list[RenderRow]:
    """Time a loop over `stream` and then `generate_many`, for every number of latents and batch."""
    generator, rows = Generator(Decoder(model)), []
    with ProgressLine("rendering") as line:
        for number in latents:
            loop = _render_row(generator, number, None, loop_pieces, seconds)
            rows.append(loop)
            line.report(0.0, f"loop: {loop.tokens_per_s:.0f} tokens/s")
            for batch in batches or (generator.batch_size(number),):
                row = _render_row(generator, number, batch, pieces, seconds)
                rows.append(dataclasses.replace(row, times_the_loop=row.tokens_per_s / loop.tokens_per_s))
    return rows


def _render_row(generator: Generator, latents: int, batch: int | None, pieces: int, seconds: float) -> RenderRow:
    """Time one way: `generate_many` if there is a batch, otherwise the loop."""

    def run(seconds: float) -> Iterator[tuple[int, float]]:
        """Yield the tokens and seconds of each piece."""
        if batch is None:
            for seed in range(pieces):
                *_, last = generator.stream(seconds=seconds, latents=latents, seed=seed)
                yield last.tokens, last.seconds_made
        else:
            requests = (Request(seconds=seconds, latents=latents, seed=seed) for seed in range(pieces))
            for piece in generator.generate_many(requests, batch_size=batch):
                yield piece.tokens, min(piece.continuation.duration_s, seconds)

    next(run(0.1))  # compiles
    began = time.perf_counter()
    tokens, music_s = np.sum(list(run(seconds)), axis=0).tolist()
    spent_s = time.perf_counter() - began
    return RenderRow(
        way="loop" if batch is None else "render",
        latents=latents,
        batch=batch or 1,
        pieces=pieces,
        seconds_of_music=music_s,
        seconds_spent=spent_s,
        tokens_per_s=tokens / spent_s,
        times_real_time=music_s / spent_s,
        times_the_loop=1.0,
    )


def read_bandwidth() -> float:
    """Return the memory bandwidth of the default device in bytes per second: the best of ten products and ten sums."""
    memory = jax.devices()[0].memory_stats()  # None on a CPU
    size = _BANDWIDTH_BYTES
    if memory is not None:
        size = min(_ACCELERATOR_BANDWIDTH_BYTES, memory.get("bytes_limit", 2**33) // 4)
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


def _with_context(model: PerceiverAR, context: int) -> PerceiverAR:
    """Return the same weights with another context length."""
    if context == model.config.context:
        return model
    model = nnx.clone(model)
    model.config = dataclasses.replace(model.config, context=context)
    return model


def _prompt(length: int) -> np.ndarray:
    """Return repeated notes; the content of a prompt does not change the timing."""
    note = [vocabulary.NOTE_ON + 60, vocabulary.TIME_SHIFT + 19, vocabulary.NOTE_OFF + 60, vocabulary.TIME_SHIFT + 9]
    tokens = np.resize(note, length)
    tokens[:2] = vocabulary.START, vocabulary.VELOCITY + 15
    return tokens.astype(np.int32)
