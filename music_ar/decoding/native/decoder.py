"""`NativeDecoder`: decoding on a CPU in C++, with the interface of `music_ar.decoding.decoder.Decoder`.

It computes what the JAX step computes, which is its reference in the tests, and takes and returns NumPy arrays. Windows
slide; re-anchored windows ("exact") exist in JAX only. This module imports neither JAX nor Flax.
"""

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int32, Integer

from music_ar.decoding.backend import CPU, Backend
from music_ar.decoding.interface import check_generates, depth_of, distinct, row_wishes
from music_ar.decoding.native.library import CConfig, COptions, CState, CTensor, Library, load
from music_ar.decoding.native.state import NativeState
from music_ar.decoding.native.weights import Tensor, engine_tensors
from music_ar.features.wish_options import Wishes
from music_ar.features.wishes import wish_vectors
from music_ar.model.config import ModelConfig
from music_ar.model.weights import Weights
from music_ar.tokens import vocabulary

_MOST_HEAD_SIZE = 256  # as in kernels.h
_BARE_PASSES = 50


class NativeDecoder:
    """A model ready to decode.

    Args:
        config: sizes of the model.
        tensors: its weights by name, as in a pretrained model's file: int8 with scales, or float32.
        backend: lengths of chunks and sizes of batches.

    Attributes:
        config, backend: as given.
        device: "cpu".
        path: the instructions that the engine uses: "vnni", "avx2" or "portable". It chooses the fastest that the CPU
            has; the environment variable `MUSIC_AR_CPU` asks for another.

    Raises:
        GenerationError: the model does not generate.
        RuntimeError: the engine was not built on this machine.
        ValueError: a tensor is missing or has another shape, or the engine does not support a size.
    """

    device = "cpu"

    def __init__(self, config: ModelConfig, tensors: Mapping[str, np.ndarray], backend: Backend = CPU):
        check_generates(config)
        library = load()
        if library is None:
            raise RuntimeError("the native engine was not built: reinstall the package where a C++ compiler is found")
        if not self.suits(config):
            raise ValueError(
                f"the native engine needs heads of at most {_MOST_HEAD_SIZE} channels and a vocabulary of music; got "
                f"{config.head_size} and {config.vocabulary_size} tokens"
            )
        weights = engine_tensors(config, tensors)
        self.config, self.backend = config, backend
        kernel = "wishes.kernel"
        self._wish_kernel_RxD = Weights(config, dict(tensors)).float32(kernel) if config.wish_rows else None
        self._library = library
        self._model = _open(library, config, weights)
        weakref.finalize(self, library.close, self._model)
        self.path: str = library.path(self._model).decode()
        self._cached = np.dtype(np.float16 if library.cached_bytes(self._model) == 2 else np.float32)
        self._weight_bytes = _bytes(weights)
        self._layer_bytes = _bytes({name: pair for name, pair in weights.items() if name.startswith("blocks.0.")})

    @staticmethod
    def suits(config: ModelConfig) -> bool:
        """Whether the engine supports a model: its sizes, and event tokens."""
        return config.head_size <= _MOST_HEAD_SIZE and config.is_music

    def start(
        self,
        prompts: Sequence[Integer[np.ndarray, " _P"]],
        *,
        latents: int,
        seeds: Sequence[int],
        limit_steps: int,
        layers: int | None = None,
        tolerance: float = 0.0,
        mode: Literal["sliding", "exact"] = "sliding",
        wishes: Sequence[Wishes] | None = None,
    ) -> NativeState:
        """State after all but the last token of each prompt; see `Decoder.start`.

        Raises:
            WishError: the model cannot take the wishes.
            ValueError: not as many seeds or wishes as prompts, a prompt without tokens or with others than the
                vocabulary's, more latents than the context, no exit after so many layers, or re-anchored windows.
        """
        if mode != "sliding":
            raise ValueError(
                f'the native engine decodes with sliding windows only, got mode "{mode}"; use the JAX step'
            )
        if len(prompts) != len(seeds):
            raise ValueError(f"expected a seed for each prompt, got {len(prompts)} prompts and {len(seeds)} seeds")
        if not 1 <= latents <= self.config.reach:
            raise ValueError(f"latents must be in 1..{self.config.reach}, the context; got {latents}")
        checked = [self._checked_tokens(prompt, 1) for prompt in prompts]
        wishes_BxD = wish_vectors(self.config.wishes, self._wish_kernel_RxD, row_wishes(wishes, len(prompts)))
        different, index = distinct(checked, wishes_BxD)
        state = NativeState.before_the_first_token(
            self.config,
            len(different),
            latents=max(2, latents),
            layers=depth_of(self.config, layers),
            tolerance=tolerance,
            limit_steps=limit_steps,
            cached=self._cached,
        )
        state.wishes_BxD[:] = wishes_BxD[different]
        for number, row in enumerate(different):
            prompt = checked[row]
            self._library.prefill(self._model, self._c_state(state), number, prompt.ctypes.data, len(prompt))
        state.prompt_end_B[:] = state.time_B
        if len(different) < len(checked):
            state = state.rows(index)
        return state.with_seeds(seeds)

    def decode(
        self, state: NativeState, options: Mapping[str, Any], *, length: int
    ) -> tuple[NativeState, Int32[np.ndarray, "B length"]]:
        """Sample up to `length` tokens per row; see `Decoder.decode`. Rows that are done wait."""
        return self.decode_scored(state, options, length=length)[:2]

    def decode_scored(
        self, state: NativeState, options: Mapping[str, Any], *, length: int
    ) -> tuple[NativeState, Int32[np.ndarray, "B length"], Float32[np.ndarray, "B length"]]:
        """Like `decode`, with the NLL of each token in nats under the model itself, before any processor."""
        B = len(state.age_B)
        tokens_BxT, nats_BxT = np.empty((B, length), np.int32), np.empty((B, length), np.float32)
        arrays = _option_arrays(options, B)
        outputs = tokens_BxT.ctypes.data, nats_BxT.ctypes.data
        self._library.decode(self._model, self._c_state(state), _c_options(arrays), length, *outputs)
        return state, tokens_BxT, nats_BxT

    def teacher_force(
        self, state: NativeState, tokens_BxT: Integer[np.ndarray, "B T"]
    ) -> tuple[NativeState, Float32[np.ndarray, "B T V"]]:
        """Advance with the given tokens; see `Decoder.teacher_force`. Logits of rows that have ended are zero."""
        tokens = self._checked_tokens(tokens_BxT, 2)
        if len(tokens) != len(state.age_B):
            raise ValueError(f"expected tokens for {len(state.age_B)} rows, got {len(tokens)}")
        logits = np.zeros((*tokens.shape, self.config.vocabulary_size), np.float32)
        self._library.teacher_force(
            self._model, self._c_state(state), tokens.ctypes.data, tokens.shape[1], logits.ctypes.data
        )
        return state, logits

    def processed(
        self, state: NativeState, options: Mapping[str, Any], logits_BxV: Float32[np.ndarray, "B V"]
    ) -> Float32[np.ndarray, "B V"]:
        """Logits after the logit processors; see `processors.PROCESSORS`."""
        logits = np.array(logits_BxV, np.float32)
        if logits.shape != (len(state.age_B), self.config.vocabulary_size):
            raise ValueError(f"expected logits for {len(state.age_B)} rows, got {logits.shape}")
        arrays = _option_arrays(options, len(logits))
        self._library.process(self._model, self._c_state(state), _c_options(arrays), logits.ctypes.data)
        return logits

    def bare_matrices_s(self, rows: int = 1, layers: int | None = None) -> float:
        """Seconds for all int8 products of one step and nothing else: the best of some passes on this machine, now."""
        if not 1 <= rows <= 64:
            raise ValueError(f"rows must be in 1..64, got {rows}")
        return self._library.bare_products_s(self._model, rows, depth_of(self.config, layers), _BARE_PASSES)

    def step_bytes(self, state: NativeState) -> int:
        """Bytes that a step may read: the weights, and the caches of a state. It reads the visible part of caches."""
        caches = (state.cross_k, state.cross_v, state.self_k, state.self_v, state.match_keys_BxWxC)
        skipped = (self.config.layers - state.layers) * self._layer_bytes
        return self._weight_bytes - skipped + sum(cache.nbytes for cache in caches)

    def batch_rows(self, latents: int) -> int:
        """Number of rows to decode at once."""
        del latents
        assert self.backend.batch_rows is not None
        return self.backend.batch_rows

    def free_programs(self) -> None:
        """Nothing to free: there are no compiled programs."""

    def _checked_tokens(self, tokens: Any, axes: int) -> Int32[np.ndarray, "..."]:
        tokens = np.asarray(tokens)
        if tokens.ndim != axes or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"expected whole numbers along {axes} axes, at least one; got {tokens.dtype} {tokens.shape}"
            )
        vocabulary.check_tokens(tokens, self.config.vocabulary_size)
        return np.ascontiguousarray(tokens, np.int32)

    def _c_state(self, state: NativeState) -> CState:
        """The state for a call.

        Raises:
            ValueError: it is not a state of this decoder.
        """
        latents = state.latents_B.max(initial=1)
        wanted = NativeState.before_the_first_token(
            self.config,
            0,
            latents=int(state.self_v.shape[3]),
            layers=state.layers,
            tolerance=0.0,
            limit_steps=0,
            cached=self._cached,
        )
        for name, leaf, like in zip(NativeState._fields, state, wanted, strict=True):
            shape = (len(state.age_B), *like.shape[1:])
            if leaf.shape != shape or leaf.dtype != like.dtype or not leaf.flags.c_contiguous:
                raise ValueError(f"not a state of this decoder: {name} is {leaf.dtype} {leaf.shape}, expected {shape}")
        if latents > state.self_v.shape[3]:
            raise ValueError(f"the caches hold {state.self_v.shape[3]} latents, got {latents}")
        sizes = (len(state.age_B), self.config.notes_kept, state.self_v.shape[3], state.cross_v.shape[2], state.layers)
        return CState(*sizes, *(leaf.ctypes.data for leaf in state))


