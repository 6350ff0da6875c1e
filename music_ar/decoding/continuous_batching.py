"""Token sequences in a batch that is kept full: when one is finished, the next takes its row and the others go on.

Sequences of one ring size and one window mode share a batch (their prompts, budgets, seeds, limits and sampling options
may differ); where the next one asks for others, the batch first runs dry.

A sequence depends on its own `Job` and, in the last bit of its logits, on the size of the batch, because a matrix
product of other shapes adds in another order. It does not depend on its row, its batch-mates, or when it began: making
the rest of some jobs later gives what making all at once would have given.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from music_ar.decoding import decoder as decoding
from music_ar.decoding.decoder import Decoder
from music_ar.decoding.sampling import Filters, SamplingOptions
from music_ar.decoding.state import DecodeState
from music_ar.decoding.step import WindowMode
from music_ar.tokens import codec, vocabulary

_CHUNK_TOKENS = 64
# On a CPU more rows gain little, once reading the caches takes longer than reading the weights.
CPU_BATCH = 16
# A finished sequence keeps its row until the chunk ends. Where a chunk takes long, it can be short at no cost: of 400
# pieces of 6 s in 16 rows, 94 % of the tokens drawn were of use with 16 at a time, 87 % with 64.
_CPU_CHUNK = 16
_MOST_ROWS = 256
# Of an accelerator's free memory; the rest is for the prefill and for what XLA makes on the way.
_MEMORY_SHARE = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One sequence to make.

    Attributes:
        prompt: tokens to go on from, beginning with `vocabulary.START`.
        seed: of its sampling.
        latents: the latent budget.
        mode: how its windows go on.
        options: how its tokens are drawn.
        limit_steps: it is finished once it has made so much music (in steps of 10 ms), or has ended by itself.
        most_tokens: it is finished at so many tokens in any case.
        tag: anything; handed back with the result.
    """

    prompt: Int[np.ndarray, " P"]
    seed: int
    latents: int
    mode: WindowMode
    options: SamplingOptions
    limit_steps: int
    most_tokens: int
    tag: Any = None


class Made(NamedTuple):
    """A finished sequence: the tokens after the prompt, up to the one that reached the limit, and -log p of each."""

    job: Job
    tokens: Int[np.ndarray, " T"]
    nats: Float[np.ndarray, " T"]


