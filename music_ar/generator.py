"""`Generator`: piano music in, piano music out. What people import."""

import dataclasses
import math
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Literal

import numpy as np
from jaxtyping import Int

from music_ar.decoding import continuous_batching
from music_ar.decoding import decoder as decoding
from music_ar.decoding.decoder import Decoder
from music_ar.decoding.sampling import SamplingOptions
from music_ar.decoding.step import WINDOW_MODES, WindowMode
from music_ar.midi.io import read_midi
from music_ar.midi.performance import MidiError, Performance
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.pretrained import load_released
from music_ar.tokens import codec, grammar, vocabulary

DEFAULT_LATENTS = 1024
DEFAULT_SPEED = 1.5
MAESTRO_TOKENS_PER_S = 40.0
"""Event tokens in a second of real music, on average over MAESTRO's train split."""
# A stuck model could play notes for ever without letting time pass; the densest MAESTRO second has fewer tokens.
MAX_TOKENS_PER_S = 500
MAX_SEED = 2**31 - 1
# A prompt shorter than this says little about how many tokens its music needs.
_TELLING_PROMPT_S = 10.0
# What a calibration must promise above the wish, since machines are not steady.
_SPEED_MARGIN = 1.15
_SMALLEST_AUTO = 64
_CALIBRATION_S = 1.0

Prompt = Performance | str | os.PathLike[str] | bytes | BinaryIO


