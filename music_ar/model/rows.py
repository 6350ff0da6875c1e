"""The rows of the cross-attention: which inputs they are, and in what order. The dimension key is in `config`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array


class Rows(NamedTuple):
    """The order of the kept inputs in the S rows of the cross-attention: real ones in order, then padding.

    Fused attention takes no mask, but padding that comes last is never seen: the prefix has a length, and a latent does
    not see later ones.

    Attributes:
        positions_BxS: input position of each row.
        prefix_B: how many rows are prefix.
        latents_B: the first of the N rows of latents.
        right_aligned_BxN: the latents' order with padding back on the left.
        split_over: mesh axis whose devices each have a share of the prefix; None if a device has it all.
    """

    positions_BxS: Array
    prefix_B: Array
    latents_B: Array
    right_aligned_BxN: Array
    split_over: str | None = None

    def share(self, axis: str) -> "Rows":
        """The rows of one device of a mesh axis: its share of the prefix, padded to equal shares, and the latents."""
        devices, N = jax.lax.axis_size(axis), self.right_aligned_BxN.shape[1]
        prefix = self.positions_BxS.shape[1] - N
        size = -(-prefix // devices)
        start = size * jax.lax.axis_index(axis)
        padded_BxS = jnp.pad(self.positions_BxS[:, :prefix], ((0, 0), (0, size * devices - prefix)))
        latents_BxN = take_slice(self.positions_BxS, self.latents_B, N)
        return self._replace(
            positions_BxS=jnp.concatenate(
                [jax.lax.dynamic_slice_in_dim(padded_BxS, start, size, axis=1), latents_BxN], axis=1
            ),
            prefix_B=jnp.clip(self.prefix_B - start, 0, size),
            latents_B=jnp.full_like(self.latents_B, size),
            split_over=axis,
        )


def lay_out(is_padding_BxM: Array, N: int, kept_prefix: int | None, key: Array | None) -> Rows:
    """The rows of inputs with N latents; `kept_prefix` and `key` as in `PerceiverAR.at_depths`."""
    B, M = is_padding_BxM.shape
    prefix = M - N
    kept = prefix if kept_prefix is None else min(kept_prefix, prefix)
    positions_BxS = jnp.broadcast_to(jnp.arange(M), (B, M))
    if kept < prefix:
        if key is None:
            raise ValueError(f"kept_prefix = {kept_prefix} drops positions at random and needs a key")
        chance_BxP = jax.random.uniform(key, (B, prefix))
        chosen_BxP = jnp.sort(jnp.argsort(chance_BxP, axis=1)[:, :kept], axis=1)
        positions_BxS = jnp.concatenate([chosen_BxP, positions_BxS[:, prefix:]], axis=1)
    padding_Bx1 = jnp.sum(is_padding_BxM, axis=1, keepdims=True)  # it leads, so it is the positions below
    padded_Bx1 = jnp.sum(positions_BxS < padding_Bx1, axis=1, keepdims=True)
    missing_latents_Bx1 = jnp.maximum(padded_Bx1 - kept, 0)
    rows_1xS, latents_1xN = jnp.arange(kept + N)[None], jnp.arange(N)[None]
    prefix_B = jnp.maximum(kept - padded_Bx1, 0)[:, 0]
    return Rows(
        positions_BxS=take(positions_BxS, (rows_1xS + padded_Bx1) % (kept + N)),
        prefix_B=prefix_B,
        latents_B=prefix_B,
        right_aligned_BxN=(latents_1xN - missing_latents_Bx1) % N,
    )


def take(x_BxTx: Array, index_BxR: Array) -> Array:
    """Take rows of each batch entry, none twice, which makes the gradient a plain write instead of an atomic sum."""
    rows = jax.vmap(lambda x, index: x.at[index].get(unique_indices=True, mode="promise_in_bounds"))
    return rows(x_BxTx, index_BxR)


def take_slice(x_BxSx: Array, start_B: Array, size: int) -> Array:
    """`size` adjacent rows of each batch entry."""
    return jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, size))(x_BxSx, start_B)
