"""The model's blocks and linear layers, in forms that decode fast.

`DecodingModel` uses them in place of the model's own. Queries, keys and values of a self block come from one fused
projection, since each operation costs time when decoding. The backend chooses the form of the linear layers.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from music_ar.features.categorical import Categorical
from music_ar.model.attention import AttentionInputs, Block, head_runs, rotate_heads, split_heads
from music_ar.model.perceiver_ar import FeatureProjection, PerceiverAR


@runtime_checkable
class Forms(Protocol):
    """Constructors of linear layers in one form."""

    def linear(self, layer: nnx.Linear) -> Any:
        """A linear layer."""
        ...

    def normed(self, norm: nnx.RMSNorm, layer: nnx.Linear) -> Any:
        """RMSNorm and the linear layer after it."""
        ...

    def features(self, layer: FeatureProjection) -> Any:
        """A projection of features."""
        ...


class PlainForms:
    """Linear layers as the model has them."""

    def linear(self, layer: nnx.Linear) -> nnx.Linear:
        """The layer itself."""
        return layer

    def normed(self, norm: nnx.RMSNorm, layer: nnx.Linear) -> "NormThenLinear":
        """The norm, then the layer."""
        return NormThenLinear(norm, layer)

    def features(self, layer: FeatureProjection) -> FeatureProjection:
        """The projection itself."""
        return layer


class TransposedForms:
    """Matrices held as [out, in], with norms folded into the matrices after them; for GPUs."""

    def linear(self, layer: nnx.Linear) -> "TransposedLinear":
        """A transposed layer."""
        return TransposedLinear(layer)

    def normed(self, norm: nnx.RMSNorm, layer: nnx.Linear) -> "NormedLinear":
        """A transposed layer that holds the norm."""
        return NormedLinear(norm, layer)

    def features(self, layer: FeatureProjection) -> "TransposedProjection":
        """A transposed projection."""
        return TransposedProjection(layer)


class NormThenLinear(nnx.Module):
    """RMSNorm and the linear layer after it."""

    def __init__(self, norm: nnx.RMSNorm, linear: nnx.Linear):
        self.norm, self.linear = norm, linear

    def __call__(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """The layer's output, in the layer's type."""
        return self.linear(self.norm(x))


class TransposedLinear(nnx.Module):
    """A linear layer whose matrix is held as [out, in]. Not for training.

    XLA computes a one-row product as a multiplication and a sum. On a GPU, with an [in, out] matrix, these are two
    kernels, and the products pass through memory; with [out, in], they are one (measurements:
    docs/results/decoding.md).
    """

    def __init__(self, linear: nnx.Linear):
        self.kernel_OxI = nnx.Variable(linear.kernel[...].T)
        self.bias_O = None if linear.bias is None else nnx.Variable(linear.bias[...])
        self.dtype = linear.dtype

    def __call__(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """The layer's output, in the layer's type."""
        y = _product(x.astype(self.dtype), self.kernel_OxI[...].astype(self.dtype))
        if self.bias_O is not None:
            y = y + self.bias_O[...].astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


class TransposedProjection(nnx.Module):
    """A `FeatureProjection` whose matrix is held as [out, in]. Not for training."""

    def __init__(self, projection: FeatureProjection):
        self.kernel_OxI = nnx.Variable(projection.kernel[...].T)
        self.dtype = projection.dtype

    def __call__(self, numbers: Array | None, categories: list[Categorical]) -> Float[Array, "*B D"]:
        """See `FeatureProjection`."""
        features = FeatureProjection.features(numbers, categories)
        return _product(features.astype(self.dtype), self.kernel_OxI[...].astype(self.dtype))


class NormedLinear(nnx.Module):
    """RMSNorm and the linear layer after it, in one transposed matrix. Not for training.

    The matrix includes the norm's scale. The norm's divisor, one number per row, is applied to the product. So the
    product does not wait for it, and no normalized stream passes through memory (measurements:
    docs/results/decoding.md).
    """

    def __init__(self, norm: nnx.RMSNorm, linear: nnx.Linear):
        assert norm.scale is not None
        assert linear.bias is None, "NormedLinear does not support a bias"
        self.kernel_OxI = nnx.Variable((norm.scale[...][:, None] * linear.kernel[...]).T)
        self.epsilon, self.dtype = norm.epsilon, linear.dtype

    def __call__(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """The layer's output, in the layer's type."""
        mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        y = _product(x.astype(self.dtype), self.kernel_OxI[...].astype(self.dtype), jnp.float32)
        return (y * jax.lax.rsqrt(mean_square + self.epsilon)).astype(self.dtype)


def _product(x: Array, kernel_OxI: Array, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "*T O"]:
    return jax.lax.dot_general(x, kernel_OxI, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)


class Residual(nnx.Module):
    """The second half of a block: adds the attention output, then the feed-forward, to the residual stream."""

    def __init__(self, block: Block, forms: Forms):
        self.output = forms.linear(block.output)
        self.expand = forms.normed(block.feed_forward_norm, block.expand)
        self.contract = forms.linear(block.contract)

    def __call__(self, x_BxTxD: Array, attended_BxTxHxK: Array) -> Float[Array, "B T D"]:
        """The stream after the block; see `Block.add`."""
        x_BxTxD = x_BxTxD + self.output(attended_BxTxHxK.reshape(*x_BxTxD.shape[:-1], -1))
        return x_BxTxD + self.contract(jnp.square(jax.nn.relu(self.expand(x_BxTxD))))


class CrossBlock(AttentionInputs):
    """The cross block, ready to decode."""

    def __init__(self, block: Block, forms: Forms):
        self.config = block.config
        self.attention_norm, self.query_norm, self.key_norm = block.attention_norm, block.query_norm, block.key_norm
        self.query, self.key, self.value = (forms.linear(layer) for layer in (block.query, block.key, block.value))
        self.add = Residual(block, forms)


class SelfBlock(nnx.Module):
    """A self block, ready to decode: one fused projection of queries, keys and values, one normalization of q and k."""

    def __init__(self, block: Block, forms: Forms):
        self.config, self.dtype = block.config, block.query.dtype
        self.projection = forms.normed(block.attention_norm, fused_projection(block))
        rows = []
        for norm, heads in ((block.query_norm, block.config.heads), (block.key_norm, block.config.kv_heads)):
            assert norm.scale is not None
            rows.append(jnp.tile(norm.scale[...], (1, 1, heads, 1)))
        self.scale_1x1xHxK = nnx.Param(jnp.concatenate(rows, axis=2))
        self.plain_norm = nnx.RMSNorm(block.config.head_size, use_scale=False, dtype=jnp.float32, rngs=nnx.Rngs(0))
        self.add = Residual(block, forms)

    def queries_keys_values(self, x_BxTxD: Array, positions_BxTxP: Array) -> tuple[Array, Array, Array]:
        """Normalized, rotated queries and keys, and values, of the residual stream."""
        H, G = self.config.heads, self.config.kv_heads
        qkv = split_heads(self.projection(x_BxTxD), H + 2 * G)
        qk, v = qkv[..., : H + G, :], qkv[..., H + G :, :]
        qk = (self.plain_norm(qk) * self.scale_1x1xHxK[...]).astype(self.dtype)
        runs = head_runs(self.config, H) + head_runs(self.config, G)
        rotated = rotate_heads(self.config, qk, positions_BxTxP, runs)
        return rotated[..., :H, :], rotated[..., H:, :], v


def fused_projection(block: Block) -> nnx.Linear:
    """Queries, keys and values of a self block as one linear layer."""
    kernel = jnp.concatenate([layer.kernel[...] for layer in (block.query, block.key, block.value)], axis=1)
    fused = nnx.Linear(
        *kernel.shape,
        use_bias=False,
        dtype=block.query.dtype,
        kernel_init=nnx.initializers.zeros,
        rngs=nnx.Rngs(0),
    )
    fused.kernel[...] = kernel
    return fused


class DecodingModel(nnx.Module):
    """A model ready to decode: its weights in the backend's forms. Not for training.

    Args:
        model: the model; it is not changed.
        forms: constructors of its linear layers.

    Attributes:
        outer: the parts before and after the blocks: embedding, conditioning, logits.
        cross: the cross block.
        blocks: the self blocks.
    """

    def __init__(self, model: PerceiverAR, forms: Forms):
        self.config = model.config
        outer: Any = nnx.clone(model)
        self.cross = CrossBlock(outer.cross, forms)
        self.blocks = nnx.List([SelfBlock(block, forms) for block in outer.blocks])
        del outer.cross, outer.blocks
        outer.latent, outer.head = forms.linear(outer.latent), forms.linear(outer.head)
        if model.config.onsets:
            outer.keyboard = forms.features(outer.keyboard)
        if model.config.retrieval_notes:
            outer.retrieval = forms.features(outer.retrieval)
        if model.config.label_size:
            del outer.label  # for training only
        if model.config.wishes is not None:
            del outer.wishes  # their sum is computed once for each row
        self.outer: PerceiverAR = outer


class HashedGraph:
    """A model's structure as a static argument. JAX needs its hash at each call, so it is computed once."""

    def __init__(self, graph: nnx.GraphDef[DecodingModel]):
        self.graph, self._hash = graph, hash(graph)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, HashedGraph) and self.graph == other.graph)