class GenerationError(ValueError):
    """A request that cannot be met; the message says what was expected and what came."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Pieces as far as they have been made.

    Attributes:
        performances: one a variation: all notes so far; those still sounding end at the last event.
        final_s: one a variation: notes that begin before this time are complete, and as long as `stream` goes on,
            chunks repeat them as they are.
        seeds: what the variations are made with.
        tokens: event tokens made, over all variations.
        tokens_per_s: speed of this call so far, over all variations, without the prompt's prefill.
        seconds_made: music made after the prompt, of the variation that has least.
        seconds_wanted: music asked for.
        eta_s: estimate of the time to go.
        finished: whether this is the last chunk.
    """

    performances: tuple[Performance, ...]
    final_s: tuple[float, ...]
    seeds: tuple[int, ...]
    tokens: int
    tokens_per_s: float
    seconds_made: float
    seconds_wanted: float
    eta_s: float
    finished: bool

    @property
    def performance(self) -> Performance:
        """The first variation."""
        return self.performances[0]

    @property
    def seed(self) -> int:
        """The first variation's seed."""
        return self.seeds[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One piece to make, for `Generator.generate_many`. See `Generator.compose` for what the fields mean.

    Attributes:
        prompt, latents, mode, options, seed, prompt_seconds, continuation_only: as in `compose`; latents is a number.
        seconds: music to make after the prompt.
        tag: anything; handed back with the piece.
    """

    prompt: Prompt | None = None
    seconds: float = 60.0
    latents: int | None = None
    mode: WindowMode = "sliding"
    options: SamplingOptions = SamplingOptions()
    seed: int = 0
    prompt_seconds: float | None = None
    continuation_only: bool = False
    tag: Any = None

    def __post_init__(self) -> None:
        _check_seconds(self.seconds)
        if self.mode not in WINDOW_MODES:
            raise GenerationError(f"mode must be one of {', '.join(WINDOW_MODES)}, got {self.mode!r}")
        if not 0 <= self.seed <= MAX_SEED:
            raise GenerationError(f"seeds must lie in 0..{MAX_SEED}, got {self.seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """What became of a request.

    Attributes:
        request: what was asked for.
        performance: the piece as asked for; empty if it could not be made.
        continuation: what was made alone, timed from the end of the prompt.
        tokens: event tokens made.
        nats_per_token: -log p of a token made, on average, under the model itself: before temperature and filters.
        error: why it could not be made, or None.
    """

    request: Request
    performance: Performance
    continuation: Performance
    tokens: int
    nats_per_token: float
    error: str | None = None


class Composition:
    """Pieces in the making, which begin alike and go on each in its own way. `Generator.compose` makes one.

    It holds the caches of all its variations on the device, so that `stream` can be called again to go on where the
    music stands; `close` lets go of them.

    Attributes:
        seeds: one a variation.
        latents: the latent budget.
        prompt_s: where the prompt ends and what is made begins.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt_tokens: Int[np.ndarray, " P"],
        *,
        latents: int,
        mode: WindowMode,
        options: SamplingOptions,
        seeds: Sequence[int],
        continuation_only: bool,
    ):
        self.seeds, self.latents = tuple(seeds), latents
        self._decoder, self._filters = decoder, options.filters()
        self._prompt_length = len(prompt_tokens)
        self.prompt_s = codec.length_steps(prompt_tokens) / vocabulary.STEPS_PER_SECOND
        self._from_s = self.prompt_s if continuation_only else 0.0
        self._wanted_s = 0.0
        self._tokens = [prompt_tokens] * len(seeds)
        self._state: decoding.DecodeState | None = decoder.start(
            self._tokens, latents=latents, seeds=seeds, limit_steps=0, mode=mode
        )

    @property
    def ended(self) -> tuple[bool, ...]:
        """Which variations ended by themselves, so that `stream` adds nothing to them."""
        return tuple(bool(tokens[-1] == vocabulary.END) for tokens in self._tokens)

    def stream(self, seconds: float) -> Iterator[Chunk]:
        """Makes `seconds` more of each variation, chunk by chunk; a piece may also end by itself before.

        The iterator may be dropped at any chunk, and another call goes on from there.

        Raises:
            GenerationError: `seconds` is no length, or the composition is closed.
        """
        _check_seconds(seconds)
        if self._state is None:
            raise GenerationError("the composition is closed")
        self._wanted_s = (self._made_s() if self._wanted_s else 0.0) + seconds
        return self._chunks()

    def keep(self, variations: Sequence[int]) -> None:
        """Goes on with some variations only, and lets go of the others.

        Args:
            variations: their numbers, from 0, in the order that they shall have.

        Raises:
            GenerationError: there is no such variation, or the composition is closed.
        """
        if self._state is None:
            raise GenerationError("the composition is closed")
        if not variations or not all(0 <= number < len(self.seeds) for number in variations):
            raise GenerationError(f"variations must be some of 0..{len(self.seeds) - 1}, got {list(variations)}")
        self._state = self._state.rows(variations)
        self._tokens = [self._tokens[number] for number in variations]
        self.seeds = tuple(self.seeds[number] for number in variations)

    def close(self) -> None:
        """Frees the device memory. What was made stays where it was handed out."""
        self._state = None

    def _made_s(self) -> float:
        """Seconds of music after the prompt, up to what was wanted, of the variation that has least."""
        lengths = [codec.length_steps(tokens) / vocabulary.STEPS_PER_SECOND for tokens in self._tokens]
        going_on = [
            length for length, tokens in zip(lengths, self._tokens, strict=True) if tokens[-1] != vocabulary.END
        ]
        return min(min(going_on or lengths) - self.prompt_s, self._wanted_s)

    def _chunks(self) -> Iterator[Chunk]:
        limit_steps, most_tokens = _limits(self._wanted_s)
        before_s, before_tokens = self._made_s() if self._made() else 0.0, self._made()
        began_s, finished = time.monotonic(), False
        while not finished:
            if self._state is None:  # closed between two chunks
                return
            state, length = self._state.with_limit(limit_steps), continuous_batching.chunk_tokens(len(self.seeds))
            self._state, new_BxT = self._decoder.decode(state, self._filters, length=length)
            for number, new in enumerate(np.asarray(new_BxT)):
                self._tokens[number] = np.concatenate([self._tokens[number], new[new != vocabulary.PAD]])
            longest = max(map(len, self._tokens)) - self._prompt_length
            finished = bool(self._state.done_B.all()) or longest >= most_tokens
            made_s, spent_s = self._made_s(), time.monotonic() - began_s
            pace = max(made_s - before_s, 0.01) / spent_s
            yield Chunk(
                performances=tuple(self._performance(tokens) for tokens in self._tokens),
                final_s=tuple(final_until_s(tokens) - self._from_s for tokens in self._tokens),
                seeds=self.seeds,
                tokens=self._made(),
                tokens_per_s=(self._made() - before_tokens) / spent_s,
                seconds_made=made_s,
                seconds_wanted=self._wanted_s,
                eta_s=0.0 if finished else (self._wanted_s - made_s) / pace,
                finished=finished,
            )

    def _made(self) -> int:
        return sum(map(len, self._tokens)) - self._prompt_length * len(self._tokens)

    def _performance(self, tokens: Int[np.ndarray, " T"]) -> Performance:
        return codec.decode(tokens).crop(self._from_s, self.prompt_s + self._wanted_s)


