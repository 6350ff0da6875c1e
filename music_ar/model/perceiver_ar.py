"""Perceiver AR (Hawthorne et al., ICML 2022, arXiv 2202.07765) in Flax NNX.

M inputs are read by N latents, the last N positions, in one cross-attention; a causal Transformer over the
latents does the rest. Cost grows with N * M once and with N * N per layer, so M can be long. With N = M and no
dropped prefix it is an ordinary decoder-only Transformer, which is our control.

Dimension key, used as suffixes of names:
    B batch, M inputs (the context), N latents, S rows of the cross-attention (kept prefix + N),
    D width, H query heads, G key/value heads, K head size, F hidden width, V vocabulary, T any length,
    P the two ways to count a position: in tokens and in steps of time.
"""

import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from music_ar.features import keyboard, retrieval
from music_ar.features.keyboard import Classes, Keyboard
from music_ar.features.retrieval import Recalled
from music_ar.model.attention import Block, causal_attention, default_dtype
from music_ar.model.config import ModelConfig
from music_ar.tokens import vocabulary


class Told(NamedTuple):
    """What the model is told at each position beside the token; any leading batch shape.

    Attributes:
        keyboard: after the token.
        recalled: after the token; None if the model recalls nothing.
    """

    keyboard: Keyboard
    recalled: Recalled | None


@runtime_checkable
class Gathering(Protocol):
    """A layer that can stand in an `nnx.Linear`'s place and takes classes as they are, not as one-hot numbers."""

    def gather(self, numbers: Array | None, classes: list[Classes]) -> Array:
        """What the linear layer would make of the numbers and, behind them, of `keyboard.one_hot` of the classes."""
        ...


