"""The timed runs of `music-ar bench`."""

import dataclasses
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from app.console import ProgressLine
from music_ar.decoding.autotune import MAESTRO_TOKENS_PER_S
from music_ar.decoding.budget import Setting
from music_ar.decoding.interface import AnyDecoder, option_arrays
from music_ar.decoding.loading import decoder_of
from music_ar.decoding.request import Request
from music_ar.decoding.sampling import SamplingOptions
from music_ar.generator import Generator
from music_ar.model.weights import Weights
from music_ar.system import usable_cores
from music_ar.tokens import vocabulary

if TYPE_CHECKING:
    from music_ar.evaluation.likelihood import Score

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
        layers, tolerance: see `Setting`.
        mean_layers: layers that a token of the scored music ran through on average; None if not scored.
        share_of_limit: speed as a fraction of what the memory bandwidth allows.
        bare_matrices_ms: time of a step's int8 matrices alone, between the chunks of this row; None with JAX.
        times_bare_matrices: time of a step as a multiple of that.
    """

    context: int
    latents: int
    layers: int
    tolerance: float
    batch: int
    mode: str = "sliding"
    tokens_per_s: float
    mean_layers: float | None
    first_note_s: float
    times_real_time: float
    nats_per_token: float | None
    share_of_limit: float
    bare_matrices_ms: float | None
    times_bare_matrices: float | None


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


class _Timing(NamedTuple):
    """What was measured for a `DecodeRow`."""

    context: int
    setting: Setting
    batch: int
    step_s: float
    first_note_s: float
    step_bytes: int
    bare_s: float | None

    def row(self, score: "Score | None", bytes_per_s: float) -> DecodeRow:
        bare_s = self.bare_s
        return DecodeRow(
            context=self.context,
            **self.setting._asdict(),
            batch=self.batch,
            tokens_per_s=self.batch / self.step_s,
            first_note_s=self.first_note_s,
            times_real_time=1 / self.step_s / MAESTRO_TOKENS_PER_S,
            nats_per_token=None if score is None else score.nats_per_token,
            mean_layers=None if score is None else score.mean_layers or self.setting.layers,
            share_of_limit=self.step_bytes / bytes_per_s / self.step_s,
            bare_matrices_ms=None if bare_s is None else 1e3 * bare_s,
            times_bare_matrices=None if bare_s is None else self.step_s / bare_s,
        )


def decode_rows(
    weights: Weights,
    contexts: Sequence[int],
    settings: Sequence[Setting],
    batches: Sequence[int],
    tokens: int,
    scored: Sequence[np.ndarray],
) -> tuple[list[DecodeRow], dict[str, Any]]:
    """Time decoding for every context, setting and batch; score `scored`, if any, through the decoder.

    Tokens leave early when the music lets them, so scored music is also what the timed runs continue.

    Returns:
        The rows, and what is the same for all of them.
    """
    timings: list[_Timing] = []
    scores: dict[tuple[int, Setting], Score] = {}
    music = max(scored, key=len) if scored else None
    with ProgressLine("loading the model") as line:
        configs = [dataclasses.replace(weights.config, context=context) for context in contexts]
        decoders = [decoder_of(weights._replace(config=config)) for config in configs]
        for context, decoder in zip(contexts, decoders, strict=True):
            timed: list[_Timing] = []
            for batch in batches:
                line.report(0.0, f"context {context}: timing {batch} at once")
                prompt = _prompt(decoder.config.reach, music)
                timed += _interleaved(decoder, batch, settings, tokens, prompt)
            timings += sorted(timed, key=lambda timing: settings.index(timing.setting))
        facts = _facts(decoders[0])  # before scores and bandwidth, which take more memory
        for context, decoder in zip(contexts, decoders, strict=True) if scored else ():
            for setting in settings:
                line.report(0.0, f"context {context}: scoring with {setting.in_words(decoder.config)}")
                scores[context, setting] = _score(decoder, scored, setting)
    bytes_per_s = read_bandwidth(decoders[0])
    rows = [timing.row(scores.get((timing.context, timing.setting)), bytes_per_s) for timing in timings]
    return rows, {**facts, "bytes_per_s": round(bytes_per_s)}


def _facts(decoder: AnyDecoder) -> dict[str, Any]:
    """What computes, and the most memory that this process has had so far, if the platform tells."""
    return {
        "device": decoder.device,
        "path": decoder.path,
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        "peak_memory_bytes": _peak_memory_bytes(),
    }


def cpu_name() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _peak_memory_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _score(decoder: AnyDecoder, scored: Sequence[np.ndarray], setting: Setting) -> "Score":
    from music_ar.evaluation.likelihood import score_decoding  # imports JAX

    return score_decoding(decoder, scored, **setting._asdict())


def _interleaved(
    decoder: AnyDecoder, batch: int, settings: Sequence[Setting], tokens: int, prompt: np.ndarray
) -> list[_Timing]:
    """Time each setting. They alternate chunk by chunk, so that noise slows all of them alike."""
    runs = {setting: _Run(decoder, setting, batch, prompt) for setting in settings}
    bare_s: dict[int, list[float]] = {setting.layers: [] for setting in settings}
    for _ in range(-(-tokens // decoder.backend.chunk_tokens(batch))):
        for run in runs.values():
            run.next_chunk()
        for layers, times in bare_s.items():
            if (seconds := decoder.bare_matrices_s(batch, layers)) is not None:
                times.append(seconds)
    return [
        _Timing(
            context=decoder.config.reach,
            setting=setting,
            batch=batch,
            step_s=run.step_s,
            first_note_s=run.first_note_s,
            step_bytes=run.step_bytes,
            bare_s=statistics.median(times) if (times := bare_s[setting.layers]) else None,
        )
        for setting, run in runs.items()
    ]


class _Run:
    """Decoding with one setting, after a full prompt, one chunk at a time.

    Attributes:
        first_note_s: seconds for prefill and the first chunk, without compilation.
        step_bytes: bytes that a step must read.
    """

    def __init__(self, decoder: AnyDecoder, setting: Setting, batch: int, prompt: np.ndarray):
        self._decoder, self._options = decoder, option_arrays([SamplingOptions()] * batch)
        self._length = decoder.backend.chunk_tokens(batch)
        self._chunk_s: list[float] = []

        def first_chunk() -> None:
            self._state = decoder.start([prompt] * batch, seeds=range(batch), limit_steps=2**30, **setting._asdict())
            self.next_chunk()

        first_chunk()  # compiles
        began = time.perf_counter()
        first_chunk()
        self.first_note_s = time.perf_counter() - began
        self._chunk_s.clear()
        self.step_bytes = decoder.step_bytes(self._state)

    def next_chunk(self) -> None:
        """Decode a chunk as long as those of a stream."""
        began = time.perf_counter()
        self._state, tokens = self._decoder.decode(self._state, self._options, length=self._length)
        np.asarray(tokens)  # waits for them
        self._chunk_s.append(time.perf_counter() - began)

    @property
    def step_s(self) -> float:
        """Seconds per step, of the median chunk."""
        return statistics.median(self._chunk_s) / self._length


def render_rows(
    weights: Weights,
    latents: Sequence[int],
    batches: Sequence[int],
    pieces: int,
    loop_pieces: int,
    seconds: float,
) -> tuple[list[RenderRow], dict[str, Any]]:
    """Time a loop over `stream` and then `generate_many`, for every number of latents and batch."""
    generator, rows = Generator(decoder_of(weights)), []
    with ProgressLine("rendering") as line:
        for number in latents:
            loop = _render_row(generator, number, None, loop_pieces, seconds)
            rows.append(loop)
            line.report(0.0, f"loop: {loop.tokens_per_s:.0f} tokens/s")
            for batch in batches or (generator.batch_size(number),):
                row = _render_row(generator, number, batch, pieces, seconds)
                rows.append(dataclasses.replace(row, times_the_loop=row.tokens_per_s / loop.tokens_per_s))
    return rows, _facts(generator.decoder)


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


def read_bandwidth(decoder: AnyDecoder) -> float:
    """The memory bandwidth of the decoder's device in bytes per second: the best of ten products and ten sums."""
    return _read_bandwidth_of_jax() if decoder.path == "jax" else _best_read(np.ones, np.dot, np.sum)


