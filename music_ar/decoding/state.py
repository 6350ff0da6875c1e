"""`DecodeState`: everything that decoding carries from token to token, for a batch of rows.

Dimension key, in addition to that of `music_ar.model.config`: R latents in a rolling cache, W windows, L conv taps, E
rows of a cache (batch, window and key head as one axis).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from music_ar.decoding.history_bias import NoteHistory
from music_ar.features import gap, notes, retrieval
from music_ar.features.gap import Gap
from music_ar.features.keyboard import Keyboard
from music_ar.features.notes import Notes
from music_ar.features.retrieval import Match
from music_ar.model.config import ModelConfig
from music_ar.model.perceiver_ar import Conditioning
from music_ar.tokens.grammar import GrammarState

BY_ROWS = PartitionSpec("rows")


class Caches(NamedTuple):
    """Rotated keys and values in rolling caches, each laid out so that a step reads it in order.

    Batch, window and key head share one axis for speed: XLA would drop an axis of length 1 (a batch of one) by a
    reshape, fuse the reshape with the write of the new entry, and then copy the whole cache at each token. Keys are
    laid out as [.., K, R], except for the attention kernel.

    Attributes:
        cross_k, cross_v: of the inputs, [B G, K, M] (kernel: [B G, M, K]) and [B G, M, K]; time t is in slot t mod M.
        self_k, self_v: of the latents, one array per layer that is run, [B W G, K, R] (kernel: [B W G, R, K]) and
            [B W G, R, K].
    """

    cross_k: Float[Array, "BG _ _"]
    cross_v: Float[Array, "BG M K"]
    self_k: tuple[Float[Array, "E _ _"], ...]
    self_v: tuple[Float[Array, "E R K"], ...]

    @property
    def windows(self) -> int:
        """W, the number of windows."""
        return self.self_v[0].shape[0] // self.cross_v.shape[0]


class EarlyExit(NamedTuple):
    """When tokens leave early (see `step`), and how much work they were.

    Attributes:
        tolerance_B: a token leaves at the first exit where that is expected to cost fewer nats.
        layers_run_B: self blocks run so far, over all tokens of the row.
    """

    tolerance_B: Float[Array, " B"]
    layers_run_B: Int[Array, " B"]


class DecodeState(NamedTuple):
    """Everything that decoding carries from token to token; one pytree, donated to each call.

    Each row has its own clock, which selects the slots of its rolling caches, and its own birth. Its results depend
    only on the time since then, so a row can be replaced at any time. Its sums run over the slots in the same order
    whatever the other rows do: a piece is the same to the last bit in any row, started at any time.

    Attributes:
        clock_B: time of the pending token, in tokens.
        birth_B: clock at which the row's piece began; negative if it began before the prefilled part.
        latents_B: number of latents, n.
        recent_BxL: the last tokens, the pending one last: what the convolution reads.
        held_Bx128: how many notes of each pitch are held after the pending token.
        keyboard: after the pending token.
        notes: the last notes up to it.
        match: their n-gram match, for a model with retrieval.
        gap: the gap that the piece fills, for a model that can.
        history: histograms of the notes that the piece has had.
        caches: keys and values of all tokens before the pending one.
        prompt_end_B: time at which the prompt ends, in steps of 10 ms.
        limit_B: a row is done once it has this much music after its prompt, in steps. It continues as long as other
            rows on its device are not done.
        rng_B: each row's random key.
        ended_B: whether the piece has ended on its own; from then on, its tokens are `vocabulary.PAD`.
        early: when tokens leave early; None if they never do.
        wishes_BxD: the vector of each row's wishes, for a model that takes wishes.
    """

    clock_B: Int[Array, " B"]
    birth_B: Int[Array, " B"]
    latents_B: Int[Array, " B"]
    recent_BxL: Int[Array, "B L"]
    held_Bx128: Int[Array, "B 128"]
    keyboard: Keyboard
    notes: Notes
    match: Match | None
    gap: Gap | None
    history: NoteHistory
    caches: Caches
    prompt_end_B: Int[Array, " B"]
    limit_B: Int[Array, " B"]
    rng_B: Array
    ended_B: Bool[Array, " B"]
    wishes_BxD: Float[Array, "B D"] | None
    early: EarlyExit | None = None

    @property
    def done_B(self) -> Bool[Array, " B"]:
        """Rows that have ended or have enough music."""
        return self.ended_B | (self.keyboard.time - self.prompt_end_B >= self.limit_B)

    @property
    def layers(self) -> int:
        """Number of self blocks that a token runs through, unless it leaves early."""
        return len(self.caches.self_k)

    @property
    def layers_run_B(self) -> Int[Array, " B"] | None:
        """See `AnyState.layers_run_B`."""
        return None if self.early is None else self.early.layers_run_B

    @property
    def age_B(self) -> Int[Array, " B"]:
        """Position of the pending token in its piece."""
        return self.clock_B - self.birth_B

    @property
    def grammar(self) -> GrammarState:
        """Grammar state after the pending token; meaningless in rows that have ended."""
        return GrammarState(self.held_Bx128, self.keyboard.velocity, self.recent_BxL[:, -1])

    def conditioning(self, config: ModelConfig) -> Conditioning:
        """Conditioning features after the pending token."""
        found = None if self.match is None else retrieval.retrieved(self.notes, self.match)
        place = None if self.gap is None else gap.place(self.gap, self.keyboard.time)
        return Conditioning(self.keyboard, notes.latest(self.notes, config.onsets), found, place)

    def with_wishes(self, embedded_BxTxD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Embedded tokens of each row with its wishes added."""
        if self.wishes_BxD is None:
            return embedded_BxTxD
        return embedded_BxTxD + self.wishes_BxD.astype(embedded_BxTxD.dtype)[:, None]

    def with_limit(self, limit_steps: int) -> "DecodeState":
        """The state with another limit: rows are done after `limit_steps` of music after their prompts."""
        return self._replace(limit_B=jnp.full_like(self.limit_B, limit_steps))

    def with_seeds(self, seeds: Sequence[int]) -> "DecodeState":
        """The state with other random keys: those of these seeds, one per row."""
        return self._replace(rng_B=jnp.stack([jax.random.key(seed) for seed in seeds]))

    def with_ended(self, ended_B: Bool[np.ndarray, " B"]) -> "DecodeState":
        """The state with these rows ended and the others not."""
        return self._replace(ended_B=jnp.asarray(ended_B))

    def rows(self, rows: Sequence[int]) -> "DecodeState":
        """A copy of the state of some rows, in this order; a row may be taken more than once."""
        B = self.birth_B.shape[0]
        index = np.asarray(rows, np.int32)

        def of_rows(leaf: Array) -> Array:
            each = leaf.shape[0] // B  # cache rows of a batch row
            return leaf.reshape(B, each, *leaf.shape[1:])[index].reshape(len(index) * each, *leaf.shape[1:])

        return jax.tree.map(of_rows, jax.device_put(self, jax.local_devices()[0]))

    def replaced(self, row: int, newcomer: "DecodeState") -> "DecodeState":
        """The state with a new piece from `Decoder.start` in one row; the other rows continue as before.

        Args:
            row: the row to replace.
            newcomer: a state of one row, with caches and windows of the same size; it can be used again. The state
                itself cannot: its buffers are donated.
        """
        mesh = self._mesh()
        if mesh is not None:
            newcomer = jax.device_put(newcomer, NamedSharding(mesh, PartitionSpec()))
        return _replace_row(self, row, newcomer, mesh)

    def _mesh(self) -> Mesh | None:
        """The devices that the rows are sharded over, or None."""
        sharding = self.clock_B.sharding
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


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

    specs = (BY_ROWS, PartitionSpec(), PartitionSpec())
    return on_each_device(on_device, mesh, specs)(state, jnp.asarray(row), newcomer)


def on_each_device(function: Callable[..., Any], mesh: Mesh, in_specs: tuple[Any, ...]) -> Callable[..., Any]:
    """Run a function on each device's rows. Nothing passes between devices, so nothing needs to be checked."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=BY_ROWS, check_vma=False)