class PerceiverAR(nnx.Module):
    """The model: event tokens in, logits of the next token at the last N positions out.

    Parameters are float32; matrix products run in `dtype` (default: `default_dtype()`), logits are float32.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype | None = None):
        self.config = config
        self.dtype = dtype = jnp.dtype(dtype) if dtype is not None else default_dtype()
        zeros = nnx.initializers.zeros
        self.embedding = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (config.vocabulary_size, config.width)))
        if config.conv_width > 1:
            self.conv = nnx.Param(jnp.zeros((config.conv_width, config.width)))
        if config.onsets:
            self.keyboard = nnx.Linear(
                keyboard.feature_count(config.onsets),
                config.width,
                use_bias=False,
                dtype=dtype,
                kernel_init=zeros,
                rngs=rngs,
            )
        if config.recall:
            self.recall = nnx.Linear(
                retrieval.feature_count(), config.width, use_bias=False, dtype=dtype, kernel_init=zeros, rngs=rngs
            )
        if config.view_size:
            self.view = nnx.Linear(
                config.view_size, config.width, use_bias=False, dtype=dtype, kernel_init=zeros, rngs=rngs
            )
        self.context_norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        self.latent = nnx.Linear(config.width, config.width, use_bias=False, dtype=dtype, rngs=rngs)
        self.cross = Block(config, dtype=dtype, rngs=rngs)
        self.further_crosses = nnx.List(
            [Block(config, own_keys=False, dtype=dtype, rngs=rngs) for _ in config.cross_depths]
        )
        self.blocks = nnx.List([Block(config, dtype=dtype, rngs=rngs) for _ in range(config.layers)])
        self.final_norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(config.width, config.vocabulary_size, dtype=dtype, kernel_init=zeros, rngs=rngs)

    def __call__(
        self,
        tokens_BxT: Int[Array, "B T"],
        *,
        latents: int | None = None,
        kept_prefix: int | None = None,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        view_BxC: Float[Array, "B C"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "B N V"]:
        """Logits of the token that follows each of the last N inputs.

        Args:
            tokens_BxT: inputs, left-padded with `vocabulary.PAD`; any T up to what memory allows. Attention reads the last
                M = `config.read(T)` of them; a model that recalls recalls from all.
            latents: N, at most M; default `config.latents`.
            kept_prefix: training only: how many of the M - N prefix positions to keep, drawn anew for each row
                (cross-attend dropout by gather: dropped positions cost nothing). Default: all. Needs `key`.
            dropout: rate of the residual dropout. Needs `key`.
            input_dropout: share of the inputs that are hidden: they are read as `vocabulary.END`, which is never an input
                otherwise. (As zeros they would do harm: the gradient of a norm at zero is a thousandfold, at each layer
                anew.) Needs `key`.
            view_BxC: training only: how each window differs from music as it is, C = `config.view_size` numbers, all
                0 for not at all, as where None is given. What is made or scored is music as it is. (Telling keeps
                what augmentation adds apart: Jun et al., "Distribution augmentation for generative modeling", 2020.)
            key: randomness for these three.

        Returns:
            float32 logits [B, N, V]; row k belongs to input position T - N + k. Rows at padding mean nothing.
        """
        M = self.config.read(tokens_BxT.shape[1])
        N = min(self.config.latents, M) if latents is None else latents
        if not 1 <= N <= M:
            raise ValueError(f"latents must lie in 1..{M}, the number of inputs that are read; got {N}")
        if key is None and max(dropout, input_dropout) > 0:
            raise ValueError(f"dropout = {dropout} and input_dropout = {input_dropout} need a key")
        prefix_key, dropout_key, input_key = (None, None, None) if key is None else jax.random.split(key, 3)
        drop = nnx.Dropout(dropout, deterministic=key is None, rngs=None if key is None else nnx.Rngs(dropout_key))

        if input_key is not None and input_dropout > 0:
            hidden_BxT = jax.random.bernoulli(input_key, input_dropout, tokens_BxT.shape)
            tokens_BxT = jnp.where(hidden_BxT & (tokens_BxT != vocabulary.PAD), vocabulary.END, tokens_BxT)
        told_BxM, tokens_BxM = self.told(tokens_BxT, M), tokens_BxT[:, -M:]
        rows = _lay_out(tokens_BxM, N, kept_prefix, prefix_key)
        told_BxS = jax.tree.map(lambda leaf: _take(leaf, rows.positions_BxS), told_BxM)
        embedded_BxSxD = self.tell(_take(self.embed(tokens_BxM), rows.positions_BxS), told_BxS)
        if view_BxC is not None:
            embedded_BxSxD = embedded_BxSxD + self.view(view_BxC.astype(self.dtype))[:, None]
        positions_BxSxP = jnp.stack([rows.positions_BxS, told_BxS.keyboard.step], axis=-1)

        k, v = self.cross.keys_values(self.context_norm(embedded_BxSxD), positions_BxSxP)
        positions_BxNxP = _take(positions_BxSxP, rows.latent_BxN)
        x_BxNxD = self.latent(_take(embedded_BxSxD, rows.latent_BxN))
        x_BxNxD = _attend_context(self.cross, x_BxNxD, positions_BxNxP, rows, k, v, drop)
        further = dict(zip(self.config.cross_depths, self.further_crosses, strict=True))
        for depth, block in enumerate(self.blocks):
            if depth in further:
                x_BxNxD = _attend_context(further[depth], x_BxNxD, positions_BxNxP, rows, k, v, drop)
            x_BxNxD = block.attend_self(x_BxNxD, positions_BxNxP, drop)
        return self.logits(_take(x_BxNxD, rows.right_aligned_BxN))

    def told(self, tokens_BxT: Int[Array, "B T"], last: int) -> Told:
        """What the model is told after each of the last tokens; the keyboard is untouched before the first of them."""
        recalled = retrieval.after_each(tokens_BxT, self.config.recall, jnp, last=last) if self.config.recall else None
        return Told(keyboard.after_each(tokens_BxT[:, -last:], self.config.onsets, jnp), recalled)

    def tell(self, embedded: Array, told: Told) -> Float[Array, "*B D"]:
        """Embedded tokens with what the model is told beside them."""
        if self.config.onsets:
            numbers, classes = keyboard.channels(told.keyboard, jnp), keyboard.classes(told.keyboard, jnp)
            embedded = embedded + self._read(self.keyboard, numbers, classes)
        if told.recalled is not None:
            embedded = embedded + self._read(self.recall, None, retrieval.classes(told.recalled, jnp))
        return embedded

    def _read(self, layer: nnx.Linear | Gathering, numbers: Array | None, classes: list[Classes]) -> Array:
        """What a layer, or one that gathers in its place, makes of numbers and of classes."""
        if isinstance(layer, Gathering):
            return layer.gather(numbers, classes).astype(self.dtype)
        hot = keyboard.one_hot(classes, jnp)
        return layer((hot if numbers is None else jnp.concatenate([numbers, hot], axis=-1)).astype(self.dtype))

    def embed(self, tokens_BxT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings with the causal depthwise convolution over them; padding is zero.

        The look-up is a product with one-hot rows: exact, and its gradient is a product too, where a gather's
        would be a scatter into 391 crowded rows.
        """
        one_hot_BxTxV = jax.nn.one_hot(tokens_BxT, self.config.vocabulary_size, dtype=self.dtype)
        table_VxD = self.embedding[...].at[vocabulary.PAD].set(0.0).astype(self.dtype)
        x_BxTxD = one_hot_BxTxV @ table_VxD
        if self.config.conv_width == 1:
            return x_BxTxD
        taps_WxD = self.conv[...].astype(self.dtype)
        T = x_BxTxD.shape[1]
        padded = jnp.pad(x_BxTxD, ((0, 0), (self.config.conv_width - 1, 0), (0, 0)))
        shifted = (
            padded[:, self.config.conv_width - 1 - back :][:, :T] * taps_WxD[back].reshape(1, 1, -1)
            for back in range(self.config.conv_width)
        )
        return x_BxTxD + sum(shifted)

    def embed_last(self, tokens_BxW: Int[Array, "B W"]) -> Float[Array, "B D"]:
        """What `embed` gives for the last of a row's most recent W = conv_width tokens."""
        rows_BxWxD = self.embedding[...][tokens_BxW].astype(self.dtype) * (tokens_BxW != vocabulary.PAD)[..., None]
        if self.config.conv_width == 1:
            return rows_BxWxD[:, -1]
        taps_WxD = self.conv[...].astype(self.dtype)[::-1]
        return rows_BxWxD[:, -1] + (rows_BxWxD * taps_WxD[None]).sum(axis=1)

    def logits(self, x_BxTxD: Array) -> Float[Array, "B T V"]:
        """float32 logits of the residual stream."""
        return self.head(self.final_norm(x_BxTxD)).astype(jnp.float32)