def _read_bandwidth_of_jax() -> float:
    import jax
    import jax.numpy as jnp

    memory = jax.local_devices()[0].memory_stats()  # None on a CPU
    size = _BANDWIDTH_BYTES
    if memory is not None:
        size = min(_ACCELERATOR_BANDWIDTH_BYTES, memory.get("bytes_limit", 2**33) // 4)
    return _best_read(jnp.ones, jax.jit(jnp.dot), jax.jit(jnp.sum), size)


def _best_read(ones: Any, product: Any, total: Any, size: int = _BANDWIDTH_BYTES) -> float:
    rows = int((size / 4) ** 0.5)
    matrix, vector = ones((rows, rows), np.float32), ones(rows, np.float32)
    best_s = float("inf")
    for read in (lambda: product(matrix, vector), lambda: total(matrix)):
        np.asarray(read())  # compiles
        for _ in range(10):
            began = time.perf_counter()
            np.asarray(read())  # waits for the result
            best_s = min(best_s, time.perf_counter() - began)
    return matrix.nbytes / best_s


def _prompt(length: int, music: np.ndarray | None) -> np.ndarray:
    """Return the beginning of a piece, or repeated notes if there is none or it is too short."""
    if music is not None and len(music) > length:
        return music[:length].astype(np.int32)
    note = [vocabulary.NOTE_ON + 60, vocabulary.TIME_SHIFT + 19, vocabulary.NOTE_OFF + 60, vocabulary.TIME_SHIFT + 9]
    tokens = np.resize(note, length)
    tokens[:2] = vocabulary.START, vocabulary.VELOCITY + 15
    return tokens.astype(np.int32)
