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
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Integer

from music_ar.decoding import history_bias, pallas_attention
from music_ar.decoding.history_bias import Heard
from music_ar.decoding.layers import TransposedLinear, join_norms, replace_linears
from music_ar.decoding.pallas_attention import FusedAttention
from music_ar.decoding.sampling import Filters, sample
from music_ar.features import keyboard, retrieval
from music_ar.features.keyboard import Keyboard
from music_ar.features.retrieval import Memory, Recalled
from music_ar.model.perceiver_ar import Block, PerceiverAR, Told, causal_attention
from music_ar.model.quantization import YNNPACK, with_int8_weights
from music_ar.tokens import codec

WindowMode = Literal["exact", "sliding"]
WINDOW_MODES: tuple[WindowMode, ...] = get_args(WindowMode)
_NEVER = np.int32(2**30)
KeysValues = tuple[Array, Array]


class Caches(NamedTuple):
    """Rotated keys and values; each is laid out so that a step reads it in order.

    Batch, window and key head are one axis. That is not for brevity: XLA drops an axis of length 1 (a batch of one)
    by a reshape, fuses the reshape with the write of the new entry, and then copies the whole cache at each token.

    Keys are laid out otherwise than values, as [.., K, R], except for the kernel of `decode_kernel`.

    Attributes:
        cross_k, cross_v: of the inputs, [B G, K, M] (fused: [B G, M, K]) and [B G, M, K]; time t is in slot t mod M.
        self_k, self_v: of the latents, one array a layer, [B W G, K, R] (fused: [B W G, R, K]) and [B W G, R, K].
    """

    cross_k: Float[Array, "BG _ _"]
    cross_v: Float[Array, "BG M K"]
    self_k: tuple[Float[Array, "E _ _"], ...]
    self_v: tuple[Float[Array, "E R K"], ...]


