"""An adaptive tape (AdaTape, Xue et al., arXiv 2301.13195): each input takes as many tape tokens as it needs.

A bank holds tokens that were learned, and one for each input before the latents. A reader takes from it one token after
another. It begins with the mean of those inputs; its state asks the bank, what it finds is a mixture of the tokens that
are left, and the one with the largest share is taken away. What was found changes the state, the state is the tape
token, and it gives the chance that reading halts here. Tape tokens stand before the latents in all self blocks. They
depend on nothing but inputs before the first latent, so every latent may see them.

Reading halts as in Graves' adaptive computation time (arXiv 1603.08983): once the chances add up to 1 - epsilon. The
value that a latent finds in a tape token is multiplied by the token's share, the chance that it is read at all, so both
the prediction and the ponder loss, the sum of the shares, have gradients by the halting chances. They are exact for the
tokens as they are read. Nothing flows through the number of tokens and through the choice of what is taken away: where
a token joins, it brings a value of next to nothing, but takes attention from the others.

Differences from the paper: there the query is averaged with what it found, and a tape token is what was found; here a
small layer changes the state, which is the token. There the largest weights of the mixtures add up to the threshold,
and the ponder loss makes mixtures peaked.

Models with a tape are trained and scored, but do not generate: on music the tape gained nothing
(docs/concepts/adatape.md).

Dimension key, in addition to that of `config`: U tokens of the bank, P inputs before the latents, T tape tokens.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from music_ar.model.attention import Block, causal_attention, linear
from music_ar.model.config import Compute, TapeConfig

_EPSILON = 1e-6  # of norms
_NEVER = -1e30  # a score from which no probability above zero follows


class Halting(NamedTuple):
    """Where reading halts.

    Attributes:
        shares_BxT: the chance that each token is read; 0 for those that are not.
        reads_B: number of tokens read.
    """

    shares_BxT: Float[Array, "B T"]
    reads_B: Int[Array, " B"]


class Reading(NamedTuple):
    """A tape that was read.

    Attributes:
        tokens_BxTxD: the tape tokens.
        halting: how many of them count, and how much.
    """

    tokens_BxTxD: Float[Array, "B T D"]
    halting: Halting


class TapeKeys(NamedTuple):
    """What the latents see of the tape in one block.

    Attributes:
        k_BxTxGxK, v_BxTxGxK: keys, and values multiplied by the shares.
        reads_B: how many of them are seen.
    """

    k_BxTxGxK: Float[Array, "B T G K"]
    v_BxTxGxK: Float[Array, "B T G K"]
    reads_B: Int[Array, " B"]


def halt(chances_BxT: Float[Array, "B T"], size_B: Int[Array, " B"], epsilon: float) -> Halting:
    """Where reading halts, given the chance to halt after each token.

    A token is read if the bank has it and the chances before it add up to less than 1 - epsilon. So the first one is.

    Args:
        chances_BxT: in 0..1.
        size_B: number of tokens in the bank.
        epsilon: what is left of the last chance.
    """
    before_BxT = jnp.cumsum(chances_BxT, axis=1) - chances_BxT
    read_BxT = (before_BxT < 1 - epsilon) & (jnp.arange(chances_BxT.shape[1])[None] < size_B[:, None])
    return Halting(jnp.where(read_BxT, 1 - before_BxT, 0.0), read_BxT.sum(axis=1))


class Tape(nnx.Module):
    """The bank and its reader.

    Args:
        sizes: the tape's sizes.
        width: D.
        dtype: of matrix products; the state and the chances are float32.
        rngs: for the initial parameters.
    """

    def __init__(self, sizes: TapeConfig, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.sizes = sizes
        matrix = functools.partial(linear, dtype=dtype, rngs=rngs, kernel_init=nnx.initializers.lecun_normal())
        if sizes.learned:
            self.learned = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (sizes.learned, width)))
        self.start = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (width,)))
        self.item, self.key, self.query = (matrix(width, width) for _ in range(3))
        self.expand = matrix(2 * width, 2 * width)
        self.contract = matrix(2 * width, width)
        # At first, all tokens are read.
        zeros, rare = nnx.initializers.zeros, nnx.initializers.constant(-math.log(sizes.tokens))
        self.halt = nnx.Linear(width, 1, kernel_init=zeros, bias_init=rare, dtype=jnp.float32, rngs=rngs)

    def __call__(self, inputs_BxPxD: Float[Array, "B P D"], inside_BxP: Bool[Array, "B P"]) -> Reading:
        """Read a tape for the inputs before the latents, which are those `inside`."""
        items_BxPxD = _unit(self.item(_unit(inputs_BxPxD)))
        mean_BxD = jnp.einsum("bpd,bp->bd", items_BxPxD.astype(jnp.float32), _shares(inside_BxP))
        state_BxD = _unit(self.start[...][None] + mean_BxD)
        bank_BxUxD, there_BxU = self._bank(items_BxPxD, inside_BxP)
        keys_BxUxD = self.key(bank_BxUxD)

        def read(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
            state_BxD, left_BxU = carry
            found_BxD, taken_BxU = self._ask(state_BxD, bank_BxUxD, keys_BxUxD, left_BxU)
            state_BxD = self._changed(state_BxD, found_BxD)
            return (state_BxD, left_BxU & ~taken_BxU), state_BxD

        _, tokens_TxBxD = jax.lax.scan(read, (state_BxD, there_BxU), length=self.sizes.tokens)
        tokens_BxTxD = tokens_TxBxD.swapaxes(0, 1)
        chances_BxT = jax.nn.sigmoid(self.halt(tokens_BxTxD))[..., 0]
        return Reading(tokens_BxTxD, halt(chances_BxT, there_BxU.sum(axis=1), self.sizes.epsilon))

    def _bank(self, items_BxPxD: Array, inside_BxP: Array) -> tuple[Float[Array, "B U D"], Bool[Array, "B U"]]:
        """The tokens of the bank, and which of them there are."""
        tokens, there = [], []
        if self.sizes.learned:
            B, U = items_BxPxD.shape[0], self.sizes.learned
            learned_UxD = _unit(self.learned[...]).astype(items_BxPxD.dtype)
            tokens.append(jnp.broadcast_to(learned_UxD[None], (B, U, items_BxPxD.shape[-1])))
            there.append(jnp.ones((B, U), bool))
        if self.sizes.of_inputs:
            tokens.append(items_BxPxD)
            there.append(inside_BxP)
        return jnp.concatenate(tokens, axis=1), jnp.concatenate(there, axis=1)

    def _ask(self, state_BxD: Array, bank_BxUxD: Array, keys_BxUxD: Array, left_BxU: Array) -> tuple[Array, Array]:
        """The mixture of what is left of the bank, and which token has the largest share of it."""
        scores_BxU = jnp.einsum("bd,bud->bu", self.query(state_BxD), keys_BxUxD, preferred_element_type=jnp.float32)
        scores_BxU = jnp.where(left_BxU, scores_BxU * state_BxD.shape[-1] ** -0.5, _NEVER)
        weights_BxU = jax.nn.softmax(scores_BxU)
        found_BxD = jnp.einsum("bu,bud->bd", weights_BxU.astype(bank_BxUxD.dtype), bank_BxUxD)
        return found_BxD.astype(jnp.float32), jax.nn.one_hot(scores_BxU.argmax(axis=1), scores_BxU.shape[1], dtype=bool)

    def _changed(self, state_BxD: Array, found_BxD: Array) -> Float[Array, "B D"]:
        """The state after something was found."""
        hidden = jax.nn.relu(self.expand(jnp.concatenate([state_BxD, found_BxD], axis=-1)))
        return _unit(state_BxD + self.contract(jnp.square(hidden)).astype(jnp.float32))


def tape_keys(
    reading: Reading,
    blocks: Sequence[Block],
    positions_BxTxP: Int[Array, "B T P"],
    compute: Compute,
    dropout: nnx.Dropout,
) -> list[TapeKeys]:
    """What the latents see of a tape in each block.

    The tape passes through the blocks like latents that come before all others: each token sees those before it.

    Args:
        reading: the tape.
        blocks: the self blocks.
        positions_BxTxP: position of each tape token.
        compute: how the model computes.
        dropout: of the stream.
    """
    found, (tokens_BxTxD, (shares_BxT, reads_B)) = [], reading
    x_BxTxD = tokens_BxTxD.astype(compute.dtype)
    for block in blocks:
        q, k, v = block.queries_keys_values(x_BxTxD, positions_BxTxP)
        found.append(TapeKeys(k, v * shares_BxT[..., None, None].astype(v.dtype), reads_B))
        x_BxTxD = block.add(x_BxTxD, causal_attention(q, k, v, compute), dropout)
    return found


def tape_positions(first_BxP: Int[Array, "B P"], count: int) -> Int[Array, "B T P"]:
    """Positions of tape tokens: right before the first latent, and at its time."""
    before_T = jnp.arange(-count, 0)
    in_tokens_BxT = first_BxP[:, :1] + before_T[None]
    return jnp.stack([in_tokens_BxT, jnp.broadcast_to(first_BxP[:, 1:], in_tokens_BxT.shape)], axis=-1)


def _shares(inside_BxP: Array) -> Float[Array, "B P"]:
    """The same share for each of those inside; zeros if there are none."""
    return inside_BxP / jnp.maximum(inside_BxP.sum(axis=1, keepdims=True), 1)


def _unit(x: Array) -> Float[Array, "*B D"]:
    """Scaled to a mean square of 1, in float32 inside."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + _EPSILON)).astype(x.dtype)
