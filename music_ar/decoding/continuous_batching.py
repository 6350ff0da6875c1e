"""Continuous batching: many sequences in a batch that is kept full.

When a sequence is finished, the next takes its row and the others continue. Sequences of one cache size and
depth share a batch (their prompts, numbers of latents, tolerances of early exits, seeds, lengths, sampling options and
wishes may differ); if the next one needs another size, or guidance or choices where the others need none, the batch is
drained first.

A sequence depends on its own request and, with JAX, in the last bit of its logits on the size of the batch, because
matrix products of different shapes sum in different orders. It does not depend on its row, on the other rows, or on
when it began: generating some of the requests later gives the same results as generating all of them at once.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from music_ar.decoding.budget import Setting, setting_of
from music_ar.decoding.interface import AnyDecoder, Options, leaves_early, option_arrays
from music_ar.decoding.request import GenerationError, Request, stuck_error
from music_ar.decoding.rows import decoder_of_rows
from music_ar.decoding.sequence import Sequence
from music_ar.decoding.windows import cache_size
from music_ar.features.wish_options import Wishes
from music_ar.midi.performance import MidiError, Performance
from music_ar.tokens import vocabulary
from music_ar.tokens.vocabulary import EventError


class Completion(NamedTuple):
    """The result of a request.

    Attributes:
        request: the request.
        sequence: the tokens, up to the one that reached the limit; None if there is an error.
        error: why the sequence could not be generated, or None.
    """

    request: Request
    sequence: Sequence | None
    error: str | None = None


def complete(
    decoder: AnyDecoder,
    requests: Iterable[Request],
    *,
    resolve: Callable[[Request], Request],
    rows: int | None = None,
    on_chunk: Callable[[int], None] | None = None,
) -> Iterator[Completion]:
    """Generate sequences, and yield them in the order in which they finish. A request is taken only when a row is free.

    Args:
        decoder: the model.
        requests: the requests; those without a seed get a random one.
        resolve: gives a request, whose prompt has been read, a setting. If it raises, only that request
            fails.
        rows: number of rows, even when fewer requests are left; default: `AnyDecoder.batch_rows`.
        on_chunk: called after each chunk with the steps of music generated since the last call, over all rows.
    """
    failed: list[Completion] = []
    waiting = _sequences(decoder, requests, resolve, failed)
    entry = next(waiting, None)
    while entry is not None:
        setting = setting_of(entry[0], decoder.config)
        rows_of = decoder_of_rows(decoder, entry[0])
        batch = _Batch(rows_of, rows_of.batch_rows(setting.latents) if rows is None else rows, entry[0])
        while (entry is not None and batch.takes(entry[0])) or batch.busy:
            while entry is not None and batch.takes(entry[0]) and batch.has_room:
                batch.add(*entry)
                entry = next(waiting, None)
            steps, finished = batch.decode_chunk()
            if on_chunk is not None:
                on_chunk(steps)
            yield from failed
            failed.clear()
            yield from finished
        del batch  # free its caches before the next batch allocates its own
    yield from failed


def _sequences(
    decoder: AnyDecoder, requests: Iterable[Request], resolve: Callable[[Request], Request], failed: list[Completion]
) -> Iterator[tuple[Request, Sequence]]:
    """A request for each variation with its empty sequence; those that cannot be generated go to `failed`."""
    for request in requests:
        try:
            resolved = resolve(request.read())
            gap, played = resolved.gap(decoder.config.reach), resolved.prompt
            prompt = resolved.prompt_tokens() if gap is None else gap.tokens
        except (GenerationError, MidiError, EventError) as error:
            failed += [Completion(sample, None, str(error)) for sample in request.samples()]
        else:
            # The file's name again, which takes less memory than its notes.
            asked = dataclasses.replace(resolved, prompt=request.prompt, after=request.after)
            assert played is None or isinstance(played, Performance)
            yield from ((sample, Sequence(prompt, played, gap)) for sample in asked.samples())


class _Batch:
    """The rows of one batch, and which sequences are in them."""

    def __init__(self, decoder: Any, rows: int, first: Request):
        self._decoder, self._rows, self._first = decoder, rows, first
        setting = self._setting_of(first)
        self._program = self._program_of(setting)
        self._state = _idle(decoder, rows, setting)
        self._requests = [Request()] * rows
        self._running: dict[int, tuple[Request, Sequence]] = {}
        self._prefilled: tuple[tuple[bytes, Setting, Wishes], Any] | None = None
        self._options = self._row_options()

    def _setting_of(self, request: Request) -> Setting:
        return setting_of(request, self._decoder.config)

    def _program_of(self, setting: Setting) -> tuple[int, int, bool]:
        """What rows of one batch have in common, besides guidance."""
        latents, layers, tolerance = setting
        return cache_size(latents), layers, leaves_early(self._decoder.config, layers, tolerance)

    @property
    def busy(self) -> bool:
        return bool(self._running)

    @property
    def has_room(self) -> bool:
        return len(self._running) < self._rows

    def takes(self, request: Request) -> bool:
        same_program = self._program_of(self._setting_of(request)) == self._program
        first = self._first
        return same_program and (request.wishes.is_guided, request.choices) == (first.wishes.is_guided, first.choices)

    def add(self, request: Request, sequence: Sequence) -> None:
        row = next(row for row in range(self._rows) if row not in self._running)
        self._state = self._state.replaced(row, self._started(request, sequence))
        self._requests[row] = request
        self._options = self._row_options()
        self._running[row] = request, sequence

    def _row_options(self) -> Options:
        options = option_arrays([request.sampling for request in self._requests])
        if self._first.wishes.is_guided:
            options["guidance"] = np.array([request.wishes.guidance for request in self._requests], np.float32)
        return options

    def _started(self, request: Request, sequence: Sequence) -> Any:
        """The sequence's first state. Variations of one prompt usually follow each other and share its prefill."""
        setting = self._setting_of(request)
        key = (sequence.prompt.tobytes(), setting, request.wishes)
        if self._prefilled is None or self._prefilled[0] != key:
            self._prefilled = None
            state = self._decoder.start(
                [sequence.prompt], seeds=[0], limit_steps=0, wishes=[request.wishes], **setting._asdict()
            )
            self._prefilled = key, state
        limit_steps, _ = request.limits()
        assert request.seed is not None
        return self._prefilled[1].with_limit(limit_steps).with_seeds([request.seed])

    def decode_chunk(self) -> tuple[int, list[Completion]]:
        """Decode a chunk; return the steps of music generated and the sequences that finished."""
        length = self._decoder.backend.batch_chunk_tokens
        self._state, *found = self._decoder.decode_scored(self._state, self._options, length=length)
        tokens_BxT, nats_BxT = map(np.asarray, found)
        steps, finished = 0, []
        for row, (request, sequence) in list(self._running.items()):
            limit_steps, max_tokens = request.limits()
            before = min(sequence.generated_steps, limit_steps)
            done = sequence.add(tokens_BxT[row], nats_BxT[row], limit_steps=limit_steps, max_tokens=max_tokens)
            steps += min(sequence.generated_steps, limit_steps) - before
            error = stuck_error(sequence.count, sequence.generated_steps)
            if done or error is not None:
                finished.append(Completion(request, None if error else sequence, error))
                del self._running[row]
        if finished:  # an idle row still costs its share of a step, but the loop need not wait for it
            idle = np.array([row not in self._running for row in range(self._rows)])
            self._state = self._state.with_ended(idle)
        return steps, finished


def _idle(decoder: Any, rows: int, setting: Setting) -> Any:
    """A batch in which no row generates anything."""
    start = np.array([vocabulary.START], np.int32)
    state = decoder.start([start], seeds=[0], limit_steps=0, **setting._asdict()).rows([0] * rows)
    return state.with_ended(np.ones(rows, bool))
