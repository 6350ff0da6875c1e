"""Perceiver AR (Hawthorne et al., ICML 2022, arXiv 2202.07765) in Flax NNX.

M inputs are read by N latents, the last N positions, in one cross-attention; a causal Transformer over the latents does
the rest. Cost grows with N * M once and with N * N per layer, so M can be long. With N = M and no dropped prefix it is
an ordinary decoder-only Transformer, which is our control. The dimension key is in `config`.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

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
from music_ar.model.context_attention import attend_after, attend_context
from music_ar.model.exits import ExitCosts
from music_ar.model.rows import Rows, lay_out, take, take_slice
from music_ar.model.tape import Halting, Tape, TapeKeys, tape_keys, tape_positions
from music_ar.model.transformer_xl import attend_segments
from music_ar.model.wish_embedding import WishEmbedding

_T = TypeVar("_T")
_OF_LAYERS = 1  # folded into the key of a call to draw layer dropout; all else is drawn from its split


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


class Prediction(NamedTuple):
    """What a model predicts.

    Attributes:
        depths_BxNxV: float32 logits [B, N, V] for each depth; row k belongs to input position T - N + k. Rows at
            padding are meaningless.
        streams_BxNxD: the residual stream that they come from.
        tape: how much of its tape each row read; None for a model without one.
    """

    depths_BxNxV: list[Float[Array, "B N V"]]
    streams_BxNxD: list[Float[Array, "B N D"]]
    tape: Halting | None


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
    """The model: tokens in, logits of the next token at the last N positions out.

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
        if config.wishes is not None:
            self.wishes = WishEmbedding(config.wishes, width)
        self.context_norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.latent = linear(width, width, kernel_init=nnx.initializers.lecun_normal(), dtype=dtype, rngs=rngs)
        self.cross = Block(config, compute=compute, rngs=rngs)
        self.blocks = nnx.List([Block(config, compute=compute, rngs=rngs) for _ in range(config.layers)])
        if config.tape is not None:
            self.tape = Tape(config.tape, width, dtype=dtype, rngs=rngs)
        self.final_norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(width, config.vocabulary_size, dtype=dtype, kernel_init=zeros, rngs=rngs)
        if config.exits:
            self.exit_costs = ExitCosts(width, len(config.exits))

    @property
    def dtype(self) -> jnp.dtype:
        """The type of matrix products."""
        return jnp.dtype(self.compute.dtype)

    def __call__(
        self, tokens_BxT: Int[Array, "B T"], *, layers: int | None = None, **inputs: Any
    ) -> Float[Array, "B N V"]:
        """Logits of the token that follows each of the last N inputs.

        Args:
            tokens_BxT: inputs, left-padded with `config.pad`.
            layers: number of self blocks to run, one of `config.depths`; default: all.
            inputs: further arguments of `predict`.

        Returns:
            float32 logits [B, N, V]; row k belongs to input position T - N + k. Rows at padding are meaningless.
        """
        return self.at_depths(tokens_BxT, depths=(self.config.layers if layers is None else layers,), **inputs)[0]

    def at_depths(self, tokens_BxT: Int[Array, "B T"], **inputs: Any) -> list[Float[Array, "B N V"]]:
        """Logits of `predict`, whose arguments it takes."""
        return self.predict(tokens_BxT, **inputs).depths_BxNxV

    def predict(
        self,
        tokens_BxT: Int[Array, "B T"],
        *,
        depths: tuple[int, ...],
        latents: int | None = None,
        kept_prefix: int | None = None,
        dropout: float = 0.0,
        layer_dropout: float = 0.0,
        labels_BxC: Float[Array, "B C"] | None = None,
        wishes_BxPxW: Int[Array, "B P W"] | None = None,
        key: Array | None = None,
        split_over: str | None = None,
    ) -> Prediction:
        """Logits of the token that follows each of the last N inputs, after several numbers of self blocks.

        Args:
            tokens_BxT: inputs, left-padded with `config.pad`; any T up to what memory allows. Attention reads the
                last M = `config.attended(T)` of them; retrieval searches all.
            depths: rising numbers of self blocks; those after the last of them are not run.
            latents: N, at most M; default `config.latents`.
            kept_prefix: training only: number of the M - N prefix positions to keep, drawn independently for each row
                (cross-attend dropout by gather: dropped positions cost nothing). Default: all. Needs `key`.
            dropout: rate of the residual dropout. Needs `key`.
            layer_dropout: training only: rate at which a row skips the last block; it rises linearly from 0 at the
                first (stochastic depth, Huang et al., arXiv 1603.09382, and LayerSkip, arXiv 2404.16710). Needs `key`.
            labels_BxC: training only: how each window was augmented, C = `config.label_size` numbers; all 0, like None,
                means no augmentation. Scoring and generation use none. (Conditioning on the augmentation keeps its
                distribution separate: Jun et al., "Distribution augmentation for generative modeling", 2020.)
            wishes_BxPxW: ids of the wishes (`features.wishes.WishTable`) of P equal parts of the latents; inputs before
                them have those of the first part. All 0, like None, means none.
            key: random key for the prefix and dropout.
            split_over: mesh axis, inside `jax.shard_map`, over which the prefix is split: each device embeds a share of
                it and has its keys and values. Inputs, latents and logits are the same on all devices of the axis.

        Raises:
            ValueError: `latents` out of range, randomness without `key`, or no prefix to split or one that a tape is
                read from.
        """
        M = self.config.attended(tokens_BxT.shape[1])
        N = min(self.config.latents, M) if latents is None else latents
        if not 1 <= N <= M:
            raise ValueError(f"latents must be in 1..{M}, the number of inputs that attention reads; got {N}")
        for name, rate in (("dropout", dropout), ("layer_dropout", layer_dropout)):
            if key is None and rate > 0:
                raise ValueError(f"{name} = {rate} needs a key")
        prefix_key, dropout_key = (None, None) if key is None else jax.random.split(key)
        drop = nnx.Dropout(dropout, deterministic=key is None, rngs=None if key is None else nnx.Rngs(dropout_key))

        conditioning_BxM, tokens_BxM = self.conditioning(tokens_BxT, M), tokens_BxT[:, -M:]
        rows = lay_out(tokens_BxM == self.config.pad, M if self.config.segment else N, kept_prefix, prefix_key)
        if split_over is not None:
            if self.config.segment or rows.positions_BxS.shape[1] == N:
                raise ValueError(f"there is no prefix to split over devices: all {M} inputs are latents")
            if self.config.tape is not None:
                raise ValueError("a tape is read from the whole prefix, which cannot be split over devices")
            rows = rows.share(split_over)
        conditioning_BxS = jax.tree.map(lambda leaf: take(leaf, rows.positions_BxS), conditioning_BxM)
        embedded_BxSxD = self.condition(self._embed_rows(tokens_BxM, rows), conditioning_BxS)
        if labels_BxC is not None:
            embedded_BxSxD = embedded_BxSxD + self.label(labels_BxC.astype(self.dtype))[:, None]
        if wishes_BxPxW is not None:
            latent_BxS = rows.positions_BxS - (M - N)
            embedded_BxSxD = embedded_BxSxD + self.wishes(wishes_BxPxW, latent_BxS, N).astype(self.dtype)
        positions_BxSxP = jnp.stack([rows.positions_BxS, conditioning_BxS.time], axis=-1)

        tower = self._recur if self.config.segment else self._attend
        kept_LxB = _kept_rows(key, self.config.layers, tokens_BxT.shape[0], layer_dropout) if layer_dropout else None
        streams, tape = tower(embedded_BxSxD, positions_BxSxP, rows, drop, _Depths(depths, kept_LxB))
        streams = [take(x_BxNxD, rows.right_aligned_BxN)[:, -N:] for x_BxNxD in streams]
        return Prediction([self.logits(x_BxNxD) for x_BxNxD in streams], streams, tape)

    def _attend(
        self, embedded_BxSxD: Array, positions_BxSxP: Array, rows: Rows, drop: nnx.Dropout, depths: "_Depths"
    ) -> tuple[list[Float[Array, "B N D"]], Halting | None]:
        """The cross block, then the self blocks over the latents and their tape; the stream at each depth."""
        N = rows.right_aligned_BxN.shape[1]
        k_BxSxGxK, v_BxSxGxK = self.cross.keys_values(self.context_norm(embedded_BxSxD), positions_BxSxP)
        positions_BxNxP = take_slice(positions_BxSxP, rows.latents_B, N)
        x_BxNxD = self.latent(take_slice(embedded_BxSxD, rows.latents_B, N))
        q_BxNxHxK = self.cross.queries(x_BxNxD, positions_BxNxP)
        attended_BxNxHxK = attend_context(q_BxNxHxK, k_BxSxGxK, v_BxSxGxK, rows.prefix_B, self.compute, rows.split_over)
        x_BxNxD = self.cross.add(x_BxNxD, attended_BxNxHxK, drop)
        if self.config.tape is None:
            streams = depths.streams(self.blocks, x_BxNxD, lambda block, x: block.attend_self(x, positions_BxNxP, drop))
            return streams, None
        P = embedded_BxSxD.shape[1] - N
        reading = self.tape(embedded_BxSxD[:, :P], jnp.arange(P)[None] < rows.prefix_B[:, None])
        blocks = list(itertools.islice(self.blocks, depths.depths[-1]))
        positions_BxTxP = tape_positions(positions_BxNxP[:, 0], self.config.tape.tokens)
        tape = tape_keys(reading, blocks, positions_BxTxP, self.compute, drop)

        def attend(block_and_tape: tuple[Block, TapeKeys], x: Array) -> Array:
            block, before = block_and_tape
            q, k, v = block.queries_keys_values(x, positions_BxNxP)
            return block.add(x, attend_after(q, *before, k, v, self.compute), drop)

        return depths.streams(zip(blocks, tape, strict=True), x_BxNxD, attend), reading.halting

    def _recur(
        self, embedded_BxMxD: Array, positions_BxMxP: Array, rows: Rows, drop: nnx.Dropout, depths: "_Depths"
    ) -> tuple[list[Float[Array, "B M D"]], None]:
        """The blocks with segment recurrence; see `transformer_xl`. The stream at each depth."""
        del rows
        x = self.latent(embedded_BxMxD)
        x = self.cross.add(x, attend_segments(self.cross, x, embedded_BxMxD, self.context_norm, positions_BxMxP), drop)

        def recur(block: Block, x: Array) -> Array:
            return block.add(x, attend_segments(block, x, x, block.attention_norm, positions_BxMxP), drop)

        return depths.streams(self.blocks, x, recur), None

    def _embed_rows(self, tokens_BxM: Array, rows: Rows) -> Float[Array, "B S D"]:
        """Embeddings of the S rows. If none are dropped, tokens are put in order, which is cheaper than embeddings."""
        if rows.split_over is not None:
            return self._embed_at(tokens_BxM, rows.positions_BxS)
        if rows.positions_BxS.shape == tokens_BxM.shape:
            return self.embed(take(tokens_BxM, rows.positions_BxS))
        return take(self.embed(tokens_BxM), rows.positions_BxS)

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
        x_BxTxD = _look_up(self.embedding[...].at[self.config.pad].set(0.0).astype(self.dtype), tokens_BxT)
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

    def _embed_at(self, tokens_BxM: Array, positions_BxR: Array) -> Float[Array, "B R D"]:
        """`embed` at some positions only: as many look-ups as the convolution has taps."""
        table_VxD = self.embedding[...].at[self.config.pad].set(0.0).astype(self.dtype)
        padded = jnp.pad(tokens_BxM, ((0, 0), (self.config.conv_width - 1, 0)), constant_values=self.config.pad)

        def look_up(back: Array | int) -> Array:
            return _look_up(table_VxD, take(padded, positions_BxR + self.config.conv_width - 1 - back))

        @jax.checkpoint  # one look-up in memory at a time, also for the gradient
        def add_tap(sum_BxRxD: Array, tap: tuple[Array, Array]) -> tuple[Array, None]:
            back, tap_D = tap
            return sum_BxRxD + look_up(back) * tap_D.reshape(1, 1, -1), None

        x_BxRxD = look_up(0)
        if self.config.conv_width == 1:
            return x_BxRxD
        taps = (jnp.arange(self.config.conv_width), self.conv[...].astype(self.dtype))
        return x_BxRxD + jax.lax.scan(add_tap, jnp.zeros_like(x_BxRxD), taps)[0]

    def embed_last(self, tokens_BxW: Int[Array, "B W"]) -> Float[Array, "B D"]:
        """`embed` of each row's last token, by look-up, given its latest W = conv_width tokens."""
        rows_BxWxD = self.embedding[...][tokens_BxW].astype(self.dtype) * (tokens_BxW != self.config.pad)[..., None]
        if self.config.conv_width == 1:
            return rows_BxWxD[:, -1]
        taps_WxD = self.conv[...].astype(self.dtype)[::-1]
        return rows_BxWxD[:, -1] + (rows_BxWxD * taps_WxD[None]).sum(axis=1)

    def logits(self, x_BxTxD: Array) -> Float[Array, "B T V"]:
        """float32 logits of the residual stream."""
        return self.head(self.final_norm(x_BxTxD)).astype(jnp.float32)

    def leaving_cost(self, x: Float[Array, "*B D"], depth: int) -> Float[Array, "*B"]:
        """The nats that tokens are expected to lose by leaving at an exit, given their residual stream there."""
        return self.exit_costs(self.final_norm(x), self.config.exits.index(depth))