def final_until_s(tokens: Int[np.ndarray, " T"]) -> float:
    """Until when the notes of unfinished music are known with their ends, in seconds.

    That is when the first note began that still sounds after the last token, or else the time of that token.
    """
    until_s = codec.length_steps(tokens) / vocabulary.STEPS_PER_SECOND
    held = grammar.grammar_after(tokens).held
    notes = codec.decode(tokens)
    for pitch in np.flatnonzero(held):  # a note-off ends the oldest note of its pitch: the newest are held
        until_s = min(until_s, float(notes.onset_s[notes.pitch == pitch][-held[pitch]]))
    return until_s


class Generator:
    """Makes piano music with a trained model.

    Args:
        model: the model; see `from_pretrained` for the usual way.
    """

    def __init__(self, model: PerceiverAR):
        self.model = model
        self.decoder = Decoder(model)
        self._seconds_per_token: dict[tuple[int, int, WindowMode], float] = {}

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str] | None = None) -> "Generator":
        """Loads a released model.

        Args:
            source: the name of a shipped checkpoint, a folder, or a hub id ("owner/name"); default: the
                checkpoint that ships with the project.

        Raises:
            CheckpointError: it is not there, damaged, or of another vocabulary.
        """
        return cls(load_released(source))

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        seconds: float = 60.0,
        latents: int | Literal["auto"] | None = None,
        speed: float | None = None,
        mode: WindowMode = "sliding",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.97,
        min_p: float = 0.0,
        steadiness: float = 0.25,
        seed: int | None = None,
        prompt_seconds: float | None = None,
        continuation_only: bool = False,
        progress: Callable[[Chunk], None] | None = None,
    ) -> Performance:
        """Makes a piece. Takes what `stream` takes, and returns the last chunk's performance.

        Args:
            progress: called with each chunk.
        """
        chunk = None
        for chunk in self.stream(
            prompt,
            seconds=seconds,
            latents=latents,
            speed=speed,
            mode=mode,
            options=SamplingOptions(
                temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, steadiness=steadiness
            ),
            seed=seed,
            prompt_seconds=prompt_seconds,
            continuation_only=continuation_only,
        ):
            if progress is not None:
                progress(chunk)
        assert chunk is not None  # a stream has at least one chunk
        return chunk.performance

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        seconds: float = 60.0,
        latents: int | Literal["auto"] | None = None,
        speed: float | None = None,
        mode: WindowMode = "sliding",
        options: SamplingOptions = SamplingOptions(),
        seed: int | None = None,
        variations: int = 1,
        prompt_seconds: float | None = None,
        continuation_only: bool = False,
    ) -> Iterator[Chunk]:
        """Makes a piece, or several variations of one, chunk by chunk. Checks the request at once.

        Closing the iterator, or dropping it, ends the work and frees the device memory.

        Args:
            prompt, latents, speed, mode, options, seed, variations, prompt_seconds, continuation_only: see `compose`.
            seconds: music to make after the prompt; a piece may also end by itself before.

        Raises:
            GenerationError: an option out of range, or nothing to go on from in the prompt.
            MidiError: the prompt is not a usable MIDI file.
        """
        _check_seconds(seconds)
        composition = self.compose(
            prompt,
            latents=latents,
            speed=speed,
            mode=mode,
            options=options,
            seed=seed,
            variations=variations,
            prompt_seconds=prompt_seconds,
            continuation_only=continuation_only,
        )

        def chunks() -> Iterator[Chunk]:
            try:
                yield from composition.stream(seconds)
            finally:
                composition.close()

        return chunks()

    def compose(
        self,
        prompt: Prompt | None = None,
        *,
        latents: int | Literal["auto"] | None = None,
        speed: float | None = None,
        mode: WindowMode = "sliding",
        options: SamplingOptions = SamplingOptions(),
        seed: int | None = None,
        variations: int = 1,
        prompt_seconds: float | None = None,
        continuation_only: bool = False,
    ) -> Composition:
        """Reads the prompt into caches that `Composition.stream` goes on from, as often as it is called.

        Args:
            prompt: a performance or a MIDI file to go on from; None makes a new piece.
            latents: the latent budget, 2 to the number the model was trained with; fewer is faster and less
                coherent. Default: 1024, or what the model has. "auto" takes the largest that keeps `speed`.
            speed: with "auto", how many seconds of music to make in a second; default 1.5. See `calibrate`.
            mode: how the window of latents goes on once it is full, "sliding" or "exact"; see `decoding`.
            options: how tokens are drawn.
            seed: 0 to 2**31 - 1; the same seed and request give the same piece on the same kind of machine.
                Default: a random one, which each chunk tells.
            variations: how many pieces to make at once, with the seeds `seed`, `seed` + 1 and so on; each is the piece
                that its seed makes alone.
            prompt_seconds: use only the beginning of the prompt. Notes that sound at the cut are held, and the
                model decides when they end.
            continuation_only: leave the prompt out of the result, and count time from where it ended.

        Raises:
            GenerationError: an option out of range, or nothing to go on from in the prompt.
            MidiError: the prompt is not a usable MIDI file.
        """
        if mode not in WINDOW_MODES:
            raise GenerationError(f"mode must be one of {', '.join(WINDOW_MODES)}, got {mode!r}")
        if variations < 1:
            raise GenerationError(f"variations must be at least 1, got {variations}")
        if seed is None:
            seed = secrets.randbelow(MAX_SEED + 1 - variations)
        if not 0 <= seed <= MAX_SEED - (variations - 1):
            raise GenerationError(f"seeds must lie in 0..{MAX_SEED}, got {seed} for the first of {variations}")
        if speed is not None and latents != "auto":
            raise GenerationError(f'speed = {speed} needs latents = "auto"')
        if speed is not None and not 0 < speed < math.inf:
            raise GenerationError(f"speed must be more than 0, got {speed}")
        tokens = _prompt_tokens(prompt, prompt_seconds)
        if latents == "auto":
            budget = self.calibrate(DEFAULT_SPEED if speed is None else speed, tokens, variations=variations, mode=mode)
        else:
            budget = self._check_latents(latents)
        return Composition(
            self.decoder,
            tokens,
            latents=budget,
            mode=mode,
            options=options,
            seeds=range(seed, seed + variations),
            continuation_only=continuation_only,
        )

    def generate_many(
        self,
        prompts: Iterable[Prompt | Request | None],
        *,
        variations: int = 1,
        seconds: float = 60.0,
        latents: int | None = None,
        mode: WindowMode = "sliding",
        options: SamplingOptions = SamplingOptions(),
        seed: int | None = None,
        prompt_seconds: float | None = None,
        continuation_only: bool = False,
        batch_size: int | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Iterator[Piece]:
        """Makes many pieces in a batch that is kept full, and hands out each when it is finished.

        A piece depends on its own prompt, seed and settings, and in the last bit of its logits on the size of the batch
        (see `batching`): with one batch size it is always the same, whatever else is made, before it or beside it.

        Args:
            prompts: performances or MIDI files to go on from, None for a piece from nothing, or whole `Request`s with
                their own settings. Taken one by one, as rows become free. Requests with budgets of one power of two
                and one mode should follow each other: they share a batch.
            variations: pieces of each prompt, with the seeds `seed`, `seed` + 1 and so on; of a `Request` always one.
            seconds, latents, mode, options, seed, prompt_seconds, continuation_only: of prompts that are no `Request`;
                see `compose`.
            batch_size: pieces at once; default: see `continuous_batching.batch_size`.
            progress: called after each chunk with the seconds of music made since the last call.

        Raises:
            GenerationError: an option out of range. What is wrong with one prompt is told by its `Piece.error`.
        """
        if variations < 1 or (batch_size is not None and batch_size < 1):
            raise GenerationError(f"variations and batch_size must be at least 1, got {variations} and {batch_size}")
        first = secrets.randbelow(MAX_SEED + 1 - variations) if seed is None else seed
        shared = Request(
            seconds=seconds,
            latents=self._check_latents(latents),
            mode=mode,
            options=options,
            seed=first,
            prompt_seconds=prompt_seconds,
            continuation_only=continuation_only,
        )

        def requests() -> Iterator[Request]:
            for prompt in prompts:
                if isinstance(prompt, Request):
                    yield prompt
                else:
                    for number in range(variations):
                        yield dataclasses.replace(shared, prompt=prompt, seed=first + number)

        return self._pieces(requests(), batch_size, progress)

    def _pieces(
        self, requests: Iterator[Request], batch_size: int | None, progress: Callable[[float], None] | None
    ) -> Iterator[Piece]:
        failed: list[Piece] = []
        nothing = Performance.empty()

        def jobs() -> Iterator[continuous_batching.Job]:
            for request in requests:
                try:
                    yield self._job(request)
                except (GenerationError, MidiError, vocabulary.EventError) as error:
                    failed.append(
                        Piece(
                            request=request,
                            performance=nothing,
                            continuation=nothing,
                            tokens=0,
                            nats_per_token=math.nan,
                            error=str(error),
                        )
                    )

        def on_chunk(steps: int) -> None:
            if progress is not None:
                progress(steps / vocabulary.STEPS_PER_SECOND)

        for made in continuous_batching.make(self.decoder, jobs(), rows=batch_size, on_chunk=on_chunk):
            yield from failed
            failed.clear()
            yield _piece(made)
        yield from failed

    def _job(self, request: Request) -> continuous_batching.Job:
        limit_steps, most_tokens = _limits(request.seconds)
        return continuous_batching.Job(
            prompt=_prompt_tokens(request.prompt, request.prompt_seconds),
            seed=request.seed,
            latents=self._check_latents(request.latents),
            mode=request.mode,
            options=request.options,
            limit_steps=limit_steps,
            most_tokens=most_tokens,
            tag=request,
        )

    def batch_size(self, latents: int | None = None, mode: WindowMode = "sliding") -> int:
        """How many pieces `generate_many` makes at once with these settings, if it is not told."""
        return continuous_batching.batch_size(self.decoder, self._check_latents(latents), mode)

    def _check_latents(self, latents: int | None) -> int:
        most = self.model.config.latents
        if latents is None:
            return min(DEFAULT_LATENTS, most)
        if not 2 <= latents <= most:
            raise GenerationError(
                f"latents must lie in 2..{most}: the model was trained with {most} and fails with more; got {latents}"
            )
        return latents

    def calibrate(
        self,
        speed: float,
        prompt_tokens: Int[np.ndarray, " P"] | None = None,
        *,
        variations: int = 1,
        mode: WindowMode = "sliding",
    ) -> int:
        """The largest latent budget, a power of two, with which this machine keeps a speed; if none does, the smallest.

        It times a few chunks, the smallest and the largest budget first, once in the life of a generator.

        Args:
            speed: seconds of music to make in a second, in each variation.
            prompt_tokens: the prompt; if it is long enough, its own tokens a second are what is to be kept up with,
                otherwise MAESTRO's.
            variations: how many pieces are made at once.
            mode: of the windows.
        """
        density = MAESTRO_TOKENS_PER_S
        if prompt_tokens is not None:
            length_s = codec.length_steps(prompt_tokens) / vocabulary.STEPS_PER_SECOND
            if length_s >= _TELLING_PROMPT_S:
                density = len(prompt_tokens) / length_s
        longest_s = 1 / (speed * density * _SPEED_MARGIN)
        most = self.model.config.latents
        budgets = [min(_SMALLEST_AUTO, most)]
        while 2 * budgets[-1] <= most:
            budgets.append(2 * budgets[-1])
        least_s, most_s = (self.seconds_per_token(n, variations, mode) for n in (budgets[0], budgets[-1]))
        slope = (most_s - least_s) / max(budgets[-1] - budgets[0], 1)  # a step reads its caches: the time is linear
        fast = [n for n in budgets if least_s + slope * (n - budgets[0]) <= longest_s]
        while len(fast) > 1 and self.seconds_per_token(fast[-1], variations, mode) > longest_s:
            fast.pop()
        return fast[-1] if fast else budgets[0]

    def seconds_per_token(
        self, latents: int, variations: int = 1, mode: WindowMode = "sliding", *, again: bool = False
    ) -> float:
        """The time of a step on this machine: the median of the chunks of a second, three at least.

        It is measured once, and once more if `again`: a machine that was busy seems slow.
        """
        key = (decoding.ring_size(latents), variations, mode)
        if again or key not in self._seconds_per_token:
            start = np.array([vocabulary.START], np.int32)
            filters = SamplingOptions().filters()
            state = self.decoder.start(
                [start] * variations, latents=latents, seeds=range(variations), limit_steps=2**30, mode=mode
            )
            length, spent_s = continuous_batching.chunk_tokens(variations), []
            while len(spent_s) < 4 or sum(spent_s[1:]) < _CALIBRATION_S:  # the first one compiles
                began_s = time.perf_counter()
                state, tokens = self.decoder.decode(state, filters, length=length)
                np.asarray(tokens)
                spent_s.append(time.perf_counter() - began_s)
            self._seconds_per_token[key] = float(np.median(spent_s[1:])) / length
        return self._seconds_per_token[key]


def _piece(made: continuous_batching.Made) -> Piece:
    request: Request = made.job.tag
    join_s = codec.length_steps(made.job.prompt) / vocabulary.STEPS_PER_SECOND
    whole = codec.decode(np.concatenate([made.job.prompt, made.tokens]))
    continuation = whole.crop(join_s, join_s + request.seconds)
    return Piece(
        request=request,
        performance=continuation if request.continuation_only else whole.crop(0, join_s + request.seconds),
        continuation=continuation,
        tokens=len(made.tokens),
        nats_per_token=float(np.mean(made.nats, dtype=np.float64)),
    )


def _prompt_tokens(prompt: Prompt | None, prompt_seconds: float | None) -> Int[np.ndarray, " P"]:
    """`vocabulary.START`, and the events of the prompt up to the last note that begins or ends within `prompt_seconds`."""
    if prompt is None:
        if prompt_seconds is not None:
            raise GenerationError(f"prompt_seconds = {prompt_seconds} needs a prompt")
        return np.array([vocabulary.START], np.int32)
    if prompt_seconds is not None and not prompt_seconds > 0:
        raise GenerationError(f"prompt_seconds must be more than 0, got {prompt_seconds}")
    performance = prompt if isinstance(prompt, Performance) else read_midi(prompt)
    tokens = codec.encode(performance)
    limit = np.inf if prompt_seconds is None else prompt_seconds * vocabulary.STEPS_PER_SECOND
    usable = np.flatnonzero((tokens < vocabulary.TIME_SHIFT) & (codec.event_steps(tokens) <= limit))
    if not len(usable):
        where = "the prompt" if prompt_seconds is None else f"the first {prompt_seconds:g} s of the prompt"
        raise GenerationError(f"there are no notes in {where} to go on from")
    return np.concatenate([[vocabulary.START], tokens[: usable[-1] + 1]]).astype(np.int32)


def _check_seconds(seconds: float) -> None:
    if not 0 < seconds < math.inf:
        raise GenerationError(f"seconds must be more than 0, got {seconds}")


def _limits(seconds: float) -> tuple[int, int]:
    """Music of this length in steps of 10 ms, and how many tokens to spend on it at most."""
    return max(1, round(seconds * vocabulary.STEPS_PER_SECOND)), round(seconds * MAX_TOKENS_PER_S) + MAX_TOKENS_PER_S
