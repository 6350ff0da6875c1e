"""Cached decoding, one token at a time, with a chosen number of latents.

Keys and values of the cross-attention depend only on the token, its position, its immediate predecessors and its
features. So they are computed once and kept in a rolling cache of the last M. The latents' caches roll too (see
`windows`); when a window restarts, nothing is moved, and its older entries are masked.

Rows are sharded over all devices, each of which runs its own loop. A CPU can be split into several devices
(`backend.cpu_devices`): a step with few rows keeps only two cores busy, or hardly more than one with JAX 0.10.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int, Integer

from music_ar.decoding import backend as backends
from music_ar.decoding.backend import Backend
from music_ar.decoding.guidance import guided_logits, with_partners
from music_ar.decoding.int8_layers import Int8Forms
from music_ar.decoding.interface import Options, check_generates, depth_of, distinct, leaves_early, row_wishes
from music_ar.decoding.layers import DecodingModel, Forms, HashedGraph, PlainForms, TransposedForms
from music_ar.decoding.prefill import Prompts, prefill
from music_ar.decoding.processors import draw
from music_ar.decoding.state import BY_ROWS, Caches, DecodeState, EarlyExit, on_each_device
from music_ar.decoding.step import advance, step
from music_ar.decoding.stored_programs import StoredPrograms, cache_folder
from music_ar.decoding.windows import WINDOWS, WindowMode, cache_size
from music_ar.features.wish_options import Wishes
from music_ar.features.wishes import wish_vectors
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.tokens import vocabulary

_MAX_ROWS = 256
# Of an accelerator's free memory; the rest is for the prefill and XLA's temporary buffers.
_MEMORY_SHARE = 0.5


class Decoder:
    """`AnyDecoder` in JAX.

    Args:
        model: the model; it is not changed.
        backend: how to decode. Default: the fastest known for this machine that suits the model. Int8 matrices are
            exact for a pretrained model.

    Raises:
        GenerationError: the model does not generate.
        ValueError: the backend's attention kernel does not support the model's sizes, or the model has a vocabulary of
            its own, for which there is `music_ar.decoding.any_sequence`.
    """

    def __init__(self, model: PerceiverAR, backend: Backend | None = None):
        check_generates(model.config)
        if not model.config.is_music:
            raise ValueError("a decoder writes music; draw sequences of another vocabulary with `draw_sequences`")
        chosen = backends.select() if backend is None else backend
        self.backend = chosen.suited_to(model.config)
        if backend is not None and self.backend != backend:
            raise ValueError(
                "the attention kernel needs a head_size of 16, 32 or 64, and a context that is a multiple of 16; "
                f"got {model.config.head_size} and {model.config.context}"
            )
        self.config, self.dtype = model.config, model.dtype
        self.device, self.path = jax.local_devices()[0].device_kind, "jax"
        self.graph, self.params = _prepared(model, self.backend)
        self._wish_kernel_RxD = np.array(model.wishes.kernel[...]) if model.config.wish_rows else None
        self._programs = StoredPrograms((self.config, self.backend, str(self.dtype)), cache_folder())
        self._params_on: dict[Mesh | None, nnx.State] = {None: self.params}

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
    ) -> DecodeState:
        """See `AnyDecoder.start`."""
        if len(prompts) != len(seeds):
            raise ValueError(f"expected a seed for each prompt, got {len(prompts)} prompts and {len(seeds)} seeds")
        for prompt in prompts:
            vocabulary.check_tokens(prompt, self.config.vocabulary_size)
        wishes_BxD = wish_vectors(self.config.wishes, self._wish_kernel_RxD, row_wishes(wishes, len(prompts)))
        different, index = distinct(prompts, wishes_BxD)
        first, depth = [prompts[row] for row in different], depth_of(self.config, layers)
        state = self._prefilled(first, wishes_BxD[different], latents, limit_steps, WINDOWS[mode], depth)
        if leaves_early(self.config, layers, tolerance):
            B = len(different)
            state = state._replace(early=EarlyExit(jnp.full(B, tolerance, jnp.float32), jnp.zeros(B, jnp.int32)))
        if len(different) < len(prompts):
            state = state.rows(index)
        return state.with_seeds(seeds)

    def _prefilled(
        self,
        prompts: list[Integer[np.ndarray, " _P"]],
        wishes_BxD: Float32[np.ndarray, "B D"],
        latents: int,
        limit_steps: int,
        windows: int,
        depth: int,
    ) -> DecodeState:
        B, L, R = len(prompts), self.config.conv_width, self._cache_size(latents)
        # Everything that a latent still in a window can see, and the convolution taps before that.
        ready = Prompts.of(prompts, self.config, self.config.reach + R + L)
        now = jax.tree.map(lambda leaf: jnp.asarray(leaf[:, -1]), ready.conditioning_BxP.keyboard)
        state = DecodeState(
            clock_B=jnp.full(B, ready.length, jnp.int32),
            birth_B=jnp.asarray(ready.birth_B),
            latents_B=jnp.full(B, max(2, latents), jnp.int32),
            recent_BxL=jnp.asarray(ready.tokens_BxPL[:, ready.length :]),
            keyboard=now,
            caches=self._empty_caches(B, R, windows, depth),
            prompt_end_B=now.time + 0,  # not the same buffer, since both are donated
            limit_B=jnp.full(B, limit_steps, jnp.int32),
            rng_B=jax.random.split(jax.random.key(0), B),
            ended_B=jnp.zeros(B, bool),
            wishes_BxD=jnp.asarray(wishes_BxD) if self.config.wish_rows else None,
            **jax.tree.map(jnp.asarray, ready.state),
        )
        if ready.length == 0:
            return state
        before_BxP = jax.tree.map(lambda leaf: jnp.asarray(leaf[:, :-1]), ready.conditioning_BxP)
        tokens_BxP = jnp.asarray(ready.tokens_BxPL[:, L - 1 : -1])
        arguments = (self.params, state, tokens_BxP, before_BxP)
        return self._programs.call("prefill", prefill, (self.graph, self.backend), arguments, like=state)

    def _cache_size(self, latents: int) -> int:
        if self.backend.attention == "plain":
            return cache_size(latents)
        from music_ar.decoding.pallas_kernel import LEAST_BLOCK

        return max(cache_size(latents), LEAST_BLOCK)

    def _empty_caches(self, B: int, R: int, windows: int, depth: int) -> Caches:
        config, dtype = self.config, self.dtype
        G, K, M = config.kv_heads, config.head_size, config.reach
        key_dtype = self.backend.key_dtype or dtype

        def keys(rows: int, size: int) -> Array:
            shape = (rows, K, size) if self.backend.attention == "plain" else (rows, size, K)
            return jnp.zeros(shape, key_dtype)

        return Caches(
            cross_k=keys(B * G, M),
            cross_v=jnp.zeros((B * G, M, K), dtype),
            self_k=tuple(keys(B * windows * G, R) for _ in range(depth)),
            self_v=tuple(jnp.zeros((B * windows * G, R, K), dtype) for _ in range(depth)),
        )

    def decode(
        self, state: DecodeState, options: Options, *, length: int
    ) -> tuple[DecodeState, Int[Array, "B length"]]:
        """See `AnyDecoder.decode`. The state is donated, `length` is a compile-time constant; a device stops alone."""
        return self.decode_scored(state, options, length=length)[:2]

    def decode_scored(
        self, state: DecodeState, options: Options, *, length: int
    ) -> tuple[DecodeState, Int[Array, "B length"], Float[Array, "B length"]]:
        """See `AnyDecoder.decode_scored`."""
        state, mesh = self._sharded(state, pairs="guidance" in options)
        micro_batches = self.backend.micro_batches(state.clock_B.shape[0] // (1 if mesh is None else mesh.size))
        decode = _compiled_decode(self.backend.options(micro_batches))
        program = (self.graph, self.backend, length, mesh, micro_batches)
        name, arguments = f"decode-{length}-{micro_batches}", (self._params_on[mesh], state, options)
        return self._programs.call(name, decode, (program,), arguments, like=(state, 0, 0))

    def teacher_force(
        self, state: DecodeState, tokens_BxT: Int[np.ndarray, "B T"]
    ) -> tuple[DecodeState, Float[Array, "B T V"]]:
        """See `AnyDecoder.teacher_force`. The state is donated."""
        state, mesh = self._sharded(state)
        return _teacher_force((self.graph, self.backend, mesh), self._params_on[mesh], state, jnp.asarray(tokens_BxT))

    def batch_rows(self, latents: int) -> int:
        """See `AnyDecoder.batch_rows`: the backend's number, or what fits in half of the free memory, at most 256."""
        if self.backend.batch_rows is not None:
            return self.backend.batch_rows
        start = np.array([vocabulary.START], np.int32)
        state = jax.eval_shape(lambda: self.start([start], latents=latents, seeds=[0], limit_steps=0))
        kept = (state.caches, state.notes, state.match)
        row_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 8 * 2**30)
        used = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        rows = int((memory - used) * _MEMORY_SHARE / row_bytes)
        return max(1, min(_MAX_ROWS, 1 << (max(rows, 1).bit_length() - 1)))

    def step_bytes(self, state: DecodeState) -> int:
        """See `AnyDecoder.step_bytes`. Counts the whole embedding tables (3 %), of which a step reads rows."""
        skipped = [self.params["blocks"][layer] for layer in range(state.layers, self.config.layers)]
        read = (self.params, state.caches, state.notes, state.match)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(read)) - sum(
            leaf.nbytes for leaf in jax.tree.leaves(skipped)
        )

    def bare_matrices_s(self, rows: int, layers: int | None = None) -> None:
        """Not measured: XLA has no products without the rest."""
        del rows, layers

    def free_programs(self) -> None:
        """See `AnyDecoder.free_programs`."""
        self._programs.clear()
        jax.clear_caches()

    def _sharded(self, state: DecodeState, *, pairs: bool = False) -> tuple[DecodeState, Mesh | None]:
        """Shard the state over as many devices as can share its rows, or pairs of rows, evenly.

        Returns:
            The state and the mesh of the devices; None for one.
        """
        devices = jax.local_devices()
        count = math.gcd(state.clock_B.shape[0] // (1 + pairs), len(devices))
        if count == 1:
            return state, None
        mesh = Mesh(np.array(devices[:count]), ("rows",))
        if mesh not in self._params_on:
            self._params_on[mesh] = jax.device_put(self.params, NamedSharding(mesh, PartitionSpec()))
        return jax.device_put(state, NamedSharding(mesh, BY_ROWS)), mesh


def _prepared(model: PerceiverAR, backend: Backend) -> tuple[HashedGraph, nnx.State]:
    """Structure and parameters of the model in the backend's forms.

    They are computed by one program: on a GPU, compiling each operation by itself took 3 s of a start.
    """
    graph, params = nnx.split(model)
    decoding_graph: list[nnx.GraphDef[DecodingModel]] = []

    def prepare(params: nnx.State) -> nnx.State:
        decoding_model = DecodingModel(nnx.merge(graph, params), _forms(backend))
        structure, decoding_params = nnx.split(decoding_model)
        decoding_graph.append(structure)
        # Matrix products run in this type anyway; in a loop, XLA would convert the matrices again for each token.
        return jax.tree.map(lambda leaf: _matrix_as(leaf, model.dtype), decoding_params)

    # Matrices are rounded to int8 in NumPy.
    prepared = prepare(params) if backend.linear == "int8" else jax.jit(prepare)(params)
    return HashedGraph(decoding_graph[0]), prepared


def _forms(backend: Backend) -> Forms:
    if backend.linear == "int8":
        return Int8Forms(backend.int8_layout)
    return TransposedForms() if backend.linear == "transposed" else PlainForms()


def _matrix_as(leaf: Array, dtype: jnp.dtype) -> Array:
    return leaf.astype(dtype) if leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


_Program = tuple[HashedGraph, Backend, int, Mesh | None, int]


@functools.cache
def _compiled_decode(compiler_options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """The decoding loop, compiled with some XLA options."""
    return jax.jit(_decode, static_argnums=0, donate_argnums=2, compiler_options=dict(compiler_options) or None)


def _decode(
    program: _Program, params: nnx.State, state: DecodeState, options: Options
) -> tuple[DecodeState, Array, Array]:
    *_, mesh, _ = program
    loop = functools.partial(_decode_rows, program)
    if mesh is None:
        return loop(params, state, options)
    by_row = jax.tree.map(lambda option: BY_ROWS if option.ndim else PartitionSpec(), options)
    return on_each_device(loop, mesh, (PartitionSpec(), BY_ROWS, by_row))(params, state, options)


def _decode_rows(
    program: _Program, params: nnx.State, state: DecodeState, options: Options
) -> tuple[DecodeState, Array, Array]:
    graph, backend, length, _, micro_batches = program
    model = nnx.merge(graph.graph, params)
    B = state.ended_B.shape[0]

    def unfinished(carry: tuple[Array, DecodeState, Array, Array]) -> Array:
        index, state, *_ = carry
        return (index < length) & ~state.done_B.all()

    def one_token(carry: tuple[Array, DecodeState, Array, Array]) -> tuple[Array, DecodeState, Array, Array]:
        index, before, tokens, nats = carry
        logits_BxV, state = step(model, before, backend, micro_batches, pairs="guidance" in options)
        rng_B = jax.vmap(jax.random.fold_in)(state.rng_B, state.age_B)
        drawn_B = with_partners(draw(rng_B, guided_logits(logits_BxV, options), state, options), options)
        drawn_logit_B = jnp.take_along_axis(logits_BxV, drawn_B[:, None], axis=1)[:, 0]
        nats_B = jax.nn.logsumexp(logits_BxV, axis=1) - drawn_logit_B
        state = advance(state, drawn_B)
        token_B = state.recent_BxL[:, -1]
        if B > 1:  # a single row that is done ends the loop
            token_B, nats_B = jnp.where(before.done_B, vocabulary.PAD, token_B), jnp.where(before.done_B, 0, nats_B)
            state = _waiting(before, state)
        return index + 1, state, tokens.at[:, index].set(token_B), nats.at[:, index].set(nats_B)

    tokens, nats = jnp.full((B, length), vocabulary.PAD, jnp.int32), jnp.zeros((B, length))
    _, state, tokens, nats = jax.lax.while_loop(unfinished, one_token, (jnp.int32(0), state, tokens, nats))
    return state, tokens, nats


def _waiting(before: DecodeState, after: DecodeState) -> DecodeState:
    """The state after a step, with rows that were done as they were before.

    Their caches may have the keys and values of the pending token, which the next step writes again to the same place.
    """

    def keep(old: Array, new: Array) -> Array:
        return jnp.where(before.done_B.reshape(-1, *[1] * (new.ndim - 1)), old, new)

    return jax.tree.map(keep, before._replace(caches=None), after._replace(caches=None))._replace(caches=after.caches)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _teacher_force(
    program: tuple[HashedGraph, Backend, Mesh | None],
    params: nnx.State,
    state: DecodeState,
    tokens_BxT: Int[Array, "B T"],
) -> tuple[DecodeState, Array]:
    graph, backend, mesh = program
    loop = functools.partial(_teacher_force_rows, graph, backend)
    if mesh is None:
        return loop(params, state, tokens_BxT)
    return on_each_device(loop, mesh, (PartitionSpec(), BY_ROWS, BY_ROWS))(params, state, tokens_BxT)


def _teacher_force_rows(
    graph: HashedGraph, backend: Backend, params: nnx.State, state: DecodeState, tokens_BxT: Int[Array, "B T"]
) -> tuple[DecodeState, Array]:
    model = nnx.merge(graph.graph, params)

    def one_token(state: DecodeState, token_B: Array) -> tuple[DecodeState, Array]:
        logits_BxV, state = step(model, state, backend)
        return advance(state, token_B), logits_BxV

    state, logits_TxBxV = jax.lax.scan(one_token, state, tokens_BxT.T)
    return state, logits_TxBxV.swapaxes(0, 1)