class _Rows(NamedTuple):
    """How the kept inputs lie in the S rows of the cross-attention.

    Real inputs come first, in order; padding is moved to the end. Fused causal attention takes no mask, but
    a row never sees later rows, so padding at the end is never seen.

    Attributes:
        positions_BxS: input position of each row.
        latent_BxN: the rows of the latents, real ones first.
        right_aligned_BxN: the latents' order with padding back on the left.
    """

    positions_BxS: Array
    latent_BxN: Array
    right_aligned_BxN: Array


def _lay_out(tokens_BxM: Array, N: int, kept_prefix: int | None, key: Array | None) -> _Rows:
    B, M = tokens_BxM.shape
    prefix = M - N
    kept = prefix if kept_prefix is None else min(kept_prefix, prefix)
    positions_BxS = jnp.broadcast_to(jnp.arange(M), (B, M))
    if kept < prefix:
        if key is None:
            raise ValueError(f"kept_prefix = {kept_prefix} drops positions at random and needs a key")
        chance_BxP = jax.random.uniform(key, (B, prefix))
        chosen_BxP = jnp.sort(jnp.argsort(chance_BxP, axis=1)[:, :kept], axis=1)
        positions_BxS = jnp.concatenate([chosen_BxP, positions_BxS[:, prefix:]], axis=1)
    padding_Bx1 = jnp.sum(tokens_BxM == vocabulary.PAD, axis=1, keepdims=True)  # leading, so positions below it
    padded_Bx1 = jnp.sum(positions_BxS < padding_Bx1, axis=1, keepdims=True)
    first_latent_Bx1 = jnp.maximum(kept - padded_Bx1, 0)
    missing_latents_Bx1 = jnp.maximum(padded_Bx1 - kept, 0)
    rows_1xS, latents_1xN = jnp.arange(kept + N)[None], jnp.arange(N)[None]
    return _Rows(
        positions_BxS=_take(positions_BxS, (rows_1xS + padded_Bx1) % (kept + N)),
        latent_BxN=first_latent_Bx1 + latents_1xN,
        right_aligned_BxN=(latents_1xN - missing_latents_Bx1) % N,
    )


def _take(x_BxTx: Array, index_BxR: Array) -> Array:
    """Rows of each batch entry, none twice (which makes the gradient a plain write, not an atomic sum)."""
    rows = jax.vmap(lambda x, index: x.at[index].get(unique_indices=True, mode="promise_in_bounds"))
    return rows(x_BxTx, index_BxR)


def _put(x_BxNx: Array, index_BxN: Array, size: int) -> Array:
    """The inverse of `_take`: rows into zeros [B, size, ...]."""
    zeros = jnp.zeros((x_BxNx.shape[0], size, *x_BxNx.shape[2:]), x_BxNx.dtype)
    rows = jax.vmap(lambda z, index, x: z.at[index].set(x, unique_indices=True, mode="promise_in_bounds"))
    return rows(zeros, index_BxN, x_BxNx)


def _attend_context(
    block: Block, x_BxNxD: Array, positions_BxNxP: Array, rows: _Rows, k: Array, v: Array, dropout: nnx.Dropout
) -> Array:
    """A cross block: the latents' queries are put among the S rows, so that attention is square and causal."""
    q_BxSxHxK = _put(block.queries(x_BxNxD, positions_BxNxP), rows.latent_BxN, k.shape[1])
    return block.add(x_BxNxD, _take(causal_attention(q_BxSxHxK, k, v), rows.latent_BxN), dropout)


def parameter_count(model: PerceiverAR) -> int:
    """Number of parameters of a model."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
