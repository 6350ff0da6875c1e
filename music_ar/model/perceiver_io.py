"""Perceiver IO (Jaegle et al., arXiv 2107.14795) in Flax NNX: any inputs, read by a few latents, give any outputs.

N learned latents read M inputs by cross-attention, self-attention blocks work on the latents, and each output is read
from them by a query of its own. Cost grows with N * M, N * N and N * Q. With several reads, the latents go back to the
inputs after each group of blocks, as in Perceiver (Jaegle et al., arXiv 2103.03206). Nothing here knows an order:
inputs and queries say in their channels where they are.

Dimension key, in addition to that of `config`: C channels of an input, Q queries, R channels of a query, O channels of
an output.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from music_ar.model.attention import Block, Matrix, linear, split_heads
from music_ar.model.config import Compute, ModelConfig
from music_ar.ranges import check_ranges, number, whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceiverIOConfig:
    """Sizes of a Perceiver IO. Saved as JSON next to the weights.

    Attributes:
        inputs: C, channels of each input.
        queries: R, channels of each output query.
        outputs: O, channels of each output.
        latents: N, number of latents.
        width: D, channels of a latent.
        layers: self-attention blocks after each read of the inputs.
        reads: how often the latents read the inputs: once in Perceiver IO, more often in Perceiver.
        shared: whether all reads after the first, and the blocks after them, have the same weights, as in Perceiver.
        heads: H, query heads of every attention.
        kv_heads: G, key/value heads; each serves H / G query heads.
        head_size: K, channels of a head.
        hidden: F, channels inside the feed-forward blocks.
        latent_scale: standard deviation of the latents in a new model.

    Raises:
        ValueError: a size out of range, or sizes that do not fit together.
    """

    inputs: int = whole(64, 1, 2**16)
    queries: int = whole(64, 1, 2**16)
    outputs: int = whole(64, 1, 2**16)
    latents: int = whole(256, 1, 2**16)
    width: int = whole(256, 1, 2**16)
    layers: int = whole(6, 0, 1000)
    reads: int = whole(1, 1, 100)
    shared: bool = False
    heads: int = whole(4, 1, 1000)
    kv_heads: int = whole(4, 1, 1000)
    head_size: int = whole(64, 1, 2**12)
    hidden: int = whole(1024, 1, 2**18)
    latent_scale: float = number(0.5, least=0, most=100)

    def __post_init__(self) -> None:
        check_ranges(self, ValueError)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")

    @property
    def block(self) -> ModelConfig:
        """Sizes of each block, whose attention knows no positions."""
        sizes = {name: getattr(self, name) for name in ("width", "heads", "kv_heads", "head_size", "hidden")}
        return ModelConfig(**sizes, rotary_fraction=0.0)


class OpenBlock(Block):
    """A `Block` whose attention sees every key that a mask allows, wherever it is. It does not begin as the identity.

    The output of the attention begins at random: if no latent depended on the inputs at first, pieces could not be told
    apart, and a contrastive loss would have no gradient.
    """

    def __init__(self, config: ModelConfig, *, compute: Compute, rngs: nnx.Rngs):
        super().__init__(config, compute=compute, rngs=rngs)
        shape = self.output.kernel.shape
        self.output.kernel = Matrix(nnx.initializers.lecun_normal()(rngs.params(), shape))

    def attend(
        self, x_BxTxD: Array, read_BxSxD: Array, mask_BxS: Array | None, dropout: nnx.Dropout
    ) -> Float[Array, "B T D"]:
        """Apply the whole block.

        Args:
            x_BxTxD: the residual stream.
            read_BxSxD: what keys and values are made of, normalized.
            mask_BxS: which of these are seen; None for all.
            dropout: of the block's outputs.
        """
        G = self.config.kv_heads
        q = self.query_norm(split_heads(self.query(self.attention_norm(x_BxTxD)), self.config.heads))
        k = self.key_norm(split_heads(self.key(read_BxSxD), G))
        v = split_heads(self.value(read_BxSxD), G)
        mask = None if mask_BxS is None else mask_BxS[:, None, None, :]
        return self.add(x_BxTxD, jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla"), dropout)


class PerceiverIO(nnx.Module):
    """A Perceiver IO; see the module.

    Args:
        config: the sizes.
        rngs: draws the initial weights.
        compute: how it computes. Attention is always plain operations: its scores take N * M numbers.
    """

    def __init__(self, config: PerceiverIOConfig, *, rngs: nnx.Rngs, compute: Compute = Compute()):
        self.config, self.compute = config, compute
        dtype, D = jnp.dtype(compute.dtype), config.width

        def project(inputs: int, outputs: int, dtype: jnp.dtype = dtype) -> nnx.Linear:
            return linear(inputs, outputs, kernel_init=nnx.initializers.lecun_normal(), dtype=dtype, rngs=rngs)

        def norm() -> nnx.RMSNorm:
            return nnx.RMSNorm(D, dtype=dtype, rngs=rngs)

        def block() -> OpenBlock:
            return OpenBlock(config.block, compute=compute, rngs=rngs)

        groups = min(config.reads, 2) if config.shared else config.reads
        draw = nnx.initializers.normal(config.latent_scale)
        self.latents = nnx.Param(draw(rngs.params(), (config.latents, D)))
        self.input = project(config.inputs, D)
        self.input_norm = norm()
        self.cross = nnx.List([block() for _ in range(groups)])
        self.blocks = nnx.List([nnx.List([block() for _ in range(config.layers)]) for _ in range(groups)])
        self.latent_norm = norm()
        self.query = project(config.queries, D)
        self.decoder = block()
        self.output_norm = norm()
        self.head = project(D, config.outputs, jnp.dtype(jnp.float32))

    def encode(
        self,
        inputs_BxMxC: Float[Array, "B M C"],
        mask_BxM: Bool[Array, "B M"],
        dropout: nnx.Dropout | None = None,
    ) -> Float[Array, "B N D"]:
        """Read inputs into latents, normalized.

        Args:
            inputs_BxMxC: the inputs, in any order.
            mask_BxM: which of them are there; at least one of each row.
            dropout: of the output of every block; default: none.
        """
        dropout = dropout or _no_dropout()
        read_BxMxD = self.input_norm(self.input(inputs_BxMxC))
        x_BxNxD = jnp.broadcast_to(self.latents[...], (len(inputs_BxMxC), *self.latents.shape))
        x_BxNxD = x_BxNxD.astype(read_BxMxD.dtype)
        for read in range(self.config.reads):
            group = min(read, len(self.cross) - 1)
            x_BxNxD = self.cross[group].attend(x_BxNxD, read_BxMxD, mask_BxM, dropout)
            for block in self.blocks[group]:
                x_BxNxD = block.attend(x_BxNxD, block.attention_norm(x_BxNxD), None, dropout)
        return self.latent_norm(x_BxNxD)

    def decode(
        self,
        latents_BxNxD: Float[Array, "B N D"],
        queries_BxQxR: Float[Array, "B Q R"],
        dropout: nnx.Dropout | None = None,
    ) -> Float[Array, "B Q O"]:
        """Read outputs from the latents, one for each query; float32. Queries do not see each other."""
        x_BxQxD = self.decoder.attend(self.query(queries_BxQxR), latents_BxNxD, None, dropout or _no_dropout())
        return self.head(self.output_norm(x_BxQxD))

    def __call__(
        self, inputs_BxMxC: Array, mask_BxM: Array, queries_BxQxR: Array, dropout: nnx.Dropout | None = None
    ) -> Float[Array, "B Q O"]:
        """The outputs of inputs; see `encode` and `decode`."""
        return self.decode(self.encode(inputs_BxMxC, mask_BxM, dropout), queries_BxQxR, dropout)


def _no_dropout() -> nnx.Dropout:
    return nnx.Dropout(0.0, deterministic=True)
