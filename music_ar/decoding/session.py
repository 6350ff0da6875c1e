"""`Session`: samples of one prompt whose caches stay on the device, so that they can be extended."""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from music_ar.decoding.budget import setting_of
from music_ar.decoding.interface import AnyDecoder, AnyState, shared_options
from music_ar.decoding.request import GenerationError, Request, check_seconds, stuck_error
from music_ar.decoding.rows import decoder_of_rows
from music_ar.decoding.sequence import Notes
from music_ar.decoding.sequence import Sequence as TokenSequence
from music_ar.midi.performance import Performance
from music_ar.tokens import vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """The pieces as generated so far.

    The pieces are put together when they are asked for, so a chunk costs the same however long they are. To follow a
    piece at that cost, append the notes in `added` of each chunk; those in `open` follow, and change.

    Attributes:
        performances: one per variation: all notes so far; those still sounding end at the last event.
        added: one per variation: the notes that have become final since the last chunk of the session; they begin
            after those that were final before.
        open: one per variation: the notes that are not final.
        final_s: one per variation: notes that begin before this time are final: they are complete, and later chunks
            repeat them unchanged.
        seeds: one per variation.
        tokens: event tokens generated, over all variations.
        tokens_per_s: speed of this call so far, over all variations, excluding the prefill of the prompt.
        seconds_made: seconds of music after the prompt, in the shortest variation.
        seconds_wanted: seconds of music requested.
        eta_s: estimated seconds left.
        finished: whether this is the last chunk.
    """

    final_s: tuple[float, ...]
    seeds: tuple[int, ...]
    tokens: int
    tokens_per_s: float
    seconds_made: float
    seconds_wanted: float
    eta_s: float
    finished: bool
    _notes: tuple[Notes, ...]
    _earlier: tuple[Notes | None, ...]  # of the last chunk
    _until_s: float
    _continuation_only: bool

    @functools.cached_property
    def performances(self) -> tuple[Performance, ...]:
        """See the class."""
        only = self._continuation_only
        return tuple(notes.performance(self._until_s, continuation_only=only) for notes in self._notes)

    @functools.cached_property
    def added(self) -> tuple[Performance, ...]:
        """See the class."""
        pairs, only = zip(self._notes, self._earlier, strict=True), self._continuation_only
        return tuple(notes.added(earlier, self._until_s, continuation_only=only) for notes, earlier in pairs)

    @functools.cached_property
    def open(self) -> tuple[Performance, ...]:
        """See the class."""
        only = self._continuation_only
        return tuple(notes.open(self._until_s, continuation_only=only) for notes in self._notes)

    @property
    def performance(self) -> Performance:
        """The first variation."""
        return self.performances[0]


