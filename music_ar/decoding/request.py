"""`Request`: what to generate. The same type goes from the command line, a job file or the page down to the decoder.

This module does not import JAX.
"""

import dataclasses
import os
import secrets
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal

import numpy as np
from jaxtyping import Int

from music_ar.decoding.gap_request import LONGEST_S, RELEASE_S, SHORTEST_S, GapRequest
from music_ar.decoding.sampling import OPTION_NAMES, SamplingOptions
from music_ar.features.wish_options import WISH_OPTIONS, Wishes
from music_ar.midi.io import read_prompt
from music_ar.midi.performance import Performance
from music_ar.ranges import MAX_SECONDS, MAX_SEED, check_ranges, number, shown, whole
from music_ar.tokens import vocabulary
from music_ar.tokens.codec import encode, event_steps

DEFAULT_LATENTS = 1024
DEFAULT_SPEED = 1.5
MAX_VARIATIONS = 10_000
MAX_CHOICES = 64
# A stuck model could emit notes forever without advancing time; the densest second of MAESTRO has fewer tokens.
_MAX_TOKENS_PER_S = 500

Prompt = Performance | str | os.PathLike[str] | bytes | BinaryIO


class GenerationError(ValueError):
    """A request that cannot be met; the message says what was expected and what was given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate.

    Attributes:
        prompt: a performance or a MIDI file to continue; None starts a new piece.
        after: a performance or a MIDI file that follows. The music then fills a gap of exactly `seconds` between the
            prompt and it; the gap begins at `prompt_seconds`, or where the prompt ends, and time zero of what follows
            is its end. An empty performance fills a gap that nothing follows. None does not fill a gap.
        seconds: seconds of music to generate after the prompt; a piece may end sooner on its own.
        latents: number of latents, from 2 to the number that the model was trained with; fewer is faster, more is more
            coherent. Default: 1024, or the model's number if it is smaller. "auto" takes the most that reach `speed` on
            this machine.
        layers: number of self-attention layers to run, one of those after which the model was trained to predict (see
            `ModelConfig.depths`); fewer is faster. Default: all.
        tolerance: a token is done early, after fewer layers, once that is expected to cost fewer nats than this; more
            is faster. Default: 0, never.
        budget: time for a token as a share of what all latents and layers take, above 0 to 1, in place of `latents`,
            `layers` and `tolerance`: it takes the best of the model's measured settings that cost no more.
        speed: with "auto", seconds of music to generate per second; default 1.5.
        sampling: how tokens are drawn.
        wishes: how the music should be, for a model that takes wishes.
        seed: 0 to 2**31 - 1; the same seed and request give the same piece on the same kind of machine. Default: a
            random one, which the results include.
        variations: how many samples of the prompt to generate, with the seeds `seed`, `seed` + 1 and so on. On a CPU,
            in the native engine, each is the piece that its seed gives alone, to the byte. With JAX, the number of
            pieces generated at once moves the last bits of the logits, so that a seed may give another piece alone.
        choices: how often each phrase of 8 s is made, of which the one is kept that returns most to what the piece
            began with; 1 makes each once. Each takes the time of a piece.
        prompt_seconds: use only the beginning of the prompt. Notes that sound at the cut are held, and the model
            decides when they end.
        continuation_only: leave the prompt out of the result, and count time from where it ended.
        tag: any value; returned with the result.

    Raises:
        GenerationError: a value is out of range.
    """

    prompt: Prompt | None = None
    after: Prompt | None = None
    seconds: float = number(60.0, above=0, most=MAX_SECONDS)
    latents: int | Literal["auto"] | None = whole(None, 2, words=("auto",))
    layers: int | None = whole(None, 1)
    tolerance: float = number(0.0, least=0, most=100)
    budget: float | None = number(None, above=0, most=1)
    speed: float | None = number(None, above=0, most=1000)
    sampling: SamplingOptions = SamplingOptions()
    wishes: Wishes = Wishes()
    seed: int | None = whole(None, 0, MAX_SEED)
    variations: int = whole(1, 1, MAX_VARIATIONS)
    choices: int = whole(1, 1, MAX_CHOICES)
    prompt_seconds: float | None = number(None, above=0, most=MAX_SECONDS)
    continuation_only: bool = False
    tag: Any = None

    def __post_init__(self) -> None:
        check_ranges(self, GenerationError)
        if self.seed is not None and self.seed > MAX_SEED - (self.variations - 1):
            raise GenerationError(
                f"seeds must be in 0..{MAX_SEED}, got {self.seed} for the first of {self.variations} variations"
            )
        if self.speed is not None and self.latents != "auto":
            raise GenerationError(f'speed = {self.speed} needs latents = "auto"')
        if self.budget is not None and (self.latents, self.layers, self.tolerance) != (None, None, 0.0):
            raise GenerationError("give either a budget, or latents, layers and tolerance")
        if self.after is not None and self.choices > 1:
            raise GenerationError(f"choices are for music that goes on, and must be 1 in a gap; got {self.choices}")
        if self.after is not None and not SHORTEST_S <= self.seconds <= LONGEST_S:
            raise GenerationError(
                f"a gap must last from {shown(SHORTEST_S)} s, a short note, to {shown(LONGEST_S)} s, the longest that "
                f"models are trained to fill; got {shown(self.seconds)} s"
            )

    @classmethod
    def of(cls, prompt: "Prompt | Request | None" = None, **options: Any) -> "Request":
        """A request from a prompt, or from another request, with options by keyword.

        Args:
            prompt: what to continue, or a request to change.
            options: fields of `Request`, of `SamplingOptions` and of `Wishes`.

        Raises:
            GenerationError: an option is unknown, or a value is out of range.
            SamplingError, WishError: a sampling option or a wish is out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        nested = {"sampling": OPTION_NAMES, "wishes": WISH_OPTIONS}
        every = [*known, *OPTION_NAMES, *WISH_OPTIONS]
        unknown = [name for name in options if name not in every]
        if unknown:
            names = ", ".join(every)
            raise GenerationError(f"unknown option {', '.join(unknown)}; expected any of {names}")
        request = prompt if isinstance(prompt, Request) else cls(prompt=prompt)
        inner = {
            group: {name: options.pop(name) for name in names if name in options} for group, names in nested.items()
        }
        changed = dataclasses.replace(request, **options)
        groups = {
            group: dataclasses.replace(getattr(changed, group), **given) for group, given in inner.items() if given
        }
        return dataclasses.replace(changed, **groups)

    @classmethod
    def replacing(cls, piece: Performance, start_s: float, end_s: float, **options: Any) -> "Request":
        """A request to replace a passage of a piece: its notes that begin in [start_s, end_s).

        Args:
            piece: the piece.
            start_s, end_s: the passage, in seconds.
            options: as for `of`.

        Raises:
            GenerationError: the passage is not in the piece, or an option is out of range.
        """
        if not 0 <= start_s < end_s <= piece.duration_s:
            raise GenerationError(
                f"expected a passage from 0 s to at most {piece.duration_s:.2f} s, where the piece ends; got "
                f"{shown(start_s)} s to {shown(end_s)} s"
            )
        after = piece.crop(end_s)
        if start_s == 0:
            return cls.of(None, after=after, seconds=end_s, **options)
        return cls.of(piece, prompt_seconds=start_s, after=after, seconds=end_s - start_s, **options)

    @property
    def rows(self) -> int:
        """Rows of a batch that one variation takes."""
        return self.choices * (2 if self.wishes.is_guided else 1)

    def with_seed(self) -> "Request":
        """The request with a seed: its own, or a random one."""
        if self.seed is not None:
            return self
        return dataclasses.replace(self, seed=secrets.randbelow(MAX_SEED + 1 - (self.variations - 1)))

    def read(self) -> "Request":
        """The request with its prompt read, if that is a MIDI file, whose bytes the prompt then refers to.

        Raises:
            MidiError: the file is not usable.
        """
        prompt, after = (
            part if part is None or isinstance(part, Performance) else read_prompt(part)
            for part in (self.prompt, self.after)
        )
        if prompt is self.prompt and after is self.after:
            return self
        return dataclasses.replace(self, prompt=prompt, after=after)

    def samples(self) -> "Iterator[Request]":
        """A request for each variation."""
        first = self.with_seed().seed
        assert first is not None
        for seed in range(first, first + self.variations):
            yield dataclasses.replace(self, variations=1, seed=seed)

    def gap(self, context: int) -> GapRequest | None:
        """The gap to fill; None if there is none.

        Args:
            context: number of inputs that the model reads.

        Raises:
            GenerationError: there are no notes before it, or it is too long for the context.
            MidiError: a part is not a usable MIDI file.
        """
        if self.after is None:
            return None
        parts = self.read()
        assert isinstance(parts.after, Performance)
        assert parts.prompt is None or isinstance(parts.prompt, Performance)
        if parts.prompt is not None and not len(parts.prompt):
            raise GenerationError("there are no notes in the prompt before the gap")
        if parts.prompt is None and self.prompt_seconds is not None:
            raise GenerationError(f"prompt_seconds = {self.prompt_seconds} needs a prompt")
        gap = GapRequest.of(parts.prompt, parts.after, self.seconds, self.prompt_seconds, context)
        if gap is None:
            raise GenerationError(
                f"a gap of {shown(self.seconds)} s does not fit in the {context} events that the model reads"
            )
        return gap

    def limits(self, seconds: float | None = None) -> tuple[int, int]:
        """Most music to generate, in steps of 10 ms, and most tokens.

        Args:
            seconds: of music; default: those of the request. A gap ends on its own, but later, with its last note.
        """
        if self.after is not None:
            return limits(self.seconds + RELEASE_S)
        return limits(self.seconds if seconds is None else seconds)

    def prompt_tokens(self) -> Int[np.ndarray, " P"]:
        """`START`, and the events of the prompt up to the last note that begins or ends within `prompt_seconds`.

        Raises:
            GenerationError: there are no notes to continue from.
            MidiError: the prompt is not a usable MIDI file.
        """
        if self.prompt is None:
            if self.prompt_seconds is not None:
                raise GenerationError(f"prompt_seconds = {self.prompt_seconds} needs a prompt")
            return np.array([vocabulary.START], np.int32)
        performance = self.read().prompt
        assert isinstance(performance, Performance)
        tokens = encode(performance)
        limit = np.inf if self.prompt_seconds is None else self.prompt_seconds * vocabulary.STEPS_PER_SECOND
        usable = np.flatnonzero(vocabulary.is_note(tokens) & (event_steps(tokens) <= limit))
        if not len(usable):
            part = "" if self.prompt_seconds is None else f"the first {self.prompt_seconds:g} s of "
            raise GenerationError(f"there are no notes in {part}the prompt to continue from")
        return np.concatenate([[vocabulary.START], tokens[: usable[-1] + 1]]).astype(np.int32)


def check_seconds(seconds: float) -> None:
    """Raise `GenerationError` unless `seconds` is a valid length of a `Request`."""
    Request(seconds=seconds)


def limits(seconds: float) -> tuple[int, int]:
    """A length of music in steps of 10 ms, and the most tokens to generate for it."""
    return max(1, round(seconds * vocabulary.STEPS_PER_SECOND)), round(seconds * _MAX_TOKENS_PER_S) + _MAX_TOKENS_PER_S


def stuck_error(tokens: int, steps: int) -> str | None:
    """Why a piece has failed in which time stands still, or None: no music has so many events in so little time.

    Args:
        tokens: tokens generated.
        steps: length of the generated music, in steps of 10 ms.
    """
    seconds = steps / vocabulary.STEPS_PER_SECOND
    if tokens <= limits(seconds)[1]:
        return None
    return (
        f"the model wrote {tokens:,} events for {seconds:.1f} s of music and hardly lets time pass; try another seed, "
        "or a temperature nearer to 1"
    )
