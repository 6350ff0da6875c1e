"""Perceiver AR (Hawthorne et al., ICML 2022, arXiv 2202.07765) in Flax NNX.

M inputs are read by N latents, the last N positions, in one cross-attention; a causal Transformer over the
latents does the rest. Cost grows with N * M once and with N * N per layer, so M can be long. With N = M and no
dropped prefix it is an ordinary decoder-only Transformer, which is our control.

Dimension key, used as suffixes of names:
    B batch, M inputs (the context), N latents, S rows of the cross-attention (kept prefix + N),
    D width, H query heads, G key/value heads, K head size, F hidden width, V vocabulary, T any length,
    P the two ways to count a position: in tokens and in steps of time.
"""

import dataclasses
import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from music_ar.features import keyboard, retrieval
from music_ar.features.keyboard import Classes, Keyboard
from music_ar.features.retrieval import Recalled
from music_ar.tokens import codec

_TOKENS_A_NOTE = 4  # of MAESTRO, on average


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a Perceiver AR. Saved as JSON beside the weights.

    Attributes:
        context: M, the most input tokens that attention reads.
        latents: N, the most latents it was trained with; N = M makes it a decoder-only Transformer.
        width: D, channels of the residual stream.
        layers: self-attention blocks after the cross-attention.
        heads: H, query heads of every attention.
        kv_heads: G, key/value heads; each serves H / G query heads (grouped-query attention).
        head_size: K, channels of a head.
        hidden: F, channels inside the feed-forward blocks.
        conv_width: taps of the causal depthwise convolution over the embeddings; 1 means none. A note is about
            four tokens, so a key that carries its neighbours is a better key than a bare token.
        onsets: how many of the last note-ons the model is told of at each position, beside the keys that are down (see
            `keyboard`); 0 tells it of neither.
        recall: among how many of the last notes, the newest included, a place like the present one is looked for, to
            tell the model what followed there (see `recall`); 0 tells it of none. It may be far more than the context
            holds.
        time_heads: key/value heads (of G, the last ones) whose rotary positions count time, not tokens.
        cross_depths: further cross-attends, each before the self block of that index; they share the keys and
            values of the first.
        view_size: how many numbers tell the model how a training window was made; see `PerceiverAR.__call__`.
        rotary_fraction: share of each head's channels that is rotated by position.
        rotary_wavelength: longest wavelength of the rotary positions, in tokens.
        vocabulary_size: V, with padding and the two piece boundaries.
    """

    context: int = 4096
    latents: int = 2048
    width: int = 384
    layers: int = 12
    heads: int = 6
    kv_heads: int = 6
    head_size: int = 64
    hidden: int = 1536
    conv_width: int = 1
    onsets: int = 0
    recall: int = 0
    time_heads: int = 0
    cross_depths: tuple[int, ...] = ()
    view_size: int = 0
    rotary_fraction: float = 0.5
    rotary_wavelength: float = 10_000.0
    vocabulary_size: int = codec.VOCABULARY_SIZE

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("onsets", "recall", "time_heads", "view_size") else 1
            if field.type is int and (not isinstance(value, int) or value < least):
                raise ValueError(f"{field.name} must be a whole number of at least {least}, got {value!r}")
        if self.latents > self.context:
            raise ValueError(f"latents must be at most context = {self.context}, got {self.latents}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
        if self.time_heads > self.kv_heads:
            raise ValueError(f"time_heads must be at most kv_heads = {self.kv_heads}, got {self.time_heads}")
        if not 0 <= self.rotary_fraction <= 1 or not self.rotary_wavelength > 0:
            raise ValueError(
                "rotary_fraction must lie in 0..1 and rotary_wavelength above 0, got "
                f"{self.rotary_fraction} and {self.rotary_wavelength}"
            )
        if self.rotary_size % 2:
            raise ValueError(
                "rotary_fraction * head_size must be even, since channels turn in pairs; got "
                f"{self.rotary_fraction} * {self.head_size}"
            )
        if 0 < self.recall < retrieval.LEAST_REACH:
            raise ValueError(f"recall must be 0 or at least {retrieval.LEAST_REACH}, got {self.recall}")
        if any(not 0 <= depth < self.layers for depth in self.cross_depths):
            raise ValueError(f"cross_depths must lie in 0..{self.layers - 1}, got {self.cross_depths}")
        if len(set(self.cross_depths)) < len(self.cross_depths):
            raise ValueError(f"cross_depths must differ, got {self.cross_depths}")

    @property
    def rotary_size(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def window(self) -> int:
        """The inputs that a window for training or scoring holds: what attention reads, or what is recalled from."""
        return max(self.context, _TOKENS_A_NOTE * self.recall)

    def read(self, inputs: int) -> int:
        """Of so many inputs, how many attention reads: with `recall` the last M, without it all."""
        return min(inputs, self.context) if self.recall else inputs

    @property
    def feature_count(self) -> int:
        """Numbers that the model is told at each position beside the token."""
        of_keyboard = keyboard.feature_count(self.onsets) if self.onsets else 0
        return of_keyboard + (retrieval.feature_count() if self.recall else 0)

    def flops_per_target(self, kept_prefix: int) -> float:
        """Floating-point operations of one training step per target token (forward and backward).

        Counts two operations a multiply-add, three passes, causal attention at half of its square, and only
        the work the architecture asks for: what an implementation does on top of it is not credited.

        Args:
            kept_prefix: prefix positions kept after the prefix dropout.
        """
        attention_width = self.heads * self.head_size
        kv_width = 2 * self.kv_heads * self.head_size
        feed_forward = 2 * self.width * self.hidden
        self_block = self.width * (2 * attention_width + kv_width) + feed_forward
        cross_block = 2 * self.width * attention_width + feed_forward
        crosses = 1 + len(self.cross_depths)
        inputs = (kv_width + self.feature_count) * (kept_prefix + self.latents) / self.latents
        head = self.width * self.vocabulary_size
        matrices = self.layers * self_block + crosses * cross_block + self.width * (inputs + self.width) + head
        cross_scores = crosses * 2 * attention_width * (kept_prefix + self.latents / 2)
        self_scores = self.layers * 2 * attention_width * self.latents / 2
        return 6 * (matrices + cross_scores + self_scores)


class Told(NamedTuple):
    """What the model is told at each position beside the token; any leading batch shape.

    Attributes:
        keyboard: after the token.
        recalled: after the token; None if the model recalls nothing.
    """

    keyboard: Keyboard
    recalled: Recalled | None


_SMALL = ModelConfig(
    width=512, layers=8, heads=8, kv_heads=2, hidden=1536, conv_width=8, onsets=8, recall=4096, time_heads=1
)
PRESETS: dict[str, ModelConfig] = {
    # About 22 million parameters, in few layers, since each costs time when decoding.
    "small": _SMALL,
    # About 55 million; `small` can grow into it (see `growth`).
    "medium": dataclasses.replace(_SMALL, width=768, layers=10, heads=12, kv_heads=3, hidden=2048),
    # The control: a decoder-only Transformer of the same size as `small`.
    "small-decoder": dataclasses.replace(_SMALL, context=2048, latents=2048),
    # For tests and first tries on a CPU.
    "tiny": ModelConfig(
        context=64, latents=32, width=32, layers=2, heads=4, kv_heads=2, head_size=8, hidden=64, conv_width=4
    ),
}


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
            tokens_BxT: inputs, left-padded with `codec.PAD`; any T up to what memory allows. Attention reads the last
                M = `config.read(T)` of them; a model that recalls recalls from all.
            latents: N, at most M; default `config.latents`.
            kept_prefix: training only: how many of the M - N prefix positions to keep, drawn anew for each row
                (cross-attend dropout by gather: dropped positions cost nothing). Default: all. Needs `key`.
            dropout: rate of the residual dropout. Needs `key`.
            input_dropout: share of the inputs that are hidden: they are read as `codec.END`, which is never an input
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
            tokens_BxT = jnp.where(hidden_BxT & (tokens_BxT != codec.PAD), codec.END, tokens_BxT)
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
        table_VxD = self.embedding[...].at[codec.PAD].set(0.0).astype(self.dtype)
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
        rows_BxWxD = self.embedding[...][tokens_BxW].astype(self.dtype) * (tokens_BxW != codec.PAD)[..., None]
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
    padding_Bx1 = jnp.sum(tokens_BxM == codec.PAD, axis=1, keepdims=True)  # leading, so positions below it
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
