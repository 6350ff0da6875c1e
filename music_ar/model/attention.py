"""Rotary positions, causal attention and the Transformer block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from music_ar.model.config import ModelConfig


def default_dtype() -> jnp.dtype:
    """The type to compute in on this machine: bfloat16 on GPU and TPU, float32 on CPU."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def rotate(
    x_BxTxHxK: Array, positions_BxTxP: Array, *, heads: tuple[int, ...], size: int, wavelength: float
) -> Float[Array, "B T H K"]:
    """Rotary positions (Su et al., arXiv 2104.09864) on the first `size` channels of each head.

    Args:
        x_BxTxHxK: queries or keys.
        positions_BxTxP: P ways to count the position of each.
        heads: for each run of neighbouring heads in turn, how many they are. Runs take the P ways in turn.
        size: channels that turn.
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
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([*(part.astype(x_BxTxHxK.dtype) for part in turned), rest], axis=-1)


def rotary_angles(positions: Int[Array, "*B P"], *, size: int, wavelength: float) -> Float[Array, "*B P R"]:
    """By how much each of R = `size` / 2 pairs of channels turns; see `rotate`."""
    rate_R = wavelength ** -jnp.linspace(0.0, 1.0, size // 2, dtype=jnp.float32)
    return positions[..., None].astype(jnp.float32) * rate_R.reshape((1,) * positions.ndim + (-1,))


def causal_attention(q_BxTxHxK: Array, k_BxTxGxK: Array, v_BxTxGxK: Array) -> Array:
    """Square causal attention: row i sees rows 0..i. Fused (cuDNN) for bfloat16 on a GPU."""
    fused = jax.default_backend() == "gpu" and q_BxTxHxK.dtype == jnp.bfloat16
    return jax.nn.dot_product_attention(
        q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, is_causal=True, implementation="cudnn" if fused else "xla"
    )


class Block(nnx.Module):
    """Attention and feed-forward, pre-norm, each added to the residual stream.

    Queries come from the stream; what keys and values come from is the caller's: the stream itself in a self
    block, the context in a cross block. RMSNorm before each, query-key normalisation, squared ReLU, no biases;
    the projections back into the stream start at zero, so a new block is the identity.
    """

    def __init__(self, config: ModelConfig, *, own_keys: bool = True, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config

        def linear(inputs: int, outputs: int, init: nnx.Initializer) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)

        def norm(channels: int) -> nnx.RMSNorm:
            return nnx.RMSNorm(channels, dtype=dtype, rngs=rngs)

        init, zeros = nnx.initializers.lecun_normal(), nnx.initializers.zeros
        kv_width = config.kv_heads * config.head_size
        self.attention_norm = norm(config.width)
        self.query = linear(config.width, config.heads * config.head_size, init)
        self.query_norm = norm(config.head_size)
        if own_keys:
            self.key = linear(config.width, kv_width, init)
            self.key_norm = norm(config.head_size)
            self.value = linear(config.width, kv_width, init)
        self.output = linear(config.heads * config.head_size, config.width, zeros)
        self.feed_forward_norm = norm(config.width)
        self.expand = linear(config.width, config.hidden, init)
        self.contract = linear(config.hidden, config.width, zeros)
        self.joined: _Joined | None = nnx.data(None)

    def join(self) -> None:
        """Puts query, key and value of a self block into one matrix: for decoding, where each operation costs time."""
        self.joined = nnx.data(_Joined(self))
        del self.query, self.key, self.value, self.query_norm, self.key_norm

    def queries(self, x_BxTxD: Array, positions_BxTxP: Array) -> Float[Array, "B T H K"]:
        """Normalised, rotated queries of the residual stream."""
        q = self._heads(self.query(self.attention_norm(x_BxTxD)), self.config.heads)
        return self._rotate(self.query_norm(q), positions_BxTxP, self._runs(self.config.heads))

    def keys_values(self, normed_BxTxD: Array, positions_BxTxP: Array) -> tuple[Array, Array]:
        """Normalised, rotated keys, and values, both [B, T, G, K], of an already normalised input."""
        G = self.config.kv_heads
        k = self.key_norm(self._heads(self.key(normed_BxTxD), G))
        return self._rotate(k, positions_BxTxP, self._runs(G)), self._heads(self.value(normed_BxTxD), G)

    def queries_keys_values(self, x_BxTxD: Array, positions_BxTxP: Array) -> tuple[Array, Array, Array]:
        """All three of the residual stream itself, as a self block takes them."""
        if self.joined is None:
            k, v = self.keys_values(self.attention_norm(x_BxTxD), positions_BxTxP)
            return self.queries(x_BxTxD, positions_BxTxP), k, v
        H, G = self.config.heads, self.config.kv_heads
        qkv = self._heads(self.joined.projection(self.attention_norm(x_BxTxD)), H + 2 * G)
        qk, v = qkv[..., : H + G, :], qkv[..., H + G :, :]
        turned = self._rotate(self.joined.norm(qk), positions_BxTxP, self._runs(H) + self._runs(G))
        return turned[..., :H, :], turned[..., H:, :], v

    def add(self, x_BxTxD: Array, attended_BxTxHxK: Array, dropout: nnx.Dropout) -> Float[Array, "B T D"]:
        """Adds what attention found, then the feed-forward of the sum, to the stream."""
        x_BxTxD = x_BxTxD + dropout(self.output(attended_BxTxHxK.reshape(*x_BxTxD.shape[:-1], -1)))
        hidden_BxTxF = jnp.square(jax.nn.relu(self.expand(self.feed_forward_norm(x_BxTxD))))
        return x_BxTxD + dropout(self.contract(hidden_BxTxF))

    def attend_self(self, x_BxTxD: Array, positions_BxTxP: Array, dropout: nnx.Dropout) -> Float[Array, "B T D"]:
        """The whole block as causal self-attention."""
        return self.add(x_BxTxD, causal_attention(*self.queries_keys_values(x_BxTxD, positions_BxTxP)), dropout)

    @staticmethod
    def _heads(x_BxTxC: Array, heads: int) -> Array:
        return x_BxTxC.reshape(*x_BxTxC.shape[:-1], heads, -1)

    def _runs(self, heads: int) -> tuple[int, ...]:
        """Of `heads` heads, how many count their positions in tokens, and how many in time."""
        by_time = heads // self.config.kv_heads * self.config.time_heads
        return (heads - by_time, by_time)

    def _rotate(self, x_BxTxHxK: Array, positions_BxTxP: Array, runs: tuple[int, ...]) -> Array:
        config = self.config
        if config.time_heads == 0:
            positions_BxTxP = positions_BxTxP[..., :1]
        return rotate(
            x_BxTxHxK, positions_BxTxP, heads=runs, size=config.rotary_size, wavelength=config.rotary_wavelength
        )


class _Joined(nnx.Module):
    """What makes queries, keys and values of a self block in one go: one matrix, and one normalisation of q and k."""

    def __init__(self, block: Block):
        config, dtype = block.config, block.query.dtype
        kernel = jnp.concatenate([layer.kernel[...] for layer in (block.query, block.key, block.value)], axis=1)
        self.projection = nnx.Linear(
            *kernel.shape, use_bias=False, dtype=dtype, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0)
        )
        self.projection.kernel[...] = kernel
        rows = []
        for norm, heads in ((block.query_norm, config.heads), (block.key_norm, config.kv_heads)):
            assert norm.scale is not None
            rows.append(jnp.tile(norm.scale[...], (1, 1, heads, 1)))
        self.scale_1x1xHxK = nnx.Param(jnp.concatenate(rows, axis=2))
        self.plain_norm = nnx.RMSNorm(config.head_size, use_scale=False, dtype=jnp.float32, rngs=nnx.Rngs(0))
        self.dtype = dtype

    def norm(self, qk_BxTxHxK: Array) -> Array:
        """Query-key normalisation of H query and key heads, each with its scale."""
        return (self.plain_norm(qk_BxTxHxK) * self.scale_1x1xHxK[...]).astype(self.dtype)
