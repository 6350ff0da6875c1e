"""Cached decoding, one token at a time, under a latent budget.

The latent budget n is how many latents may stand behind a prediction. There are two ways to go on once there are n:

"sliding": a window that forgets its oldest latent. Training never did that (it computes the latent at time t in a
window that begins at a fixed time s), but on real music it predicts as well or better, because it always has n latents
behind it, and for half the work. It is the default.

"exact": what training computes, without a stall. Two windows run side by side, staggered by n / 2. Each begins anew
every n tokens, so one of them always holds n / 2 to n latents, and that one makes the prediction:

    time      0      n/2      n      3n/2     2n
    window 0  [---------------)[---------------)
    window 1         [---------------)[-----------
    predicts  0       0       1       0       1

`evaluation.score_decoding` measures what each costs in likelihood; the figures are in docs/decoding.md.

Rows are dealt to all devices, each of which goes through its own loop. A CPU can be several, if JAX is told so
(`JAX_NUM_CPU_DEVICES`): a step of few rows keeps two cores busy, with JAX 0.10 hardly more than one.

The keys and values of the cross-attention depend on nothing but the token, its position, its near predecessors and what
the model is told there: they are computed once and kept in a ring of the last M. A window is a ring too; when it begins
anew nothing is moved, its older entries are masked.

Dimension key, beside that of `model.py`: P prompt tokens, R latents that a window's ring can hold, W windows,
L conv taps, Q query heads that share a key head, E rows of a cache (batch, window and key head as one axis).
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
from jaxtyping import Array, Float, Int, Integer

from music_ar.decoding import history_bias, pallas_attention
from music_ar.decoding.int8_layers import YNNPACK, with_int8_weights
from music_ar.decoding.layers import TransposedLinear, join_norms, replace_linears
from music_ar.decoding.prefill import _prefill
from music_ar.decoding.sampling import Filters, sample
from music_ar.decoding.state import _BY_ROWS, Caches, DecodeState, _on_each
from music_ar.decoding.step import WindowMode, _Graph, drawable, step, take
from music_ar.features import keyboard, retrieval
from music_ar.features.keyboard import Keyboard
from music_ar.features.retrieval import Memory, Recalled
from music_ar.model.perceiver_ar import PerceiverAR, Told
from music_ar.tokens import grammar, vocabulary


class Decoder:
    """A model made ready to decode.

    Args:
        model: the model; it is not changed.
        int8: whether to hold matrices as int8, which is exact for a released model, and keys as bfloat16 where that is
            faster. Default: on a CPU, where a token waits for what it reads to come from memory.
        fused: whether the attention of a step is one kernel (`decode_kernel`). Default: where that is known to be
            faster.

    Raises:
        ValueError: the kernel does not suit the model's sizes.
    """

    def __init__(self, model: PerceiverAR, *, int8: bool | None = None, fused: bool | None = None):
        self.config, self.dtype = model.config, model.dtype
        self.fused = pallas_attention.pays(model.config, model.dtype) if fused is None else fused
        if self.fused and not pallas_attention.suits(model.config):
            raise ValueError(
                "the kernel needs a head_size that is a power of two and at least 16, and a context that is a multiple "
                f"of 16; got {model.config.head_size} and {model.config.context}"
            )
        model = nnx.clone(model)
        for block in model.blocks:
            block.join()
        int8 = jax.default_backend() == "cpu" if int8 is None else int8
        self._key_dtype = self.dtype
        if int8 and YNNPACK and jax.default_backend() == "cpu":
            self._key_dtype = jnp.dtype(jnp.bfloat16)
        if int8:
            model = with_int8_weights(model)
        elif jax.default_backend() == "gpu":
            join_norms(model)
            model = replace_linears(model, TransposedLinear)
        graph, params = nnx.split(model)
        self.graph = _Graph(graph, self.fused)
        # Matrices are computed with in this type anyway; in a loop XLA would convert them anew for each token.
        self.params = jax.tree.map(lambda leaf: _matrix_as(leaf, self.dtype), params)
        self._params_on: dict[Mesh | None, nnx.State] = {None: self.params}

    def start(
        self,
        prompts: Sequence[Integer[np.ndarray, " _P"]],
        *,
        latents: int,
        seeds: Sequence[int],
        limit_steps: int,
        mode: WindowMode = "sliding",
    ) -> DecodeState:
        """A state that holds all of each prompt but its last token, which is pending.

        Args:
            prompts: one token array a row, each beginning with `vocabulary.START`. Equal ones are prefilled once.
            latents: the budget n; at least 2, and an odd one acts as n - 1 in exact mode.
            seeds: one a row; a row's tokens depend on its own prompt, seed and options alone.
            limit_steps: a row is done when this much music (in steps of 10 ms) follows its prompt.
            mode: how the windows of latents go on once they are full.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"expected a seed for each prompt, got {len(prompts)} prompts and {len(seeds)} seeds")
        numbers: dict[bytes, int] = {}
        index = [numbers.setdefault(prompt.tobytes(), len(numbers)) for prompt in prompts]
        different = [prompts[index.index(number)] for number in range(len(numbers))]
        state = self._prefilled(different, latents, limit_steps, 1 if mode == "sliding" else 2)
        if index != list(range(len(numbers))):
            state = state.rows(index)
        return state._replace(keys_B=jnp.stack([jax.random.key(seed) for seed in seeds]))

    def _prefilled(
        self, prompts: list[Integer[np.ndarray, " _P"]], latents: int, limit_steps: int, windows: int
    ) -> DecodeState:
        config = self.config
        B, R, L = len(prompts), ring_size(latents), config.conv_width
        if self.fused:
            R = max(R, pallas_attention.LEAST_RING)
        longest = max(len(prompt) for prompt in prompts) - 1
        # What a latent still in a window could see, and the taps before that.
        most = config.context + R + L
        P = 0 if longest == 0 else min(most, max(16, 1 << (longest - 1).bit_length()))
        tokens_BxP = np.full((B, P + L), vocabulary.PAD, np.int32)
        for row, prompt in zip(tokens_BxP, prompts, strict=True):
            kept = prompt[-(P + L) :]
            row[P + L - len(kept) :] = kept
        grammars = [grammar.grammar_after(prompt) for prompt in prompts]
        told_BxP, memory = _stack([self._told(prompt, P + 1) for prompt in prompts])
        state = DecodeState(
            clock_B=jnp.full(B, P, jnp.int32),
            birth_B=jnp.array([P + 1 - len(prompt) for prompt in prompts], jnp.int32),
            budget_B=jnp.full(B, max(2, latents), jnp.int32),
            recent_BxL=jnp.asarray(tokens_BxP[:, P:]),
            keyboard=jax.tree.map(lambda leaf: jnp.asarray(leaf[:, -1]), told_BxP.keyboard),
            memory=jax.tree.map(jnp.asarray, memory),
            heard=jax.tree.map(jnp.asarray, _stack([history_bias.after(prompt) for prompt in prompts])),
            caches=self._empty_caches(B, R, windows),
            grammar=jax.tree.map(jnp.asarray, _stack(grammars)),
            steps_B=jnp.zeros(B, jnp.int32),
            limit_B=jnp.full(B, limit_steps, jnp.int32),
            keys_B=jax.random.split(jax.random.key(0), B),
            ended_B=jnp.zeros(B, bool),
        )
        if P == 0:
            return state
        before_BxP = jax.tree.map(lambda leaf: jnp.asarray(leaf[:, :-1]), told_BxP)
        return _prefill(self.graph, self.params, state, jnp.asarray(tokens_BxP[:, L - 1 : -1]), before_BxP)

    def _told(self, prompt: Integer[np.ndarray, " _P"], size: int) -> tuple[Told, Memory | None]:
        """What the model is told after each of the last `size` tokens of a prompt, and the memory after it.

        Before the first token it is told nothing.
        """
        config = self.config
        kept = min(size, len(prompt))
        whole = keyboard.after_each(prompt, config.onsets)
        padding = keyboard.untouched((size - kept,), config.onsets)
        keyboards = Keyboard(*(np.concatenate([before, of[-kept:]]) for before, of in zip(padding, whole, strict=True)))
        if not config.recall:
            return Told(keyboards, None), None
        found, memory = retrieval.prefill(prompt, config.recall, last=kept)
        nothing = retrieval.nothing((size - kept,))
        recalled = Recalled(*(np.concatenate(parts) for parts in zip(nothing, found, strict=True)))
        return Told(keyboards, recalled), memory

    def _empty_caches(self, B: int, R: int, windows: int) -> Caches:
        config, dtype = self.config, self.dtype
        G, K, M = config.kv_heads, config.head_size, config.context

        def keys(rows: int, size: int) -> Array:
            return jnp.zeros((rows, size, K) if self.fused else (rows, K, size), self._key_dtype)

        return Caches(
            cross_k=keys(B * G, M),
            cross_v=jnp.zeros((B * G, M, K), dtype),
            self_k=tuple(keys(B * windows * G, R) for _ in range(config.layers)),
            self_v=tuple(jnp.zeros((B * windows * G, R, K), dtype) for _ in range(config.layers)),
        )

    def decode(
        self, state: DecodeState, filters: Filters, *, length: int
    ) -> tuple[DecodeState, Int[Array, "B length"]]:
        """Samples up to `length` tokens a row; a device stops sooner once all of its rows are done.

        Args:
            state: where to go on from; donated.
            filters: how to sample; all rows alike, or arrays with one entry a row.
            length: tokens a row; it is compiled in.

        Returns:
            The state, whose pending tokens are the last sampled, and the tokens, `vocabulary.PAD` after a row has ended
            or all on its device are done.
        """
        return self.decode_scored(state, filters, length=length)[:2]

    def decode_scored(
        self, state: DecodeState, filters: Filters, *, length: int
    ) -> tuple[DecodeState, Int[Array, "B length"], Float[Array, "B length"]]:
        """Like `decode`, and says how surprising each token was.

        Returns:
            The state, the tokens, and for each token -log p in nats under the model itself: before grammar,
            temperature and filters, as `evaluation` scores.
        """
        state, mesh = self._dealt(state)
        parts = self._parts(state, mesh)
        decode = _decode_on_gpu(parts) if jax.default_backend() == "gpu" else _decode
        return decode(self.graph, self._params_on[mesh], state, filters, length, mesh, parts)

    def force(
        self, state: DecodeState, tokens_BxT: Int[np.ndarray, "B T"]
    ) -> tuple[DecodeState, Float[Array, "B T V"]]:
        """Takes given tokens in place of sampled ones, `vocabulary.PAD` after a row's end.

        Args:
            state: where to go on from; donated.
            tokens_BxT: the tokens.

        Returns:
            The state, and the logits that each token was predicted with.
        """
        state, mesh = self._dealt(state)
        parts = self._parts(state, mesh)
        return _force(self.graph, self._params_on[mesh], state, jnp.asarray(tokens_BxT), mesh, parts)

    def _parts(self, state: DecodeState, mesh: Mesh | None) -> int:
        """In how many parts a step takes the rows of a device."""
        return _part_count(state.clock_B.shape[0] // (1 if mesh is None else mesh.size)) if self.fused else 1

    def _dealt(self, state: DecodeState) -> tuple[DecodeState, Mesh | None]:
        """The state with its rows on as many devices as they can be evenly dealt to, and these; None is the first."""
        devices = jax.local_devices()
        count = math.gcd(state.clock_B.shape[0], len(devices))
        if count == 1:
            return state, None
        mesh = Mesh(np.array(devices[:count]), ("rows",))
        if mesh not in self._params_on:
            self._params_on[mesh] = jax.device_put(self.params, NamedSharding(mesh, PartitionSpec()))
        return jax.device_put(state, NamedSharding(mesh, _BY_ROWS)), mesh


def _stack(rows: Sequence[Any]) -> Any:
    """Pytrees of NumPy arrays as one, with a first axis for them."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def _matrix_as(leaf: Array, dtype: jnp.dtype) -> Array:
    return leaf.astype(dtype) if leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def ring_size(latents: int) -> int:
    """R for a latent budget: the next power of two, so that most budgets share a compilation."""
    return max(8, 1 << (latents - 1).bit_length())


def _decode_loop(
    graph: _Graph,
    params: nnx.State,
    state: DecodeState,
    filters: Filters,
    length: int,
    mesh: Mesh | None,
    parts: int = 1,
) -> tuple[DecodeState, Array, Array]:
    loop = functools.partial(_decode_rows, graph, length, parts)
    if mesh is not None:
        by_row = jax.tree.map(lambda option: _BY_ROWS if option.ndim else PartitionSpec(), filters)
        return _on_each(loop, mesh, (PartitionSpec(), _BY_ROWS, by_row))(params, state, filters)
    return loop(params, state, filters)


_STATIC = (0, 4, 5, 6)
_decode = jax.jit(_decode_loop, static_argnums=_STATIC, donate_argnums=2)


@functools.cache
def _decode_on_gpu(parts: int) -> Callable[..., tuple[DecodeState, Array, Array]]:
    """`_decode` with operations side by side where none needs what another makes, which XLA tells by their buffers.

    Parts of the rows stay apart only if XLA does not put operations of the same kind together again.
    """
    options: dict[str, Any] = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
    if parts > 1:
        options["xla_gpu_dot_merger_threshold_mb"] = 0
        options["xla_disable_hlo_passes"] = "gpu_horizontal_loop_fusion,gpu_horizontal_input_fusion"
    return jax.jit(_decode_loop, static_argnums=_STATIC, donate_argnums=2, compiler_options=options)


def _part_count(rows: int) -> int:
    """In how many parts a step with the kernel takes the rows of a device.

    Of many rows, one part's attention waits for memory while another's small operations wait for each other. It was
    measured with 256 (docs/decoding.md).
    """
    return 2 if rows >= 256 and rows % 2 == 0 else 1


def _decode_rows(
    graph: _Graph, length: int, parts: int, params: nnx.State, state: DecodeState, filters: Filters
) -> tuple[DecodeState, Array, Array]:
    model = nnx.merge(graph.graph, params)

    def unfinished(carry: tuple[Array, DecodeState, Array, Array]) -> Array:
        index, state, *_ = carry
        return (index < length) & ~state.done_B.all()

    def one_token(carry: tuple[Array, DecodeState, Array, Array]) -> tuple[Array, DecodeState, Array, Array]:
        index, state, tokens, nats = carry
        logits_BxV, state = step(model, state, fused=graph.fused, parts=parts)
        steadied_BxV = history_bias.steadied(logits_BxV, state.heard, filters.steadiness)
        allowed_BxV = jnp.where(drawable(state), steadied_BxV, -jnp.inf)
        age_B = state.clock_B - state.birth_B
        drawn_B = sample(jax.vmap(jax.random.fold_in)(state.keys_B, age_B), allowed_BxV, filters)
        drawn_logit_B = jnp.take_along_axis(logits_BxV, drawn_B[:, None], axis=1)[:, 0]
        nats_B = jax.nn.logsumexp(logits_BxV, axis=1) - drawn_logit_B
        state = take(state, drawn_B)
        return index + 1, state, tokens.at[:, index].set(state.recent_BxL[:, -1]), nats.at[:, index].set(nats_B)

    B = state.ended_B.shape[0]
    tokens, nats = jnp.full((B, length), vocabulary.PAD, jnp.int32), jnp.zeros((B, length))
    _, state, tokens, nats = jax.lax.while_loop(unfinished, one_token, (jnp.int32(0), state, tokens, nats))
    return state, tokens, nats


@functools.partial(jax.jit, static_argnums=(0, 4, 5), donate_argnums=2)
def _force(
    graph: _Graph, params: nnx.State, state: DecodeState, tokens_BxT: Int[Array, "B T"], mesh: Mesh | None, parts: int
) -> tuple[DecodeState, Array]:
    loop = functools.partial(_force_rows, graph, parts)
    if mesh is not None:
        return _on_each(loop, mesh, (PartitionSpec(), _BY_ROWS, _BY_ROWS))(params, state, tokens_BxT)
    return loop(params, state, tokens_BxT)


def _force_rows(
    graph: _Graph, parts: int, params: nnx.State, state: DecodeState, tokens_BxT: Int[Array, "B T"]
) -> tuple[DecodeState, Array]:
    model = nnx.merge(graph.graph, params)

    def one_token(state: DecodeState, token_B: Array) -> tuple[DecodeState, Array]:
        logits_BxV, state = step(model, state, fused=graph.fused)
        return take(state, token_B), logits_BxV

    state, logits_TxBxV = jax.lax.scan(one_token, state, tokens_BxT.T)
    return state, logits_TxBxV.swapaxes(0, 1)
