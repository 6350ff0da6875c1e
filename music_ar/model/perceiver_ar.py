"""Perceiver AR (Hawthorne et al., ICML 2022, arXiv 2202.07765) in Flax NNX.

M inputs are read by N latents, the last N positions, in one cross-attention; a causal Transformer over the latents does
the rest. Cost grows with N * M once and with N * N per layer, so M can be long. With N = M and no dropped prefix it is
an ordinary decoder-only Transformer, which is our control. The dimension key is in `config`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from music_ar.features import categorical, gap, keyboard, notes, retrieval
from music_ar.features.categorical import Categorical
from music_ar.features.gap import Place
from music_ar.features.keyboard import Keyboard
from music_ar.features.notes import Onsets
from music_ar.features.retrieval import Retrieved
from music_ar.model.attention import Block, Matrix, linear
from music_ar.model.config import Compute, ModelConfig
from music_ar.model.context_attention import attend_context
from music_ar.model.transformer_xl import attend_segments
from music_ar.tokens import vocabulary


class Conditioning(NamedTuple):
    """Conditioning features after each token; any leading batch shape.

    Attributes:
        keyboard: the keyboard.
        onsets: the last notes.
        retrieved: what followed the last similar passage; None for a model without retrieval.
        place: where it is in a sequence with a gap; None for a model that cannot fill gaps.
    """

    keyboard: Keyboard
    onsets: Onsets
    retrieved: Retrieved | None
    place: Place | None

    @property
    def time(self) -> Int[Array, "*B"]:
        """Time for rotary positions, in steps."""
        return self.keyboard.time if self.place is None else self.place.time


class FeatureProjection(nnx.Module):
    """A linear map of features into the residual stream, without bias; zero in a new model.

    Args:
        numbers: number of numeric features.
        classes: number of one-hot features after them.
        width: D.
        dtype: of the product.
        rngs: unused by zeros, but part of every initializer.
    """

    def __init__(self, numbers: int, classes: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kernel = Matrix(nnx.initializers.zeros(rngs.params(), (numbers + classes, width)))
        self.numbers, self.dtype = numbers, dtype

    def __call__(self, numbers: Array | None, categories: list[Categorical]) -> Float[Array, "*B D"]:
        """The product of `features` and the kernel."""
        return self.features(numbers, categories).astype(self.dtype) @ self.kernel[...].astype(self.dtype)

    @staticmethod
    def features(numbers: Array | None, categories: list[Categorical]) -> Float[Array, "*B _"]:
        """The numbers, followed by the one-hot encoding of the categories."""
        hot = categorical.one_hot(categories)
        return hot if numbers is None else jnp.concatenate([numbers, hot], axis=-1)


class PerceiverAR(nnx.Module):
    """The model: event tokens in, logits of the next token at the last N positions out.

    Parameters and logits are float32; matrix products run in `compute.dtype`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, compute: Compute = Compute()):
        self.config, self.compute = config, compute
        dtype, width, zeros = self.dtype, config.width, nnx.initializers.zeros
        self.embedding = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (config.vocabulary_size, width)))
        if config.conv_width > 1:
            self.conv = nnx.Param(jnp.zeros((config.conv_width, width)))
        if config.onsets:
            classes = notes.feature_count(config.onsets)
            self.keyboard = FeatureProjection(keyboard.CHANNELS, classes, width, dtype=dtype, rngs=rngs)
        if config.retrieval_notes:
            self.retrieval = FeatureProjection(0, retrieval.feature_count(), width, dtype=dtype, rngs=rngs)
        if config.fills_gaps:
            self.gap = FeatureProjection(0, gap.CLASSES, width, dtype=dtype, rngs=rngs)
        if config.label_size:
            self.label = linear(config.label_size, width, kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.context_norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.latent = linear(width, width, kernel_init=nnx.initializers.lecun_normal(), dtype=dtype, rngs=rngs)
        self.cross = Block(config, compute=compute, rngs=rngs)
        self.blocks = nnx.List([Block(config, compute=compute, rngs=rngs) for _ in range(config.layers)])
        self.final_norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(width, config.vocabulary_size, dtype=dtype, kernel_init=zeros, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """The type of matrix products."""
        return jnp.dtype(self.compute.dtype)

    def __call__(
        self,
        tokens_BxT: Int[Array, "B T"],
        *,
        latents: int | None = None,
        kept_prefix: int | None = None,
        dropout: float = 0.0,
        labels_BxC: Float[Array, "B C"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "B N V"]:
        """Logits of the token that follows each of the last N inputs.

        Args:
            tokens_BxT: inputs, left-padded with `vocabulary.PAD`; any T up to what memory allows. Attention reads the
                last M = `config.attended(T)` of them; retrieval searches all.
            latents: N, at most M; default `config.latents`.
            kept_prefix: training only: number of the M - N prefix positions to keep, drawn independently for each row
                (cross-attend dropout by gather: dropped positions cost nothing). Default: all. Needs `key`.
            dropout: rate of the residual dropout. Needs `key`.
            labels_BxC: training only: how each window was augmented, C = `config.label_size` numbers; all 0, like None,
                means no augmentation. Scoring and generation use none. (Conditioning on the augmentation keeps its
                distribution separate: Jun et al., "Distribution augmentation for generative modeling", 2020.)
            key: random key for the prefix and dropout.

        Returns:
            float32 logits [B, N, V]; row k belongs to input position T - N + k. Rows at padding are meaningless.

        Raises:
            ValueError: `latents` out of range, or randomness without `key`.
        """
        M = self.config.attended(tokens_BxT.shape[1])
        N = min(self.config.latents, M) if latents is None else latents
        if not 1 <= N <= M:
            raise ValueError(f"latents must be in 1..{M}, the number of inputs that attention reads; got {N}")
        if key is None and dropout > 0:
            raise ValueError(f"dropout = {dropout} needs a key")
        prefix_key, dropout_key = (None, None) if key is None else jax.random.split(key)
        drop = nnx.Dropout(dropout, deterministic=key is None, rngs=None if key is None else nnx.Rngs(dropout_key))

        conditioning_BxM, tokens_BxM = self.conditioning(tokens_BxT, M), tokens_BxT[:, -M:]
        rows = _lay_out(tokens_BxM, M if self.config.segment else N, kept_prefix, prefix_key)
        conditioning_BxS = jax.tree.map(lambda leaf: _take(leaf, rows.positions_BxS), conditioning_BxM)
        embedded_BxSxD = self.condition(self._embed_rows(tokens_BxM, rows), conditioning_BxS)
        if labels_BxC is not None:
            embedded_BxSxD = embedded_BxSxD + self.label(labels_BxC.astype(self.dtype))[:, None]
        positions_BxSxP = jnp.stack([rows.positions_BxS, conditioning_BxS.time], axis=-1)

        tower = self._recur if self.config.segment else self._attend
        x_BxNxD = tower(embedded_BxSxD, positions_BxSxP, rows, drop)
        return self.logits(_take(x_BxNxD, rows.right_aligned_BxN)[:, -N:])

    def _attend(
        self, embedded_BxSxD: Array, positions_BxSxP: Array, rows: "_Rows", drop: nnx.Dropout
    ) -> Float[Array, "B N D"]:
        """The cross block, then the self blocks over the latents."""
        N = rows.right_aligned_BxN.shape[1]
        k_BxSxGxK, v_BxSxGxK = self.cross.keys_values(self.context_norm(embedded_BxSxD), positions_BxSxP)
        positions_BxNxP = _slice(positions_BxSxP, rows.prefix_B, N)
        x_BxNxD = self.latent(_slice(embedded_BxSxD, rows.prefix_B, N))
        q_BxNxHxK = self.cross.queries(x_BxNxD, positions_BxNxP)
        attended_BxNxHxK = attend_context(q_BxNxHxK, k_BxSxGxK, v_BxSxGxK, rows.prefix_B, self.compute)
        x_BxNxD = self.cross.add(x_BxNxD, attended_BxNxHxK, drop)
        for block in self.blocks:
            x_BxNxD = block.attend_self(x_BxNxD, positions_BxNxP, drop)
        return x_BxNxD

    def _recur(
        self, embedded_BxMxD: Array, positions_BxMxP: Array, rows: "_Rows", drop: nnx.Dropout
    ) -> Float[Array, "B M D"]:
        """All blocks with segment recurrence; see `transformer_xl`."""
        del rows
        x = self.latent(embedded_BxMxD)
        x = self.cross.add(x, attend_segments(self.cross, x, embedded_BxMxD, self.context_norm, positions_BxMxP), drop)
        for block in self.blocks:
            x = block.add(x, attend_segments(block, x, x, block.attention_norm, positions_BxMxP), drop)
        return x

    def _embed_rows(self, tokens_BxM: Array, rows: "_Rows") -> Float[Array, "B S D"]:
        """Embeddings of the S rows. If none are dropped, tokens are put in order, which is cheaper than embeddings."""
        if rows.positions_BxS.shape == tokens_BxM.shape:
            return self.embed(_take(tokens_BxM, rows.positions_BxS))
        return _take(self.embed(tokens_BxM), rows.positions_BxS)

    def conditioning(self, tokens_BxT: Int[Array, "B T"], last: int) -> Conditioning:
        """Features after each of the last tokens; the keyboard is untouched before the first of them."""
        config, last_BxL = self.config, tokens_BxT[:, -last:]
        found = retrieval.scan_each(tokens_BxT, config.retrieval_notes, last) if config.retrieval_notes else None
        keys = keyboard.scan_each(last_BxL)
        place = gap.scan_each(last_BxL, keys.time) if config.fills_gaps else None
        return Conditioning(keys, notes.scan_each(last_BxL, config.onsets), found, place)

    def condition(self, embedded: Array, conditioning: Conditioning) -> Float[Array, "*B D"]:
        """Embedded tokens with their features added."""
        if self.config.onsets:
            state, onsets = conditioning.keyboard, conditioning.onsets
            features = self.keyboard(keyboard.channels(state), notes.categories(onsets, state.time))
            embedded = embedded + features
        if conditioning.retrieved is not None:
            embedded = embedded + self.retrieval(None, retrieval.categories(conditioning.retrieved))
        if conditioning.place is not None:
            embedded = embedded + self.gap(None, gap.categories(conditioning.place))
        return embedded

    def embed(self, tokens_BxT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings with the causal depthwise convolution over them; padding is zero."""
        x_BxTxD = _look_up(self.embedding[...].at[vocabulary.PAD].set(0.0).astype(self.dtype), tokens_BxT)
        if self.config.conv_width == 1:
            return x_BxTxD
        # XLA would otherwise repeat the look-up for each tap.
        x_BxTxD = jax.lax.optimization_barrier(x_BxTxD)
        taps_WxD = self.conv[...].astype(self.dtype)
        T = x_BxTxD.shape[1]
        padded = jnp.pad(x_BxTxD, ((0, 0), (self.config.conv_width - 1, 0), (0, 0)))
        shifted = (
            padded[:, self.config.conv_width - 1 - back :][:, :T] * taps_WxD[back].reshape(1, 1, -1)
            for back in range(self.config.conv_width)
        )
        return x_BxTxD + sum(shifted)

    def embed_last(self, tokens_BxW: Int[Array, "B W"]) -> Float[Array, "B D"]:
        """`embed` of each row's last token, by look-up, given its latest W = conv_width tokens."""
        rows_BxWxD = self.embedding[...][tokens_BxW].astype(self.dtype) * (tokens_BxW != vocabulary.PAD)[..., None]
        if self.config.conv_width == 1:
            return rows_BxWxD[:, -1]
        taps_WxD = self.conv[...].astype(self.dtype)[::-1]
        return rows_BxWxD[:, -1] + (rows_BxWxD * taps_WxD[None]).sum(axis=1)

    def logits(self, x_BxTxD: Array) -> Float[Array, "B T V"]:
        """float32 logits of the residual stream."""
        return self.head(self.final_norm(x_BxTxD)).astype(jnp.float32)


class _Rows(NamedTuple):
    """The order of the kept inputs in the S rows of the cross-attention: real ones in order, then padding.

    Fused attention takes no mask, but padding that comes last is never seen: the prefix has a length, and a latent does
    not see later ones.

    Attributes:
        positions_BxS: input position of each row.
        prefix_B: how many rows are prefix; the N latents follow.
        right_aligned_BxN: the latents' order with padding back on the left.
    """

    positions_BxS: Array
    prefix_B: Array
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
    padding_Bx1 = jnp.sum(tokens_BxM == vocabulary.PAD, axis=1, keepdims=True)  # it leads, so it is the positions below
    padded_Bx1 = jnp.sum(positions_BxS < padding_Bx1, axis=1, keepdims=True)
    missing_latents_Bx1 = jnp.maximum(padded_Bx1 - kept, 0)
    rows_1xS, latents_1xN = jnp.arange(kept + N)[None], jnp.arange(N)[None]
    return _Rows(
        positions_BxS=_take(positions_BxS, (rows_1xS + padded_Bx1) % (kept + N)),
        prefix_B=jnp.maximum(kept - padded_Bx1, 0)[:, 0],
        right_aligned_BxN=(latents_1xN - missing_latents_Bx1) % N,
    )


@jax.custom_vjp
def _look_up(table_VxD: Array, tokens_BxT: Array) -> Float[Array, "B T D"]:
    """Rows of a table. The gradient is a product with one-hot rows; a scatter would contend for a few hundred rows."""
    return table_VxD[tokens_BxT]


def _look_up_forward(table_VxD: Array, tokens_BxT: Array) -> tuple[Array, tuple[Array, Array]]:
    return table_VxD[tokens_BxT], (table_VxD[:, :0], tokens_BxT)


def _look_up_backward(residuals: tuple[Array, Array], gradient_BxTxD: Array) -> tuple[Array, None]:
    table_Vx0, tokens_BxT = residuals
    one_hot_BxTxV = jax.nn.one_hot(tokens_BxT, table_Vx0.shape[0], dtype=gradient_BxTxD.dtype)
    return jnp.einsum("btv,btd->vd", one_hot_BxTxV, gradient_BxTxD), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def _slice(x_BxSx: Array, start_B: Array, size: int) -> Array:
    """`size` adjacent rows of each batch entry."""
    return jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, size))(x_BxSx, start_B)


def _take(x_BxTx: Array, index_BxR: Array) -> Array:
    """Take rows of each batch entry, none twice, which makes the gradient a plain write instead of an atomic sum."""
    rows = jax.vmap(lambda x, index: x.at[index].get(unique_indices=True, mode="promise_in_bounds"))
    return rows(x_BxTx, index_BxR)


def parameter_count(model: PerceiverAR) -> int:
    """Number of parameters of a model."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
