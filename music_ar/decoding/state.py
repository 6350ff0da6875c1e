"""`DecodeState`: everything that decoding carries from token to token."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from music_ar.decoding.history_bias import Heard
from music_ar.features.keyboard import Keyboard
from music_ar.features.retrieval import Memory
from music_ar.tokens import grammar


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
        ended_B: whether the piece has ended by itself; from then on its tokens are `vocabulary.PAD`.
    """

    clock_B: Int[Array, " B"]
    birth_B: Int[Array, " B"]
    budget_B: Int[Array, " B"]
    recent_BxL: Int[Array, "B L"]
    keyboard: Keyboard
    memory: Memory | None
    heard: Heard
    caches: Caches
    grammar: grammar.GrammarState
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


_BY_ROWS = PartitionSpec("rows")


def _mesh_of(state: DecodeState) -> Mesh | None:
    """The devices that the rows were dealt to, or None."""
    sharding = state.clock_B.sharding
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

    specs = (_BY_ROWS, PartitionSpec(), PartitionSpec())
    return _on_each(on_device, mesh, specs)(state, jnp.asarray(row), newcomer)


def _on_each(function: Callable[..., Any], mesh: Mesh, in_specs: tuple[Any, ...]) -> Callable[..., Any]:
    """The function on each device's rows; there is nothing between devices that would have to be checked."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=_BY_ROWS, check_vma=False)
