"""Rotary positions, causal attention and the Transformer block. The dimension key is in `config`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from music_ar.model.config import Compute, ModelConfig


class Matrix(nnx.Param):
    """A hidden matrix: rows and columns are features. The optimizer selects these by type (Muon)."""


def linear(inputs: int, outputs: int, *, kernel_init: nnx.Initializer, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer without bias whose kernel is a `Matrix`."""
    layer = nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, kernel_init=kernel_init, rngs=rngs)
    layer.kernel = Matrix(layer.kernel[...])
    return layer


def rotate(
    x_BxTxHxK: Array, positions_BxTxP: Array, *, heads: tuple[int, ...], size: int, wavelength: float
) -> Float[Array, "B T H K"]:
    """Rotary positions (Su et al., arXiv 2104.09864) on the first `size` channels of each head.

    Args:
        x_BxTxHxK: queries or keys.
        positions_BxTxP: position of each, counted in P ways.
        heads: lengths of runs of adjacent heads; the runs use the P ways in turn.
        size: channels that rotate.
        wavelength: the longest, in units of the position.
    """
    half = size // 2
    angle_BxTxPxR = rotary_angles(positions_BxTxP, size=size, wavelength=wavelength)
    ways = positions_BxTxP.shape[-1]

    def of_heads(table_BxTxPxR: Array) -> Array:
        """A row for each head, or one for all."""
        if ways == 1:
            return table_BxTxPxR
        runs = [(table_BxTxPxR[:, :, number % ways], count) for number, count in enumerate(heads)]
        B, T, _, R = table_BxTxPxR.shape
        return jnp.concatenate([jnp.broadcast_to(row[:, :, None], (B, T, count, R)) for row, count in runs], axis=2)

    cos, sin = of_heads(jnp.cos(angle_BxTxPxR)), of_heads(jnp.sin(angle_BxTxPxR))
    first, second, rest = jnp.split(x_BxTxHxK, [half, size], axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([*(part.astype(x_BxTxHxK.dtype) for part in rotated), rest], axis=-1)


def rotary_angles(positions: Int[Array, "*B P"], *, size: int, wavelength: float) -> Float[Array, "*B P R"]:
    """Rotation angles of R = `size` / 2 channel pairs; see `rotate`."""
    rate_R = wavelength ** -jnp.linspace(0.0, 1.0, size // 2, dtype=jnp.float32)
    return positions[..., None].astype(jnp.float32) * rate_R.reshape((1,) * positions.ndim + (-1,))


def rotate_heads(config: ModelConfig, x_BxTxHxK: Array, positions_BxTxP: Array, runs: tuple[int, ...]) -> Array:
    """`rotate` with a model's sizes; see `head_runs`."""
    if config.time_heads == 0:
        positions_BxTxP = positions_BxTxP[..., :1]
    return rotate(x_BxTxHxK, positions_BxTxP, heads=runs, size=config.rotary_size, wavelength=config.rotary_wavelength)


def head_runs(config: ModelConfig, heads: int) -> tuple[int, int]:
    """Number of heads, out of `heads`, that count positions in tokens, and number that count them in time."""
    by_time = heads // config.kv_heads * config.time_heads
    return (heads - by_time, by_time)


def split_heads(x_BxTxC: Array, heads: int) -> Array:
    """Split channels into heads: [B, T, H, K]."""
    return x_BxTxC.reshape(*x_BxTxC.shape[:-1], heads, -1)


def causal_attention(q_BxTxHxK: Array, k_BxTxGxK: Array, v_BxTxGxK: Array, compute: Compute = Compute()) -> Array:
    """Square causal attention: row i sees rows 0..i."""
    return jax.nn.dot_product_attention(
        q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, is_causal=True, implementation=compute.attention
    )


class AttentionInputs(nnx.Module):
    """Queries, keys and values of a block. Abstract: subclasses provide the layers."""

    config: ModelConfig
    attention_norm: Any
    query: Any
    query_norm: Any
    key: Any
    key_norm: Any
    value: Any

    def queries(self, x_BxTxD: Array, positions_BxTxP: Array) -> Float[Array, "B T H K"]:
        """Normalized, rotated queries of the residual stream."""
        heads = self.config.heads
        q = self.query_norm(split_heads(self.query(self.attention_norm(x_BxTxD)), heads))
        return rotate_heads(self.config, q, positions_BxTxP, head_runs(self.config, heads))

    def keys_values(self, normed_BxTxD: Array, positions_BxTxP: Array) -> tuple[Array, Array]:
        """Normalized, rotated keys, and values, both [B, T, G, K], of a normalized input."""
        G = self.config.kv_heads
        k = self.key_norm(split_heads(self.key(normed_BxTxD), G))
        k = rotate_heads(self.config, k, positions_BxTxP, head_runs(self.config, G))
        return k, split_heads(self.value(normed_BxTxD), G)


class Block(AttentionInputs):
    """Attention and feed-forward, pre-norm, each added to the residual stream.

    Queries come from the stream. The caller chooses where keys and values come from: the stream itself in a self block,
    the context in a cross block. RMSNorm before both parts, query-key normalization, squared ReLU, no biases. The
    projections back into the stream start at zero, so a new block is the identity.
    """

    def __init__(self, config: ModelConfig, *, compute: Compute, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        dtype = jnp.dtype(compute.dtype)

        def project(inputs: int, outputs: int, init: nnx.Initializer) -> nnx.Linear:
            return linear(inputs, outputs, kernel_init=init, dtype=dtype, rngs=rngs)

        def norm(channels: int) -> nnx.RMSNorm:
            return nnx.RMSNorm(channels, dtype=dtype, rngs=rngs)

        init, zeros = nnx.initializers.lecun_normal(), nnx.initializers.zeros
        kv_width = config.kv_heads * config.head_size
        self.attention_norm = norm(config.width)
        self.query = project(config.width, config.heads * config.head_size, init)
        self.query_norm = norm(config.head_size)
        self.key = project(config.width, kv_width, init)
        self.key_norm = norm(config.head_size)
        self.value = project(config.width, kv_width, init)
        self.output = project(config.heads * config.head_size, config.width, zeros)
        self.feed_forward_norm = norm(config.width)
        self.expand = project(config.width, config.hidden, init)
        self.contract = project(config.hidden, config.width, zeros)

    def add(self, x_BxTxD: Array, attended_BxTxHxK: Array, dropout: nnx.Dropout) -> Float[Array, "B T D"]:
        """Add the attention output, then the feed-forward of the sum, to the stream."""
        x_BxTxD = x_BxTxD + dropout(self.output(attended_BxTxHxK.reshape(*x_BxTxD.shape[:-1], -1)))
        hidden_BxTxF = jnp.square(jax.nn.relu(self.expand(self.feed_forward_norm(x_BxTxD))))
        return x_BxTxD + dropout(self.contract(hidden_BxTxF))

    def queries_keys_values(self, x_BxTxD: Array, positions_BxTxP: Array) -> tuple[Array, Array, Array]:
        """Normalized, rotated queries and keys, and values, of the residual stream."""
        k, v = self.keys_values(self.attention_norm(x_BxTxD), positions_BxTxP)
        return self.queries(x_BxTxD, positions_BxTxP), k, v

    def attend_self(self, x_BxTxD: Array, positions_BxTxP: Array, dropout: nnx.Dropout) -> Float[Array, "B T D"]:
        """Apply the whole block, with causal self-attention."""
        q, k, v = self.queries_keys_values(x_BxTxD, positions_BxTxP)
        return self.add(x_BxTxD, causal_attention(q, k, v, self.compute), dropout)