def chunk_tokens(rows: int) -> int:
    """Tokens a row between two chunks of a stream: so few that on a CPU, too, it can be stopped within a second."""
    return max(1, min(16, 64 // rows)) if jax.default_backend() == "cpu" else _CHUNK_TOKENS


def batch_size(decoder: Decoder, latents: int, mode: WindowMode) -> int:
    """How many rows to decode at once here: 16 on a CPU; elsewhere what half of the free memory holds, at most 256.

    It is a rule and not a measurement, so that it gives the same number, and so the same music, each time.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return CPU_BATCH
    state = jax.eval_shape(lambda: _idle(decoder, 1, latents, mode))
    row_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.caches, state.memory)))
    memory = (device.memory_stats() or {}).get("bytes_limit", 8 * 2**30)  # TPUs and GPUs tell it
    used = sum(leaf.nbytes for leaf in jax.tree.leaves(decoder.params))
    rows = int((memory - used) * _MEMORY_SHARE / row_bytes)
    return max(1, min(_MOST_ROWS, 1 << (max(rows, 1).bit_length() - 1)))


def make(
    decoder: Decoder, jobs: Iterable[Job], *, rows: int | None = None, on_chunk: Callable[[int], None] | None = None
) -> Iterator[Made]:
    """Makes the sequences, in the order in which they are finished. A job is taken only when there is a row for it.

    Args:
        decoder: the model.
        jobs: what to make.
        rows: how many at once, also when fewer are left; default: `batch_size`.
        on_chunk: called after each chunk with the steps of music made since the last call, over all rows.
    """
    waiting = iter(jobs)
    job = next(waiting, None)
    while job is not None:
        batch = _Batch(decoder, batch_size(decoder, job.latents, job.mode) if rows is None else rows, job)
        while (job is not None and batch.takes(job)) or batch.busy:
            while job is not None and batch.takes(job) and batch.has_room:
                batch.add(job)
                job = next(waiting, None)
            steps, finished = batch.chunk()
            if on_chunk is not None:
                on_chunk(steps)
            yield from finished
        del batch  # its caches, before the next batch makes its own


class _Batch:
    """The rows of one batch, and which jobs are in them."""

    def __init__(self, decoder: Decoder, rows: int, like: Job):
        self._decoder, self._rows = decoder, rows
        self._ring = decoding.ring_size(like.latents)
        self._mode: WindowMode = like.mode
        self._state = _idle(decoder, rows, like.latents, like.mode)
        self._length = _CPU_CHUNK if jax.default_backend() == "cpu" else _CHUNK_TOKENS
        self._options = [SamplingOptions()] * rows
        self._filters = Filters.of_rows(self._options)
        self._making: dict[int, _Making] = {}
        self._prefilled: tuple[tuple[bytes, int], DecodeState] | None = None

    @property
    def busy(self) -> bool:
        return bool(self._making)

    @property
    def has_room(self) -> bool:
        return len(self._making) < self._rows

    def takes(self, job: Job) -> bool:
        return decoding.ring_size(job.latents) == self._ring and job.mode == self._mode

    def add(self, job: Job) -> None:
        row = next(row for row in range(self._rows) if row not in self._making)
        self._state = self._state.replaced(row, self._started(job))
        self._options[row] = job.options
        self._filters = Filters.of_rows(self._options)
        self._making[row] = _Making(job)

    def _started(self, job: Job) -> DecodeState:
        """The job's first state; variations of one prompt, which mostly come one after another, share its prefill."""
        key = (job.prompt.tobytes(), job.latents)
        if self._prefilled is None or self._prefilled[0] != key:
            self._prefilled = None
            state = self._decoder.start([job.prompt], latents=job.latents, seeds=[0], limit_steps=0, mode=self._mode)
            self._prefilled = key, state
        return self._prefilled[1].with_limit(job.limit_steps)._replace(keys_B=jax.random.key(job.seed)[None])

    def chunk(self) -> tuple[int, list[Made]]:
        """Decodes a chunk: the steps of music made, and what is finished by it."""
        self._state, *made = self._decoder.decode_scored(self._state, self._filters, length=self._length)
        tokens_BxT, nats_BxT = map(np.asarray, made)
        steps, finished = 0, []
        for row, making in list(self._making.items()):
            real = tokens_BxT[row] != vocabulary.PAD
            steps += making.add(tokens_BxT[row][real], nats_BxT[row][real])
            if making.finished:
                finished.append(making.made())
                del self._making[row]
        if finished:  # an idle row costs its share of a step, but waits for nobody and keeps nobody waiting
            idle = np.array([row not in self._making for row in range(self._rows)])
            self._state = self._state._replace(ended_B=jnp.asarray(idle))
        return steps, finished


class _Making:
    """A sequence as far as it has come; each chunk is looked at once, however long the sequence is."""

    def __init__(self, job: Job):
        self._job, self._parts = job, []
        self._steps = self._count = 0
        self.finished = False

    def add(self, tokens: Int[np.ndarray, " T"], nats: Float[np.ndarray, " T"]) -> int:
        """Takes what of a chunk belongs to the sequence, wherever chunks begin; the steps of music that it brings."""
        after = self._steps + codec.event_steps(np.append(tokens, vocabulary.PAD))[1:]  # the time after each token
        numbers = self._count + 1 + np.arange(len(tokens))
        last = (after >= self._job.limit_steps) | (tokens == vocabulary.END) | (numbers >= self._job.most_tokens)
        if last.any():
            self.finished = True
            end = int(last.argmax()) + 1
            tokens, nats, after = tokens[:end], nats[:end], after[:end]
        self._parts.append((tokens, nats))
        before, self._steps = self._steps, int(after[-1]) if len(after) else self._steps
        self._count += len(tokens)
        return min(self._steps, self._job.limit_steps) - min(before, self._job.limit_steps)

    def made(self) -> Made:
        """The sequence, once it is finished."""
        tokens, nats = zip(*self._parts, strict=True)
        return Made(self._job, np.concatenate(tokens), np.concatenate(nats))


def _idle(decoder: Decoder, rows: int, latents: int, mode: WindowMode) -> DecodeState:
    """A batch in which no row makes anything."""
    start = np.array([vocabulary.START], np.int32)
    state = decoder.start([start], latents=latents, seeds=[0], limit_steps=0, mode=mode).rows([0] * rows)
    return state._replace(ended_B=jnp.ones(rows, bool))
