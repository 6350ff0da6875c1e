"""`Generator`: piano music in, piano music out. What people import."""

import dataclasses
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO

import jax
import numpy as np
from jaxtyping import Int

from music_ar import decoding, events
from music_ar.checkpoint import load_released
from music_ar.midi import Performance, read_midi
from music_ar.model import PerceiverAR
from music_ar.quantization import with_int8_weights
from music_ar.sampling import SamplingOptions

DEFAULT_LATENTS = 1024
CHUNK_TOKENS = 64
# A stuck model could play notes for ever without letting time pass; the densest MAESTRO second has fewer tokens.
MAX_TOKENS_PER_S = 500
MAX_SEED = 2**31 - 1

Prompt = Performance | str | os.PathLike[str] | bytes | BinaryIO


class GenerationError(ValueError):
    """A request that cannot be met; the message says what was expected and what came."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece as far as it has been made.

    Attributes:
        performance: all notes so far; those still sounding end at the last event.
        seed: what it was made with.
        tokens: event tokens made.
        tokens_per_s: speed so far, without the prompt's prefill.
        seconds_made: music made after the prompt.
        seconds_wanted: music asked for.
        eta_s: estimate of the time to go.
        finished: whether this is the last chunk.
    """

    performance: Performance
    seed: int
    tokens: int
    tokens_per_s: float
    seconds_made: float
    seconds_wanted: float
    eta_s: float
    finished: bool


class Generator:
    """Makes piano music with a trained model.

    Args:
        model: the model; see `from_pretrained` for the usual way.
    """

    def __init__(self, model: PerceiverAR):
        self.model = model

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str] | None = None) -> "Generator":
        """Loads a released model.

        Args:
            source: the name of a shipped checkpoint, a folder, or a hub id ("owner/name"); default: the
                checkpoint that ships with the project.

        Raises:
            CheckpointError: it is not there, damaged, or of another vocabulary.
        """
        model = load_released(source)
        # On a CPU a token waits for the weights to come from memory; a GPU computes in bfloat16 instead.
        return cls(with_int8_weights(model) if jax.default_backend() == "cpu" else model)

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        seconds: float = 60.0,
        latents: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.98,
        min_p: float = 0.0,
        seed: int | None = None,
        prompt_seconds: float | None = None,
        continuation_only: bool = False,
        progress: Callable[[Chunk], None] | None = None,
    ) -> Performance:
        """Makes a piece. Takes what `stream` takes, and returns the last chunk's performance.

        Args:
            progress: called with each chunk.
        """
        options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        chunk = None
        for chunk in self.stream(
            prompt,
            seconds=seconds,
            latents=latents,
            options=options,
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
        latents: int | None = None,
        options: SamplingOptions = SamplingOptions(),
        seed: int | None = None,
        prompt_seconds: float | None = None,
        continuation_only: bool = False,
    ) -> Iterator[Chunk]:
        """Makes a piece chunk by chunk. Checks the request at once; closing the iterator stops the work.

        Args:
            prompt: a performance or a MIDI file to go on from; None makes a new piece.
            seconds: music to make after the prompt; a piece may also end by itself before.
            latents: the latent budget, 2 to the number the model was trained with; fewer is faster and less
                coherent. Default: 1024, or what the model has.
            options: how tokens are drawn.
            seed: 0 to 2**31 - 1; the same seed and request give the same piece on the same kind of machine.
                Default: a random one, which each chunk tells.
            prompt_seconds: use only the beginning of the prompt. Notes that sound at the cut are held, and the
                model decides when they end.
            continuation_only: leave the prompt out of the result, and count time from where it ended.

        Raises:
            GenerationError: an option out of range, or nothing to go on from in the prompt.
            MidiError: the prompt is not a usable MIDI file.
        """
        latents = self._check_latents(latents)
        if not 0 < seconds < math.inf:
            raise GenerationError(f"seconds must be more than 0, got {seconds}")
        if seed is None:
            seed = secrets.randbelow(MAX_SEED + 1)
        if not 0 <= seed <= MAX_SEED:
            raise GenerationError(f"seed must lie in 0..{MAX_SEED}, got {seed}")
        tokens = np.concatenate([[events.START], _prompt_tokens(prompt, prompt_seconds)]).astype(np.int32)
        return self._run(tokens, seconds, latents, options, seed, continuation_only)

    def _check_latents(self, latents: int | None) -> int:
        most = self.model.config.latents
        if latents is None:
            return min(DEFAULT_LATENTS, most)
        if not 2 <= latents <= most:
            raise GenerationError(
                f"latents must lie in 2..{most}: the model was trained with {most} and fails with more; got {latents}"
            )
        return latents

    def _run(
        self,
        tokens: Int[np.ndarray, " P"],
        seconds: float,
        latents: int,
        options: SamplingOptions,
        seed: int,
        continuation_only: bool,
    ) -> Iterator[Chunk]:
        prompt_tokens, join_s = len(tokens), events.length_steps(tokens) / events.STEPS_PER_SECOND
        limit_steps = max(1, round(seconds * events.STEPS_PER_SECOND))
        most_tokens = round(seconds * MAX_TOKENS_PER_S) + MAX_TOKENS_PER_S
        state = decoding.start(self.model, [tokens], latents=latents, seeds=[seed], limit_steps=limit_steps)
        filters = options.filters()
        began_s, finished = time.monotonic(), False
        while not finished:
            state, new_1xT = decoding.decode(self.model, state, filters, length=CHUNK_TOKENS)
            new = np.asarray(new_1xT[0])
            tokens = np.concatenate([tokens, new[new != events.PAD]])
            made = len(tokens) - prompt_tokens
            finished = bool(state.done_B[0]) or made >= most_tokens
            made_s = min(events.length_steps(tokens) / events.STEPS_PER_SECOND - join_s, seconds)
            spent_s = time.monotonic() - began_s
            yield Chunk(
                performance=events.decode(tokens).crop(join_s if continuation_only else 0, join_s + seconds),
                seed=seed,
                tokens=made,
                tokens_per_s=made / spent_s,
                seconds_made=made_s,
                seconds_wanted=seconds,
                eta_s=0.0 if finished else (seconds - made_s) * spent_s / max(made_s, 0.01),
                finished=finished,
            )


def _prompt_tokens(prompt: Prompt | None, prompt_seconds: float | None) -> Int[np.ndarray, " P"]:
    """Events of the prompt up to the last note that begins or ends within `prompt_seconds`."""
    if prompt is None:
        if prompt_seconds is not None:
            raise GenerationError(f"prompt_seconds = {prompt_seconds} needs a prompt")
        return np.zeros(0, np.int32)
    if prompt_seconds is not None and not prompt_seconds > 0:
        raise GenerationError(f"prompt_seconds must be more than 0, got {prompt_seconds}")
    performance = prompt if isinstance(prompt, Performance) else read_midi(prompt)
    tokens = events.encode(performance)
    limit = np.inf if prompt_seconds is None else prompt_seconds * events.STEPS_PER_SECOND
    usable = np.flatnonzero((tokens < events.TIME_SHIFT) & (events.event_steps(tokens) <= limit))
    if not len(usable):
        where = "the prompt" if prompt_seconds is None else f"the first {prompt_seconds:g} s of the prompt"
        raise GenerationError(f"there are no notes in {where} to go on from")
    return tokens[: usable[-1] + 1]