def set_threads(count: int) -> None:
    """Set how many threads the engine uses, at least 1; by default as many as there are usable cores, at most 16.

    Results do not depend on it.
    """
    library = load()
    if library is not None:
        library.set_threads(max(1, count))


def _open(library: Library, config: ModelConfig, weights: Mapping[str, Tensor]) -> int:
    pairs = config.rotary_size // 2
    exponent_R = np.linspace(0.0, 1.0, pairs, dtype=np.float32)
    rates_R = np.ascontiguousarray(np.float32(config.rotary_wavelength) ** -exponent_R)
    floats = ctypes.POINTER(ctypes.c_float)
    sizes = {name: getattr(config, name) for name in CConfig.SIZES} | {"context": config.reach}
    exits = np.array(config.exits, np.int32)
    c_config = CConfig(
        **sizes,
        exit_count=len(exits),
        rotary_rates=rates_R.ctypes.data_as(floats),
        exits=exits.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
    )
    tensors = (CTensor * len(weights))()
    for tensor, (name, (numbers, values)) in zip(tensors, weights.items(), strict=True):
        tensor.name = name.encode()
        tensor.values = values.ctypes.data_as(floats)
        tensor.inputs, tensor.outputs = (1, len(values)) if numbers is None else numbers.shape
        if numbers is not None:
            tensor.numbers = numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
    return library.open(c_config, tensors, len(weights))  # copies what it needs


def _bytes(weights: Mapping[str, Tensor]) -> int:
    return sum(each.nbytes for pair in weights.values() for each in pair if each is not None)


def _option_arrays(options: Mapping[str, Any], rows: int) -> dict[str, np.ndarray]:
    """Options, scalars or one entry per row, as one entry per row; the guidance only if rows are pairs."""
    types = [*COptions.TYPES, *([("guidance", np.float32)] if "guidance" in options else [])]
    return {
        name: np.ascontiguousarray(np.broadcast_to(np.asarray(options[name], dtype), (rows,))) for name, dtype in types
    }


def _c_options(arrays: Mapping[str, np.ndarray]) -> COptions:
    """Pointers to the arrays, which must outlive the call."""
    return COptions(**{name: array.ctypes.data for name, array in arrays.items()})