class Session:
    """Variations of one prompt, each continued in its own way. `Generator.session` starts one.

    The caches of all variations stay on the device, so that `extend` can be called again; `close` frees them.

    Args:
        decoder: the model.
        request: what to generate, with a number of latents; without a seed a random one is drawn.

    Attributes:
        seeds: one per variation.
        latents: number of latents.
        setting: latents, layers and tolerance.
        prompt_s: where the prompt ends and generated music begins.
        gap: the gap that the pieces fill, or None.

    Raises:
        GenerationError, MidiError: there is nothing to continue from in the prompt.
        WishError: the model cannot take the wishes.
    """

    def __init__(self, decoder: AnyDecoder, request: Request):
        assert request.prompt is None or isinstance(request.prompt, Performance)
        self.gap = request.gap(decoder.config.reach)
        prompt = request.prompt_tokens() if self.gap is None else self.gap.tokens
        self.seeds = tuple(seed for sample in request.samples() if (seed := sample.seed) is not None)
        self.latents, self.setting = request.latents, setting_of(request, decoder.config)
        self._options = shared_options(request.sampling)
        self._decoder: Any = decoder_of_rows(decoder, request)
        if request.wishes.is_guided:
            self._options["guidance"] = np.float32(request.wishes.guidance)
        self._sequences = [TokenSequence(prompt, request.prompt, self.gap) for _ in self.seeds]
        self._limits, self._gap_s = request.limits, None if self.gap is None else request.seconds
        self._shown: list[Notes | None] = [None] * len(self.seeds)
        self.prompt_s = self._sequences[0].prompt_time / vocabulary.STEPS_PER_SECOND
        self._continuation_only = request.continuation_only
        self._wanted_s = 0.0
        rows, wishes = len(self.seeds), [request.wishes] * len(self.seeds)
        self._state: AnyState | None = self._decoder.start(
            [prompt] * rows, seeds=self.seeds, limit_steps=0, wishes=wishes, **self.setting._asdict()
        )

    @property
    def ended(self) -> tuple[bool, ...]:
        """Which variations ended on their own, so that `extend` adds nothing to them."""
        return tuple(sequence.ended for sequence in self._sequences)

    def extend(self, seconds: float) -> Iterator[Chunk]:
        """Generate `seconds` more of each variation, chunk by chunk; a piece may end sooner on its own.

        A gap is filled by one call, whatever `seconds` is.

        The iterator may be dropped at any chunk, and another call continues from there.

        Raises:
            GenerationError: `seconds` is not a valid length, the session is closed or its gap is filled, or the model
                writes one note after another without letting time pass.
        """
        check_seconds(seconds)
        if self._state is None:
            raise GenerationError("the session is closed; start another")
        if self.gap is not None and self._wanted_s:
            raise GenerationError("the gap has been filled; give the whole piece as a prompt to go on from its end")
        more_s = seconds if self._gap_s is None else self._gap_s
        self._wanted_s = (self._made_s() if self._wanted_s else 0.0) + more_s
        return self._chunks()

    def keep(self, variations: Sequence[int]) -> None:
        """Continue with some of the variations only, and free the others.

        Args:
            variations: their numbers, from 0, in their new order.

        Raises:
            GenerationError: there is no such variation, or the session is closed.
        """
        if self._state is None:
            raise GenerationError("the session is closed; start another")
        if not variations or not all(0 <= number < len(self.seeds) for number in variations):
            raise GenerationError(f"variations must be some of 0..{len(self.seeds) - 1}, got {list(variations)}")
        self._state = self._state.rows(variations)
        self._sequences = [self._sequences[number] for number in variations]
        self._shown = [self._shown[number] for number in variations]
        self.seeds = tuple(self.seeds[number] for number in variations)

    def close(self) -> None:
        """Free the device memory. Chunks that were already returned stay valid."""
        self._state = None

    def _made_s(self) -> float:
        """Seconds of music after the prompt, up to the requested length, in the shortest unfinished variation."""
        unfinished = [sequence for sequence in self._sequences if not sequence.ended] or self._sequences
        least = min(sequence.time for sequence in unfinished) / vocabulary.STEPS_PER_SECOND
        return min(least - self.prompt_s, self._wanted_s)

    def _all_done(self) -> bool:
        return self._state is None or bool(self._state.done_B.all())

    def _count(self) -> int:
        return sum(sequence.count for sequence in self._sequences)

    def _chunks(self) -> Iterator[Chunk]:
        limit_steps, _ = self._limits(self._wanted_s)
        before_s, before_tokens = self._made_s() if self._count() else 0.0, self._count()
        began_s, finished = time.monotonic(), False
        while not finished:
            if self._state is None:  # closed between two chunks
                return
            length = self._decoder.backend.chunk_tokens(len(self.seeds))
            # In one line: a name for the state here would keep it alive when the session is closed.
            self._state, tokens_BxT = self._decoder.decode(
                self._state.with_limit(limit_steps), self._options, length=length
            )
            for sequence, tokens in zip(self._sequences, np.asarray(tokens_BxT), strict=True):
                sequence.add(tokens)
            for sequence in self._sequences:
                if (error := stuck_error(sequence.count, sequence.generated_steps)) is not None:
                    raise GenerationError(error)
            finished = self._all_done()
            made_s, spent_s = self._made_s(), time.monotonic() - began_s
            pace = max(made_s - before_s, 0.01) / spent_s
            notes, earlier = tuple(sequence.notes() for sequence in self._sequences), tuple(self._shown)
            self._shown = list(notes)
            from_s = self.prompt_s if self._continuation_only else 0.0
            yield Chunk(
                final_s=tuple(each.final_s - from_s for each in notes),
                seeds=self.seeds,
                tokens=self._count(),
                tokens_per_s=(self._count() - before_tokens) / spent_s,
                seconds_made=made_s,
                seconds_wanted=self._wanted_s,
                eta_s=0.0 if finished else (self._wanted_s - made_s) / pace,
                finished=finished,
                _notes=notes,
                _earlier=earlier,
                _until_s=self.prompt_s + self._wanted_s,
                _continuation_only=self._continuation_only,
            )