class DecodeState(NamedTuple):
    """All that decoding carries from token to token; one pytree, donated to each call.

    Each row has its own clock, which says the slots of its rings, and its own time of birth; what it computes depends
    on the time since then alone. So a row can be replaced at any time, and its sums run over the slots in one order
    whatever its batch-mates do: a piece is the same to the last bit in whichever row, and whenever, it is made.

    Attributes:
        clock_B: time of `pending`.
        birth_B: clock at which the row's piece began; negative if its start lies before what was prefilled.
        budget_B: the latent budget n.
        recent_BxL: the last tokens, `pending` last: what the convolution reads.
        keyboard: after `pending`; its time is what heads that count time go by.
        memory: the notes up to `pending`, for a model that recalls.
        heard: what the piece has been made of up to `pending`.
        caches: keys and values of all tokens before `pending`.
        grammar: what may follow `pending`.
        steps_B: music made so far, in steps of 10 ms.
        limit_B: a row has enough once its music is this long. It goes on as long as others on its device have
            not.
        keys_B: each row's own source of chance.
        ended_B: whether the piece has ended by itself; from then on its tokens are `codec.PAD`.
    """

    clock_B: Int[Array, " B"]
    birth_B: Int[Array, " B"]
    budget_B: Int[Array, " B"]
    recent_BxL: Int[Array, "B L"]
    keyboard: Keyboard
    memory: Memory | None
    heard: Heard
    caches: Caches
    grammar: codec.GrammarState
    steps_B: Int[Array, " B"]
    limit_B: Int[Array, " B"]
    keys_B: Array
    ended_B: Bool[Array, " B"]

    @property
    def done_B(self) -> Bool[Array, " B"]:
        """Which rows have ended or have enough music."""
        return self.ended_B | (self.steps_B >= self.limit_B)

    def with_limit(self, limit_steps: int) -> "DecodeState":
        """The state with another limit: a row is done once it has made `limit_steps` of music after its prompt."""
        return self._replace(limit_B=jnp.full_like(self.limit_B, limit_steps))

    def rows(self, rows: Sequence[int]) -> "DecodeState":
        """A copy of the state of some rows of the batch, in this order; a row may be taken more than once."""
        B = self.birth_B.shape[0]
        index = np.asarray(rows, np.int32)

        def of_rows(leaf: Array) -> Array:
            each = leaf.shape[0] // B  # cache rows a batch row
            return leaf.reshape(B, each, *leaf.shape[1:])[index].reshape(len(index) * each, *leaf.shape[1:])

        return jax.tree.map(of_rows, jax.device_put(self, jax.local_devices()[0]))

    def replaced(self, row: int, newcomer: "DecodeState") -> "DecodeState":
        """The state with another piece in one row, as `Decoder.start` made it alone; the other rows go on as they were.

        Args:
            row: whose place the newcomer takes.
            newcomer: a state of one row, with rings and windows of the same size; it can be used again. The state that
                is replaced cannot: its buffers are taken over.
        """
        mesh = _mesh_of(self)
        if mesh is not None:
            newcomer = jax.device_put(newcomer, NamedSharding(mesh, PartitionSpec()))
        return _replace_row(self, row, newcomer, mesh)


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
            prompts: one token array a row, each beginning with `codec.START`. Equal ones are prefilled once.
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
        tokens_BxP = np.full((B, P + L), codec.PAD, np.int32)
        for row, prompt in zip(tokens_BxP, prompts, strict=True):
            kept = prompt[-(P + L) :]
            row[P + L - len(kept) :] = kept
        grammars = [codec.grammar_after(prompt) for prompt in prompts]
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
            The state, whose pending tokens are the last sampled, and the tokens, `codec.PAD` after a row has ended
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
        """Takes given tokens in place of sampled ones, `codec.PAD` after a row's end.

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


_BY_ROWS = PartitionSpec("rows")


def _mesh_of(state: DecodeState) -> Mesh | None:
    """The devices that the rows were dealt to, or None."""
    sharding = state.clock_B.sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def _stack(rows: Sequence[Any]) -> Any:
    """Pytrees of NumPy arrays as one, with a first axis for them."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def _matrix_as(leaf: Array, dtype: jnp.dtype) -> Array:
    return leaf.astype(dtype) if leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _replace_row(
    state: DecodeState, row: Int[Array, ""] | int, newcomer: DecodeState, mesh: Mesh | None
) -> DecodeState:
    def with_row(state: DecodeState, row: Array | int, newcomer: DecodeState) -> DecodeState:
        B = state.birth_B.shape[0]

        def with_leaf(leaf: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(leaf, new, row * (leaf.shape[0] // B), axis=0)

        return jax.tree.map(with_leaf, state, newcomer)

    if mesh is None:
        return with_row(state, row, newcomer)

    def on_device(state: DecodeState, row: Array, newcomer: DecodeState) -> DecodeState:
        B = state.birth_B.shape[0]
        place = row - jax.lax.axis_index("rows") * B
        return jax.lax.cond(
            (place >= 0) & (place < B), lambda state: with_row(state, place, newcomer), lambda state: state, state
        )

    specs = (_BY_ROWS, PartitionSpec(), PartitionSpec())
    return _on_each(on_device, mesh, specs)(state, jnp.asarray(row), newcomer)


def _on_each(function: Callable[..., Any], mesh: Mesh, in_specs: tuple[Any, ...]) -> Callable[..., Any]:
    """The function on each device's rows; there is nothing between devices that would have to be checked."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=_BY_ROWS, check_vma=False)


class _Graph:
    """A model's structure and how it is decoded, as a static argument: what JAX hashes at each call is kept."""

    def __init__(self, graph: nnx.GraphDef[PerceiverAR], fused: bool):
        self.graph, self._hash = graph, hash((graph, fused))
        self.fused = fused

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Graph) and (self.graph, self.fused) == (other.graph, other.fused))


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
    tokens, nats = jnp.full((B, length), codec.PAD, jnp.int32), jnp.zeros((B, length))
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


def drawable(state: DecodeState) -> Bool[Array, "B V"]:
    """Which tokens may be drawn next: `codec.playable_events`, or only releases where keys are `keyboard.overdue`.

    Where a model forgets to let go of the pedal once, what it was trained on does not tell it to later on: without
    this, dozens of notes would sound for half a minute (docs/evaluation.md). And where nothing has sounded for long
    (`keyboard.paused`), no time shift may be drawn.
    """
    playable_BxV = codec.playable_events(state.grammar, jnp)
    paused_Bx1 = keyboard.paused(state.keyboard, state.grammar.held, jnp)[:, None]
    playable_BxV &= ~(paused_Bx1 & codec.is_shift(jnp.arange(playable_BxV.shape[1]))[None])
    overdue_Bx128 = keyboard.overdue(state.keyboard, state.grammar.held, jnp)
    before, behind = codec.NOTE_OFF, playable_BxV.shape[1] - codec.NOTE_OFF - codec.PITCHES
    # None may follow a note-on that a prompt ends with; then they follow the next shift.
    releases_BxV = jnp.pad(overdue_Bx128, ((0, 0), (before, behind))) & playable_BxV
    return jnp.where(releases_BxV.any(axis=1, keepdims=True), releases_BxV, playable_BxV)


def take(state: DecodeState, token_B: Int[Array, " B"]) -> DecodeState:
    """Makes `token_B` pending (`codec.PAD` in rows that have ended) and keeps the grammar and the time."""
    token_B = jnp.where(state.ended_B, codec.PAD, token_B)
    after = keyboard.advance(state.keyboard, token_B, jnp)
    memory = state.memory
    if memory is not None:
        memory = retrieval.advance(memory, token_B, after.step, after.velocity)
    return state._replace(
        recent_BxL=jnp.concatenate([state.recent_BxL[:, 1:], token_B[:, None]], axis=1),
        keyboard=after,
        memory=memory,
        heard=history_bias.advance(state.heard, token_B, after.velocity),
        grammar=codec.advance(state.grammar, token_B, jnp),
        steps_B=state.steps_B + after.step - state.keyboard.step,
        ended_B=state.ended_B | (token_B == codec.END),
    )


def step(
    model: PerceiverAR, state: DecodeState, *, fused: bool = False, parts: int = 1
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Runs the pending token through the model: logits of what follows it, and the state one tick later.

    Args:
        model: with its self blocks joined, as `Decoder` makes it.
        state: what came before.
        fused: whether attention is one kernel; the caches' layout must fit.
        parts: equal parts that the rows are taken in, which need nothing of each other but their turn at the caches;
            more than one only if `fused`.
    """
    clock_B, caches = state.clock_B, state.caches
    B = state.birth_B.shape[0]
    W = caches.self_v[0].shape[0] // caches.cross_v.shape[0]
    age_B = clock_B - state.birth_B
    starts_BxW, active_B = window_starts(age_B, state.budget_B, W)
    seen_since_B = jnp.maximum(state.birth_B, 0)
    window_since_BxW = starts_BxW + state.birth_B[:, None]
    places_BxP = jnp.stack([age_B, state.keyboard.step], axis=-1)
    told_B = Told(state.keyboard, None if state.memory is None else retrieval.recalled(state.memory))
    embedded_Bx1xD = model.tell(model.embed_last(state.recent_BxL), told_B)[:, None]

    assert B % parts == 0
    assert fused or parts == 1
    rows = [slice(first, first + B // parts) for first in range(0, B, B // parts)]
    attentions: list[FusedAttention | PlainAttention] = [PlainAttention(clock_B, places_BxP, W)]
    if fused:
        attentions = [
            FusedAttention(model.config, clock_B[of], places_BxP[of], W, first=of.start, beside=parts > 1)
            for of in rows
        ]
    cross = (caches.cross_k, caches.cross_v)

    def attend_context(block: Block, streams: list[Array], contexts: Sequence[Array | None]) -> list[Array]:
        nonlocal cross
        after = []
        for of, attention, x_BxTxD, context in zip(rows, attentions, streams, contexts, strict=True):
            found, cross = attention.cross(block, x_BxTxD, context, cross, seen_since_B[of])
            after.append(block.add(x_BxTxD, found, _KEEP))
        return after

    contexts = [model.context_norm(embedded_Bx1xD[of]) for of in rows]
    streams = attend_context(model.cross, [model.latent(embedded_Bx1xD[of]) for of in rows], contexts)
    streams = [jnp.repeat(x_Bx1xD, W, axis=0) for x_Bx1xD in streams]
    further = dict(zip(model.config.cross_depths, model.further_crosses, strict=True))
    filled = []
    for depth, (block, *layer) in enumerate(zip(model.blocks, caches.self_k, caches.self_v, strict=True)):
        if depth in further:
            by_row = [x_BWx1xD.reshape(-1, W, x_BWx1xD.shape[-1]) for x_BWx1xD in streams]
            by_row = attend_context(further[depth], by_row, [None] * parts)
            streams = [x_BxWxD.reshape(-1, 1, x_BxWxD.shape[-1]) for x_BxWxD in by_row]
        cache, after = (layer[0], layer[1]), []
        for of, attention, x_BWx1xD in zip(rows, attentions, streams, strict=True):
            found, cache = attention.within(block, x_BWx1xD, cache, window_since_BxW[of].reshape(-1))
            after.append(block.add(x_BWx1xD, found, _KEEP))
        streams = after
        filled.append(cache)
    predicting_Bx1xD = jnp.concatenate(streams)[jnp.arange(B) * W + active_B]
    caches = Caches(*cross, *zip(*filled, strict=True))
    return model.logits(predicting_Bx1xD)[:, 0], state._replace(clock_B=clock_B + 1, caches=caches)


def window_starts(
    age_B: Int[Array, " B"], budget_B: Int[Array, " B"], windows: int
) -> tuple[Int[Array, "B W"], Int[Array, " B"]]:
    """When the windows that a latent of this age is in began, and which of them predicts.

    Of two (exact), window w begins at the multiples of n / 2 whose number is even (w = 0) or odd (w = 1); before
    n / 2, window 1 has not begun. A single one (sliding) begins n - 1 tokens ago.
    """
    if windows == 1:
        return jnp.maximum(age_B - budget_B + 1, 0)[:, None], jnp.zeros_like(age_B)
    half_B = budget_B // 2
    count_B = age_B // half_B
    numbers_Bx2 = count_B[:, None] - (count_B[:, None] - jnp.arange(2)[None]) % 2
    starts_Bx2 = jnp.where(numbers_Bx2 >= 0, numbers_Bx2 * half_B[:, None], _NEVER)
    return starts_Bx2, jnp.where(count_B == 0, 0, (count_B + 1) % 2)


_KEEP = nnx.Dropout(0.0, deterministic=True)


class PlainAttention:
    """The attention of all blocks in one step, as ordinary operations; `FusedAttention` does the same in a kernel.

    Args:
        clock_B: the time of the step, by row.
        places_BxP: the position that it has in the piece, by either way to count.
        windows: W.
    """

    def __init__(self, clock_B: Int[Array, " B"], places_BxP: Int[Array, "B P"], windows: int) -> None:
        self._clock_B, self._places_Bx1xP, self._windows = clock_B, places_BxP[:, None], windows

    def cross(
        self,
        block: Block,
        x_BxTxD: Float[Array, "B T D"],
        context_Bx1xD: Float[Array, "B 1 D"] | None,
        cache: KeysValues,
        since_B: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T H K"], KeysValues]:
        """What a cross block finds in the context for T latents a row, and the context's cache.

        Args:
            block: the block.
            x_BxTxD: the stream of the latents.
            context_Bx1xD: the normalised input that is new in the context; None if the cache has it already.
            cache: of the context.
            since_B: the time from which on inputs are seen.
        """
        if context_Bx1xD is not None:
            cache = _write(*cache, *block.keys_values(context_Bx1xD, self._places_Bx1xP), self._clock_B)
        places_BxTxP = jnp.repeat(self._places_Bx1xP, x_BxTxD.shape[1], axis=1)
        seen_BxM = _times(self._clock_B, cache[1].shape[1]) >= since_B[:, None]
        return _attend(block.queries(x_BxTxD, places_BxTxP), *cache, seen_BxM), cache

    def within(
        self, block: Block, x_BWx1xD: Float[Array, "BW 1 D"], cache: KeysValues, since_BW: Int[Array, " BW"]
    ) -> tuple[Float[Array, "BW 1 H K"], KeysValues]:
        """What a self block finds in each window, and the windows' cache.

        Args:
            block: the block.
            x_BWx1xD: the stream.
            cache: of the windows.
            since_BW: when each window began. One that has not begun sees itself, so that its softmax has a key; nobody
                reads it.
        """
        clock_BW = jnp.repeat(self._clock_B, self._windows)
        q, k, v = block.queries_keys_values(x_BWx1xD, jnp.repeat(self._places_Bx1xP, self._windows, axis=0))
        cache = _write(*cache, k, v, clock_BW)
        times_BWxR = _times(clock_BW, cache[1].shape[1])
        in_window_BWxR = (times_BWxR >= since_BW[:, None]) | (times_BWxR == clock_BW[:, None])
        return _attend(q, *cache, in_window_BWxR), cache


def _times(clock_B: Array, size: int) -> Int[Array, "B size"]:
    """The time that each slot of a ring holds, once the slot of `clock_B` is written."""
    return clock_B[:, None] - (clock_B[:, None] - jnp.arange(size)[None]) % size


def _write(
    k_cache_ExKxR: Array, v_cache_ExRxK: Array, k_Bx1xGxK: Array, v_Bx1xGxK: Array, clock_B: Array
) -> KeysValues:
    """The caches with the key and value of the clock's time in its slot."""
    E, K, R = k_cache_ExKxR.shape
    slot_E = jnp.repeat(clock_B % R, E // len(clock_B))
    return (
        k_cache_ExKxR.at[jnp.arange(E), :, slot_E].set(k_Bx1xGxK.reshape(E, K).astype(k_cache_ExKxR.dtype)),
        v_cache_ExRxK.at[jnp.arange(E), slot_E].set(v_Bx1xGxK.reshape(E, K)),
    )


def _attend(q_BxTxHxK: Array, k_ExKxR: Array, v_ExRxK: Array, seen_BxR: Array) -> Float[Array, "B T H K"]:
    """Attention of T queries a row to that row's ring; float32 softmax."""
    B, T, H, K = q_BxTxHxK.shape
    G = k_ExKxR.shape[0] // B
    q_ExQxK = q_BxTxHxK.astype(k_ExKxR.dtype).reshape(B, T, G, H // G, K).swapaxes(1, 2).reshape(B * G, -1, K)
    scores_ExQxR = jnp.einsum("eqk,ekr->eqr", q_ExQxK, k_ExKxR, preferred_element_type=jnp.float32)
    seen_Ex1xR = jnp.repeat(seen_BxR, G, axis=0)[:, None]
    chances_ExQxR = jax.nn.softmax(jnp.where(seen_Ex1xR, scores_ExQxR * K**-0.5, -jnp.inf), axis=-1)
    found_ExQxK = jnp.einsum("eqr,erk->eqk", chances_ExQxR.astype(v_ExRxK.dtype), v_ExRxK)
    return found_ExQxK.reshape(B, G, T, H // G, K).swapaxes(1, 2).reshape(B, T, H, K)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(graph: _Graph, params: nnx.State, state: DecodeState, tokens_BxP: Array, told_BxP: Told) -> DecodeState:
    """Fills the caches with P tokens at once.

    In exact mode they hold what P steps would have left there, but for rounding; in sliding mode, the last n latents as
    the model was trained to compute them.

    `tokens_BxP` are left-padded; their last has time clock_B - 1. `told_BxP` is after each of them.
    """
    model = nnx.merge(graph.graph, params)
    caches = state.caches
    B, P = tokens_BxP.shape
    M, R = caches.cross_v.shape[1], caches.self_v[0].shape[1]
    W = caches.self_v[0].shape[0] // caches.cross_v.shape[0]
    times_BxP = jnp.broadcast_to(jnp.arange(P)[None], (B, P))
    # From here on P is also the two ways to count a position, as in `model`.
    places_BxPxP = jnp.stack([times_BxP - state.birth_B[:, None], told_BxP.keyboard.step], axis=-1)
    embedded_BxPxD = model.tell(model.embed(tokens_BxP), told_BxP)
    k_BxPxGxK, v_BxPxGxK = model.cross.keys_values(model.context_norm(embedded_BxPxD), places_BxPxP)

    # The latents from each window's start; those at or after P are in the future and are masked later. The one that
    # predicts comes first; of two, the other holds at most half the budget.
    starts_BxW, active_B = window_starts(P - 1 - state.birth_B, state.budget_B, W)
    by_age = []
    for turn in range(W):
        start_B = jnp.take_along_axis(starts_BxW, (active_B[:, None] + turn) % W, axis=1)[:, 0] + state.birth_B
        times_BxR = start_B[:, None] + jnp.arange(min(R >> turn, P))[None]
        filled = _prefill_window(model, embedded_BxPxD, places_BxPxP, k_BxPxGxK, v_BxPxGxK, state.birth_B, times_BxR)
        by_age.append([[_in_slots(x, times_BxR % R, R) for x in layer] for layer in filled])
    order_BxW = (jnp.arange(W)[None] - active_B[:, None]) % W

    def by_window(turns: Sequence[Array]) -> Array:
        stacked_BxWxRxGxK = jnp.stack(turns, axis=1)
        in_order = jnp.take_along_axis(stacked_BxWxRxGxK, order_BxW[:, :, None, None, None], axis=1)
        return in_order.reshape(B * W, *in_order.shape[2:])

    layers = [[by_window(pair) for pair in zip(*turns, strict=True)] for turns in zip(*by_age, strict=True)]
    last_1xM = jnp.arange(max(0, P - M), P)[None]
    cross_k, cross_v = (_in_slots(x[:, -M:], last_1xM % M, M) for x in (k_BxPxGxK, v_BxPxGxK))
    key_layout = _value_layout if graph.fused else _key_layout
    caches = Caches(
        cross_k=key_layout(cross_k).astype(caches.cross_k.dtype),
        cross_v=_value_layout(cross_v),
        self_k=tuple(key_layout(k).astype(caches.cross_k.dtype) for k, _ in layers),
        self_v=tuple(_value_layout(v) for _, v in layers),
    )
    return state._replace(caches=caches)


def _in_slots(x_BxTxGxK: Array, slots_BxT: Array, size: int) -> Float[Array, "B size G K"]:
    """Entries put into the slots of a ring; the others are zero."""
    empty = jnp.zeros((size, *x_BxTxGxK.shape[2:]), x_BxTxGxK.dtype)
    slots_BxT = jnp.broadcast_to(slots_BxT, x_BxTxGxK.shape[:2])
    return jax.vmap(lambda x, slots: empty.at[slots].set(x))(x_BxTxGxK, slots_BxT)


def _key_layout(k_BxRxGxK: Array) -> Float[Array, "BG K R"]:
    return k_BxRxGxK.transpose(0, 2, 3, 1).reshape(-1, k_BxRxGxK.shape[-1], k_BxRxGxK.shape[1])


def _value_layout(v_BxRxGxK: Array) -> Float[Array, "BG R K"]:
    return v_BxRxGxK.swapaxes(1, 2).reshape(-1, v_BxRxGxK.shape[1], v_BxRxGxK.shape[-1])


def _prefill_window(
    model: PerceiverAR, embedded_BxPxD: Array, places_BxPxP: Array, k: Array, v: Array, birth_B: Array, times_BxR: Array
) -> list[tuple[Array, Array]]:
    """Keys and values [B, R, G, K], a pair a layer, of the latents at `times_BxR`."""
    P, M = embedded_BxPxD.shape[1], model.config.context
    times_BxR = jnp.clip(times_BxR, 0, P - 1)
    places_BxRxP = jnp.take_along_axis(places_BxPxP, times_BxR[..., None], axis=1)
    keys_1x1xP = jnp.arange(P)[None, None]
    seen_BxRxP = (keys_1x1xP <= times_BxR[..., None]) & (keys_1x1xP > times_BxR[..., None] - M)
    seen_BxRxP &= (keys_1x1xP >= birth_B[:, None, None]) | (keys_1x1xP == times_BxR[..., None])

    def attend_context(block: Block, x_BxRxD: Array) -> Array:
        q = block.queries(x_BxRxD, places_BxRxP)
        return block.add(x_BxRxD, jax.nn.dot_product_attention(q, k, v, mask=seen_BxRxP[:, None]), _KEEP)

    x_BxRxD = jnp.take_along_axis(embedded_BxPxD, times_BxR[..., None], axis=1)
    x_BxRxD = attend_context(model.cross, model.latent(x_BxRxD))
    further = dict(zip(model.config.cross_depths, model.further_crosses, strict=True))
    filled = []
    for depth, block in enumerate(model.blocks):
        if depth in further:
            x_BxRxD = attend_context(further[depth], x_BxRxD)
        q, *filled_by = block.queries_keys_values(x_BxRxD, places_BxRxP)
        filled.append(tuple(filled_by))
        x_BxRxD = block.add(x_BxRxD, causal_attention(q, *filled_by), _KEEP)
    return filled
