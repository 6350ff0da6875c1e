"""What a decoder offers, whatever computes it: `Decoder` in JAX, `NativeDecoder` in C++ on CPUs.

Sessions, batches, the autotuner and the evaluation use only this. This module does not import JAX.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int, Integer

from music_ar.decoding.backend import Backend
from music_ar.decoding.request import GenerationError
from music_ar.decoding.sampling import SamplingOptions
from music_ar.decoding.windows import WindowMode
from music_ar.features.wish_options import Wishes
from music_ar.model.config import ModelConfig

Options = dict[str, Any]
"""`SamplingOptions` as arrays: scalars for all rows, or one entry per row. With "guidance" among them, rows come in
pairs (see `guidance`)."""


def check_generates(config: ModelConfig) -> None:
    """Raise `GenerationError` if such a model is for training and scoring only: nothing decodes a tape."""
    if config.tape is not None:
        raise GenerationError(
            "a model with a tape can be trained and scored, but does not generate; take a model without one"
        )


def option_arrays(rows: Sequence[SamplingOptions]) -> Options:
    """Options of several rows, one entry per row, in NumPy."""
    return {
        field.name: np.array([getattr(row, field.name) for row in rows], np.int32 if field.type is int else np.float32)
        for field in dataclasses.fields(SamplingOptions)
    }


def shared_options(options: SamplingOptions) -> Options:
    """Options that all rows share, as scalars. With JAX, changing them recompiles nothing."""
    return {name: array.reshape(()) for name, array in option_arrays([options]).items()}


def repeat_rows(rows: Sequence[Any], count: int) -> list[Any]:
    """Each row so many times, side by side."""
    return [row for row in rows for _ in range(count)]


def repeat_options(options: Options, count: int) -> Options:
    """The options of such rows."""
    return {name: np.repeat(option, count) if np.ndim(option) else option for name, option in options.items()}


def distinct(
    prompts: Sequence[Integer[np.ndarray, " _P"]], wishes_BxD: Float32[np.ndarray, "B D"]
) -> tuple[list[int], list[int]]:
    """Rows that differ in prompt or wishes, and which of them each row equals: equal ones are prefilled once.

    Args:
        prompts: of each row.
        wishes_BxD: the vector of each row's wishes.
    """
    numbers: dict[tuple[bytes, bytes], int] = {}
    keys = [(prompt.tobytes(), wishes_D.tobytes()) for prompt, wishes_D in zip(prompts, wishes_BxD, strict=True)]
    index = [numbers.setdefault(key, len(numbers)) for key in keys]
    return [index.index(number) for number in range(len(numbers))], index


def row_wishes(wishes: Sequence[Wishes] | None, rows: int) -> Sequence[Wishes]:
    """The wishes of each of so many rows; None stands for none in all of them.

    Raises:
        ValueError: not as many wishes as rows.
    """
    if wishes is not None and len(wishes) != rows:
        raise ValueError(f"expected wishes for each of {rows} prompts, got {len(wishes)}")
    return [Wishes()] * rows if wishes is None else wishes


def depth_of(config: ModelConfig, layers: int | None) -> int:
    """The number of self-attention blocks to run: `layers`, or all.

    Raises:
        ValueError: the model does not predict after so many.
    """
    if layers is not None and layers not in config.depths:
        raise ValueError(f"layers must be one of {list(config.depths)}, after which the model predicts; got {layers}")
    return config.layers if layers is None else layers


def leaves_early(config: ModelConfig, layers: int | None, tolerance: float) -> bool:
    """Whether a token may leave at an exit before the last of `layers` blocks."""
    return tolerance > 0 and any(depth < depth_of(config, layers) for depth in config.exits)


@runtime_checkable
class AnyState(Protocol):
    """What decoding carries from token to token, for a batch of rows."""

    @property
    def done_B(self) -> Any:
        """Rows that have ended or have enough music, as an array of booleans."""
        ...

    @property
    def layers_run_B(self) -> Any:
        """Self-attention blocks run since `start`, over all tokens of each row; None if they were not counted."""
        ...

    def with_limit(self, limit_steps: int) -> "AnyState":
        """The state with another limit: rows are done after `limit_steps` of music after their prompts."""
        ...

    def with_seeds(self, seeds: Sequence[int]) -> "AnyState":
        """The state with other random keys: those of these seeds, one per row."""
        ...

    def with_ended(self, ended_B: Bool[np.ndarray, " B"]) -> "AnyState":
        """The state with these rows ended and the others not."""
        ...

    def rows(self, rows: Sequence[int]) -> "AnyState":
        """A copy of the state of some rows, in this order; a row may be taken more than once."""
        ...

    def replaced(self, row: int, newcomer: Any) -> "AnyState":
        """The state with a new piece in one row; the other rows continue as before.

        Args:
            row: the row to replace.
            newcomer: a state of one row, of the same number of latents and layers, in which tokens may leave early if
                they may in this one; it can be used again. The state itself cannot.
        """
        ...


@runtime_checkable
class AnyDecoder(Protocol):
    """A model ready to decode. A state that is passed to `decode` or `teacher_force` must not be used again.

    Attributes:
        config: sizes of the model.
        backend: how it decodes.
        device: name of the device.
        path: what computes: "jax", or the instructions that the native engine uses: "vnni", "avx2" or "portable".
    """

    config: ModelConfig
    backend: Backend
    device: str
    path: str

    def start(
        self,
        prompts: Sequence[Integer[np.ndarray, " _P"]],
        *,
        latents: int,
        seeds: Sequence[int],
        limit_steps: int,
        layers: int | None = None,
        tolerance: float = 0.0,
        mode: WindowMode = "sliding",
        wishes: Sequence[Wishes] | None = None,
    ) -> Any:
        """State (`AnyState`) after all but the last token of each prompt; the last one is pending.

        Args:
            prompts: one token array per row, each beginning with `vocabulary.START`. Equal ones are prefilled once.
            latents: the number of latents n, at least 2; in exact mode, an odd n acts as n - 1.
            seeds: one per row; a row's tokens depend only on its own prompt, seed and options.
            limit_steps: a row is done when this much music (in steps of 10 ms) follows its prompt.
            layers: number of self-attention blocks to run, one of `ModelConfig.depths`; default: all.
            tolerance: a token leaves early at the first exit below `layers` where that is expected to cost fewer nats;
                at 0 none does. The prompt is read through all `layers`.
            mode: how the window of latents continues once it is full; see `windows`.
            wishes: one per row; default: none.

        Raises:
            ValueError: not as many seeds or wishes as prompts, or no exit after so many layers.
            WishError: the model cannot take the wishes.
        """
        ...

    def decode(self, state: Any, options: Options, *, length: int) -> tuple[Any, Any]:
        """Sample up to `length` tokens per row; it stops sooner once all rows are done.

        Args:
            state: where to continue.
            options: how to sample.
            length: tokens per row.

        Returns:
            The state, whose pending tokens are the last ones sampled, and the tokens [B, length], `vocabulary.PAD` once
            a row is done: it waits for the others.
        """
        ...

    def decode_scored(self, state: Any, options: Options, *, length: int) -> tuple[Any, Any, Any]:
        """Like `decode`, with the NLL of each token in nats, under the model itself, before any processor."""
        ...

    def teacher_force(self, state: Any, tokens_BxT: Int[np.ndarray, "B T"]) -> tuple[Any, Any]:
        """Advance with the given tokens in place of sampled ones, `vocabulary.PAD` after a row's end.

        Returns:
            The state, and the logits [B, T, V] that each token was predicted with.
        """
        ...

    def batch_rows(self, latents: int) -> int:
        """Number of rows to decode at once: a rule, so that it gives the same number, and the same music, each time."""
        ...

    def step_bytes(self, state: Any) -> int:
        """Bytes that a step must read: the weights and the caches of a state."""
        ...

    def bare_matrices_s(self, rows: int, layers: int | None = None) -> float | None:
        """Seconds that the int8 matrices of a step alone take with so many rows and layers, timed; None with JAX."""
        ...

    def free_programs(self) -> None:
        """Free the compiled programs, if there are any; they are compiled again, or read from disk, when needed."""
        ...