class _Depths(NamedTuple):
    """How far the blocks run.

    Attributes:
        depths: the numbers of blocks after which the stream is read.
        kept_LxB: the rows that each block changes, the others skip it; None means all.
    """

    depths: tuple[int, ...]
    kept_LxB: Array | None

    def streams(self, blocks: Iterable[_T], x_BxNxD: Array, run: Callable[[_T, Array], Array]) -> list[Array]:
        """The residual stream at each depth; `run` applies a block."""
        found = []
        for layer, block in enumerate(itertools.islice(blocks, self.depths[-1])):
            after_BxNxD = run(block, x_BxNxD)
            if self.kept_LxB is not None:
                after_BxNxD = jnp.where(self.kept_LxB[layer][:, None, None], after_BxNxD, x_BxNxD)
            x_BxNxD = after_BxNxD
            if layer + 1 in self.depths:
                found.append(x_BxNxD)
        return found


def _kept_rows(key: Array | None, layers: int, B: int, layer_dropout: float) -> Array:
    """Which rows do not skip each block, drawn with rates that rise linearly from 0 to `layer_dropout`."""
    assert key is not None
    kept_Lx1 = 1 - layer_dropout * jnp.linspace(0.0, 1.0, layers)[:, None]
    return jax.random.bernoulli(jax.random.fold_in(key, _OF_LAYERS), kept_Lx1, (layers, B))


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


def parameter_count(model: nnx.Module) -> int:
    """Number of parameters of a model."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
