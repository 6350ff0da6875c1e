"""`Generator`: piano music in, piano music out. The main entry point."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from music_ar.decoding import continuous_batching
from music_ar.decoding.autotune import Autotuner
from music_ar.decoding.budget import Frontier, Setting
from music_ar.decoding.continuous_batching import Completion
from music_ar.decoding.interface import AnyDecoder
from music_ar.decoding.loading import load_decoder
from music_ar.decoding.request import DEFAULT_LATENTS, DEFAULT_SPEED, GenerationError, Prompt, Request
from music_ar.decoding.session import Chunk, Session
from music_ar.features.measured import Measured, measure
from music_ar.features.wish_options import WishError, Wishes
from music_ar.features.wishes import WishControl, wish_ids
from music_ar.midi.io import read_prompt
from music_ar.midi.performance import Performance
from music_ar.model.config import ModelConfig
from music_ar.model.weights import read_companion
from music_ar.tokens import vocabulary
from music_ar.tokens.codec import encode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """The result of one request to `Generator.generate_many`.

    Attributes:
        request: the request.
        performance: the piece as requested; empty if it could not be generated.
        continuation: the generated part alone, timed from the end of the prompt.
        tokens: event tokens generated.
        nats_per_token: mean -log p of the generated tokens under the model itself, before any logit processor.
        error: why the piece could not be generated, or None.
    """

    request: Request
    performance: Performance
    continuation: Performance
    tokens: int
    nats_per_token: float
    error: str | None = None


class Generator:
    """Generates piano music with a trained model.

    The methods take options by keyword: the fields of `Request` (after, seconds, latents, layers, tolerance, budget,
    speed, seed, variations, prompt_seconds, continuation_only, tag), of `SamplingOptions` (temperature, top_k, top_p,
    min_p, steadiness) and, if the model takes wishes, of `Wishes` (density, loudness, composer and so on). They also
    take a whole `Request` in place of a prompt.

    Args:
        decoder: a model ready to decode; `from_pretrained` is the usual way to load one.
        curve: returns the text of the model's `curve.json`, which says what settings a budget buys.
    """

    def __init__(self, decoder: AnyDecoder, *, curve: Callable[[], str] = str):
        self.decoder, self._curve = decoder, curve
        self.autotuner = Autotuner(decoder)

    @property
    def config(self) -> ModelConfig:
        """Sizes of the model."""
        return self.decoder.config

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str] | None = None) -> "Generator":
        """Load a pretrained model, to decode in the fastest way known for this machine.

        Args:
            source: the name of a shipped checkpoint, a folder, or a hub id ("owner/name"); default: the checkpoint that
                ships with the project.

        Raises:
            CheckpointError: the model is missing, damaged, or has a different vocabulary.
            GenerationError: it does not generate.
        """
        return cls(load_decoder(source), curve=functools.partial(read_companion, source, "curve.json"))

    @functools.cached_property
    def frontier(self) -> Frontier:
        """The best settings at each cost, as measured for the model; read on first use.

        Raises:
            CheckpointError: the model's `curve.json` is damaged.
        """
        return Frontier.read(self._curve(), self.config)

    def generate(
        self, prompt: Prompt | Request | None = None, *, progress: Callable[[Chunk], None] | None = None, **options: Any
    ) -> Performance:
        """Generate a piece and return it.

        Args:
            prompt: a performance or a MIDI file to continue; None makes a new piece.
            progress: called with each chunk.
            options: see the class.

        Raises:
            GenerationError, SamplingError, MidiError: as `stream`.
        """
        chunk = None
        for chunk in self.stream(prompt, **options):
            if progress is not None:
                progress(chunk)
        assert chunk is not None  # a stream has at least one chunk
        return chunk.performance

    def stream(self, prompt: Prompt | Request | None = None, **options: Any) -> Iterator[Chunk]:
        """Generate a piece, or several variations of one, chunk by chunk. The request is checked immediately.

        Closing the iterator, or dropping it, ends the work and frees the device memory.

        Args:
            prompt: a performance or a MIDI file to continue; None makes a new piece.
            options: see the class.

        Raises:
            GenerationError: an option is unknown or out of range, or the prompt has nothing to continue from.
            SamplingError: a sampling option is out of range.
            MidiError: the prompt is not a usable MIDI file.
        """
        request = Request.of(prompt, **options)
        session = self.session(request)

        def chunks() -> Iterator[Chunk]:
            try:
                yield from session.extend(request.seconds)
            finally:
                session.close()

        return chunks()

    def infill(
        self,
        before: Prompt | None = None,
        after: Prompt | None = None,
        *,
        seconds: float,
        progress: Callable[[Chunk], None] | None = None,
        **options: Any,
    ) -> Performance:
        """Fill a gap between two passages, and return both with what joins them.

        The gap begins where the notes before it end, or at `prompt_seconds`; what comes after it begins exactly
        `seconds` later. No note is cut, except those of keys that are struck again. `Request.replacing` describes a
        passage of a piece to replace, for `generate`, `stream` and `generate_many`.

        Args:
            before: a performance or a MIDI file; None begins the piece with the gap.
            after: a performance or a MIDI file, timed from the end of the gap; None ends the piece with it.
            seconds: length of the gap.
            progress: called with each chunk.
            options: see the class.

        Raises:
            GenerationError: the model cannot fill gaps, or an option is unknown or out of range.
            SamplingError, MidiError: as `stream`.
        """
        follows = Performance.empty() if after is None else after
        request = Request.of(before, after=follows, seconds=seconds, **options)
        return self.generate(request, progress=progress)

    def session(self, prompt: Prompt | Request | None = None, **options: Any) -> Session:
        """Prefill the prompt into caches, from which `Session.extend` continues as often as it is called.

        Args:
            prompt: a performance or a MIDI file to continue; None makes a new piece.
            options: see the class; `seconds` is left to `extend`.

        Raises:
            GenerationError, SamplingError, MidiError: as `stream`.
        """
        return Session(self.decoder, self._resolved(Request.of(prompt, **options).read()))

    def generate_many(
        self,
        prompts: Iterable[Prompt | Request | None],
        *,
        batch_size: int | None = None,
        progress: Callable[[float], None] | None = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """Generate many pieces in a batch that is kept full, and yield each when it is finished.

        A piece depends on its own request and, where JAX decodes, in the last bit of its logits on the batch size (see
        `continuous_batching`). For a given batch size it is always the same, whatever else is generated.

        Args:
            prompts: performances or MIDI files to continue, None for a new piece, or whole `Request`s, which keep their
                own settings. They are taken one by one, as rows become free. Put requests next to each other if their
                numbers of latents round up to the same power of two: they share a batch.
            batch_size: number of pieces generated at once; default: see `Generator.batch_size`.
            progress: called after each chunk with the seconds of music generated since the last call.
            options: for prompts that are not `Request`s; see the class.

        Raises:
            GenerationError, SamplingError: an option is unknown or out of range. An error in a single prompt is
                reported in its `Piece.error`.
        """
        if batch_size is not None and batch_size < 1:
            raise GenerationError(f"batch_size must be at least 1, got {batch_size}")
        shared = Request.of(None, **options).with_seed()
        self.check_wishes(shared.wishes)
        if shared.latents != "auto":
            self.setting(shared)

        def requests() -> Iterator[Request]:
            for prompt in prompts:
                yield prompt if isinstance(prompt, Request) else dataclasses.replace(shared, prompt=prompt)

        def on_chunk(steps: int) -> None:
            if progress is not None:
                progress(steps / vocabulary.STEPS_PER_SECOND)

        completions = continuous_batching.complete(
            self.decoder, requests(), resolve=self._resolved, rows=batch_size, on_chunk=on_chunk
        )
        return map(_piece, completions)

    def batch_size(self, latents: int | None = None) -> int:
        """Default number of pieces that `generate_many` generates at once, for a number of latents."""
        return self.decoder.batch_rows(self._checked_latents(latents))

    def wish_controls(self, prompt: Prompt | None = None) -> list[WishControl]:
        """The wishes that the model takes, with their ranges or names; empty if it takes none.

        Args:
            prompt: music whose own numbers are the defaults.

        Raises:
            MidiError: the prompt is not a usable MIDI file.
        """
        table = self.config.wishes
        if table is None:
            return []
        played = prompt if prompt is None or isinstance(prompt, Performance) else read_prompt(prompt)
        return table.controls(Measured() if played is None else measure(encode(played)))

    def check_wishes(self, wishes: Wishes) -> None:
        """Check that the model can take these wishes.

        Raises:
            GenerationError: it cannot; the message says what is possible.
        """
        try:
            wish_ids(self.config.wishes, wishes)
        except WishError as error:
            raise GenerationError(str(error)) from error

    def setting(self, request: Request) -> Setting:
        """The latents, layers and tolerance that a request asks for. "auto" measures this machine's speed.

        Raises:
            GenerationError: the model cannot decode so, or cannot fill a gap, or its budget is not known.
            CheckpointError: the model's `curve.json` is damaged.
        """
        if request.after is not None and not self.config.fills_gaps:
            raise GenerationError(
                "this model cannot fill a gap, since it was not trained to: take another one, or train it further with "
                "music-ar train --infill"
            )
        if request.budget is not None:
            return self._affordable(request.budget)
        layers = self._checked_layers(request.layers)
        if request.tolerance > 0 and not self.config.exits:
            raise GenerationError(
                "tolerance must be 0: no event of this model can be done early, since it predicts only after all "
                f"{self.config.layers} layers; got {request.tolerance:g}"
            )
        if request.latents != "auto":
            return Setting(self._checked_latents(request.latents), layers, request.tolerance)
        speed = DEFAULT_SPEED if request.speed is None else request.speed
        gap = request.gap(self.config.reach)
        tokens = request.prompt_tokens() if gap is None else gap.tokens
        pace: dict[str, Any] = {"prompt": tokens, "variations": request.variations * request.rows}
        if self.config.exits and (request.layers, request.tolerance) == (None, 0) and self.frontier.settings:
            return self.autotuner.setting(speed, self.frontier, **pace)
        latents = self.autotuner.latents(speed, layers=layers, tolerance=request.tolerance, **pace)
        return Setting(latents, layers, request.tolerance)

    def _resolved(self, request: Request) -> Request:
        """The request with its setting resolved and checked."""
        self.check_wishes(request.wishes)
        return dataclasses.replace(request, **self.setting(request)._asdict(), budget=None, speed=None)

    def _affordable(self, budget: float) -> Setting:
        if not self.frontier.settings:
            raise GenerationError(
                "a budget needs a model whose speed and quality were measured, and this one has no curve.json: choose "
                "latents and layers in place of it"
            )
        setting = self.frontier.best(budget)
        if setting is None:
            least, cheapest = math.ceil(100 * self.frontier.least) / 100, self.frontier.settings[0].setting
            raise GenerationError(
                f"the budget must be from {least:g} to 1, since the model's fastest setting "
                f"({cheapest.in_words(self.config)}) takes that share of the full time; got {budget:g}"
            )
        return setting

    def _checked_layers(self, layers: int | None) -> int:
        depths = self.config.depths
        if layers is None or layers in depths:
            return self.config.layers if layers is None else layers
        after = ", ".join(map(str, depths[:-1])) + f" or {depths[-1]}" if depths[:-1] else f"all {depths[-1]}"
        raise GenerationError(f"layers must be {after}, after which this model predicts; got {layers}")

    def _checked_latents(self, latents: int | None) -> int:
        most = self.config.most_latents
        if latents is None:
            return min(DEFAULT_LATENTS, most)
        if not 2 <= latents <= most:
            raise GenerationError(
                f"latents must be in 2..{most}: the model was trained with {most} and fails with more; got {latents}"
            )
        return latents


def _piece(completion: Completion) -> Piece:
    request, sequence, error = completion
    if sequence is None:
        nothing = Performance.empty()
        return Piece(
            request=request, performance=nothing, continuation=nothing, tokens=0, nats_per_token=math.nan, error=error
        )
    notes = sequence.notes()
    until_s = notes.join_s + request.seconds
    return Piece(
        request=request,
        performance=notes.performance(until_s, continuation_only=request.continuation_only),
        continuation=notes.performance(until_s, continuation_only=True),
        tokens=sequence.count,
        nats_per_token=float(sequence.nats.mean(dtype="float64")),
    )
