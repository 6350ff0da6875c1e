"""Segment recurrence of Transformer-XL (Dai et al., ACL 2019, arXiv 1901.02860), the baseline for long contexts.

The sequence is cut into segments. In every block, a position attends to its own segment up to itself and to the whole
segment before, whose inputs to the block are a memory without gradient. So the cost is linear in the sequence, and
after L blocks a position has heard of L segments. Since the memory of a block is the stream below it, all segments of a
window are computed side by side. Positions are rotary here, hence relative as in the paper; a window's first segment
has no memory.

Dimension key, in addition to that of `config`: E segments of a batch, Z length of a segment.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from music_ar.model.attention import Block
from music_ar.model.context_attention import attend_context


def attend_segments(
    block: Block,
    x_BxTxD: Float[Array, "B T D"],
    context_BxTxD: Float[Array, "B T D"],
    norm: Callable[[Array], Array],
    positions_BxTxP: Int[Array, "B T P"],
) -> Float[Array, "B T H K"]:
    """Attention of each position to its segment and the one before.

    Args:
        block: the block.
        x_BxTxD: the residual stream, from which queries come.
        context_BxTxD: the stream from which keys and values come.
        norm: its normalization.
        positions_BxTxP: position of each.
    """
    T, Z = x_BxTxD.shape[1], block.config.segment
    count = -(-T // Z)

    def split(x_BxTx: Array) -> Array:
        padded = jnp.pad(x_BxTx, ((0, 0), (0, count * Z - T), *((0, 0),) * (x_BxTx.ndim - 2)))
        return padded.reshape(-1, count, Z, *x_BxTx.shape[2:])

    def with_memory(own: Array, memory: Array) -> Array:
        """Keys or values of each segment, the memory first. The first segment's own stand for its memory, unseen."""
        own, memory = split(own), split(memory)
        before = jnp.concatenate([own[:, :1], memory[:, :-1]], axis=1)
        return jnp.concatenate([before, own], axis=2).reshape(-1, 2 * Z, *own.shape[3:])

    own = block.keys_values(norm(context_BxTxD), positions_BxTxP)
    memory = block.keys_values(norm(jax.lax.stop_gradient(context_BxTxD)), positions_BxTxP)
    k_ExSxGxK, v_ExSxGxK = (with_memory(*each) for each in zip(own, memory, strict=True))
    q_BxTxHxK = block.queries(x_BxTxD, positions_BxTxP)
    q_ExZxHxK = split(q_BxTxHxK).reshape(-1, Z, *q_BxTxHxK.shape[2:])
    memory_E = jnp.tile(jnp.where(jnp.arange(count) > 0, Z, 0), x_BxTxD.shape[0])
    attended = attend_context(q_ExZxHxK, k_ExSxGxK, v_ExSxGxK, memory_E, block.compute)
    return attended.reshape(-1, count * Z, *attended.shape[2:])[:, :T]
