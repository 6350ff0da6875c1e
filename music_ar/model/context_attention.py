"""Attention of N latents to the context, in O(N * M): every latent sees the prefix, and the latents up to itself.

The softmax over both is computed from two attentions, without a mask to the prefix and causal among the latents. Each
gives its output and the log-sum-exp of its scores, and these are merged as blocks are in FlashAttention (Dao et al.,
arXiv 2205.14135). Backward, each is given the output and the log-sum-exp of the whole, as in ring attention (Liu et
al., arXiv 2310.01889): a probability is the exponential of its score minus the log-sum-exp of the whole, so the two
gradients are exact and that of the queries is their sum. Automatic differentiation of the merge would be wrong, since
JAX does not differentiate the log-sum-exp that cuDNN returns.

The prefix can be split over the devices of a mesh axis, too: each computes the attention to its share, and only outputs
and log-sum-exps of N latents are exchanged.

Measurements: docs/results/long-context.md.

Dimension key, in addition to that of `config`: T keys, C keys of a block or a part,
R parts, or query heads of a key head.
"""

import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from music_ar.model.attention import causal_attention
from music_ar.model.config import Compute
from music_ar.model.rows import take_slice

Gradients = tuple[Array, Array, Array]
"""Of queries, keys and values."""

_BLOCK = 1024  # keys that `BlockAttention` processes at once
_PART = 16384  # most keys of a part of the prefix
_NO_KEYS = 1e30  # a log-sum-exp from which no score is far enough for a probability above zero


@runtime_checkable
class AttentionKernel(Protocol):
    """Attention with its log-sum-exp, and its gradients given the output and the log-sum-exp of a larger whole.

    Queries are [B, N, H, K], keys and values [B, T, G, K]. Each row of the batch sees the first `lengths_B` keys, at
    least 1; None means causal attention, with T = N.
    """

    def forward(self, q: Array, k: Array, v: Array, lengths_B: Array | None) -> tuple[Array, Array]:
        """Output [B, N, H, K], and the log-sum-exp of the scores, float32 [B, H, N]."""
        ...

    def backward(
        self, q: Array, k: Array, v: Array, lengths_B: Array | None, whole: tuple[Array, Array], gradient: Array
    ) -> Gradients:
        """Gradients by queries, keys and values.

        Args:
            q, k, v, lengths_B: as in `forward`.
            whole: output and log-sum-exp of the attention of which this is a part.
            gradient: by the whole's output.
        """
        ...


def attend_context(
    q_BxNxHxK: Float[Array, "B N H K"],
    k_BxSxGxK: Float[Array, "B S G K"],
    v_BxSxGxK: Float[Array, "B S G K"],
    prefix_B: Int[Array, " B"],
    compute: Compute,
    split_over: str | None = None,
) -> Float[Array, "B N H K"]:
    """Attention of each latent to the prefix, and to the latents up to itself.

    Args:
        q_BxNxHxK: queries of the latents.
        k_BxSxGxK, v_BxSxGxK: keys and values of the prefix, then of the N latents, then of anything, which is not seen.
        prefix_B: length of the prefix in each row of the batch, at most S - N.
        compute: "cudnn" takes cuDNN's kernels, "xla" plain operations on blocks of keys. Memory is linear in S.
        split_over: a mesh axis, inside `jax.shard_map`: the first S - N keys and values are a device's share of the
            prefix, of which it has `prefix_B`, and the latents' come right after. Latents are the same on all devices
            of the axis. As usual in `jax.shard_map`, gradients are a device's share, to be summed.
    """
    N, P = q_BxNxHxK.shape[1], k_BxSxGxK.shape[1] - q_BxNxHxK.shape[1]
    if P == 0:
        return causal_attention(q_BxNxHxK, k_BxSxGxK, v_BxSxGxK, compute)
    far_k, far_v = k_BxSxGxK[:, :P], v_BxSxGxK[:, :P]
    if split_over is None:
        near_k, near_v = (take_slice(x, prefix_B, N) for x in (k_BxSxGxK, v_BxSxGxK))
    else:
        near_k, near_v = k_BxSxGxK[:, P:], v_BxSxGxK[:, P:]
    return _attend((compute.attention, split_over), q_BxNxHxK, far_k, far_v, prefix_B, near_k, near_v)


def attend_after(
    q_BxNxHxK: Float[Array, "B N H K"],
    before_k_BxTxGxK: Float[Array, "B T G K"],
    before_v_BxTxGxK: Float[Array, "B T G K"],
    lengths_B: Int[Array, " B"],
    k_BxNxGxK: Float[Array, "B N G K"],
    v_BxNxGxK: Float[Array, "B N G K"],
    compute: Compute,
) -> Float[Array, "B N H K"]:
    """Causal attention among latents, which all see the first `lengths_B` of some keys before them, too.

    Args:
        q_BxNxHxK: queries of the latents.
        before_k_BxTxGxK, before_v_BxTxGxK: keys and values before the latents.
        lengths_B: how many of these each row of the batch has, 0..T.
        k_BxNxGxK, v_BxNxGxK: keys and values of the latents.
        compute: as in `attend_context`.
    """
    before = (before_k_BxTxGxK, before_v_BxTxGxK, lengths_B)
    return _attend((compute.attention, None), q_BxNxHxK, *before, k_BxNxGxK, v_BxNxGxK)


_How = tuple[str, str | None]  # the kernel, and the mesh axis over which the prefix is split


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: _How, q: Array, far_k: Array, far_v: Array, lengths_B: Array, k: Array, v: Array) -> Array:
    return _attend_forward(how, q, far_k, far_v, lengths_B, k, v)[0]


def _attend_forward(
    how: _How, q: Array, far_k: Array, far_v: Array, lengths_B: Array, k: Array, v: Array
) -> tuple[Array, tuple[Array, ...]]:
    attention, axis = how
    kernel, parts = _kernel(attention), _Parts(len(q), far_k.shape[1])
    near, near_lse_BxHxN = kernel.forward(q, k, v, None)
    lengths_BR = parts.lengths(lengths_B)
    far_BRxNxHxK, far_lse_BRxHxN = kernel.forward(
        parts.repeat(q), parts.split(far_k), parts.split(far_v), jnp.maximum(lengths_BR, 1)
    )
    far_lse_BRxHxN = jnp.where(lengths_BR[:, None, None] > 0, far_lse_BRxHxN, -_NO_KEYS)
    far_lse_BxRxHxN = parts.by_row(far_lse_BRxHxN)
    each_lse = jnp.concatenate([_of_all_devices(far_lse_BxRxHxN, axis), near_lse_BxHxN[:, None]], axis=1)
    lse_BxHxN = jax.nn.logsumexp(each_lse, axis=1)
    far = (parts.by_row(far_BRxNxHxK) * _shares(far_lse_BxRxHxN, lse_BxHxN[:, None])).sum(axis=1)
    out = (_sum_over(far, axis) + near * _shares(near_lse_BxHxN, lse_BxHxN)).astype(q.dtype)
    return out, (q, far_k, far_v, lengths_B, k, v, out, lse_BxHxN)


def _attend_backward(how: _How, residuals: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    attention, axis = how
    q, far_k, far_v, lengths_B, k, v, out, lse_BxHxN = residuals
    kernel, parts = _kernel(attention), _Parts(len(q), far_k.shape[1])
    near_q, near_k, near_v = kernel.backward(q, k, v, None, (out, lse_BxHxN), gradient)
    lengths_BR = parts.lengths(lengths_B)
    # A part without keys has no probability.
    lse_BRxHxN = jnp.where(lengths_BR[:, None, None] > 0, parts.repeat(lse_BxHxN), _NO_KEYS)
    far_q, far_k, far_v = kernel.backward(
        parts.repeat(q),
        parts.split(far_k),
        parts.split(far_v),
        jnp.maximum(lengths_BR, 1),
        (parts.repeat(out), lse_BRxHxN),
        parts.repeat(_sum_over(gradient, axis)),  # a share of the prefix is in the outputs of all devices
    )
    q_gradient = near_q + parts.by_row(far_q).sum(axis=1)
    return q_gradient, parts.join(far_k), parts.join(far_v), None, near_k, near_v


_attend.defvjp(_attend_forward, _attend_backward)


def _of_all_devices(lse_BxRxHxN: Array, axis: str | None) -> Array:
    """Log-sum-exps of the parts, or of the shares of all devices of an axis."""
    if axis is None:
        return lse_BxRxHxN
    of_share_Bx1xHxN = jax.nn.logsumexp(lse_BxRxHxN, axis=1, keepdims=True)
    return jax.lax.all_gather(of_share_Bx1xHxN, axis, axis=1, tiled=True)


def _sum_over(x: Array, axis: str | None) -> Array:
    """The sum over the devices of an axis, in float32."""
    return x if axis is None else jax.lax.psum(x.astype(jnp.float32), axis).astype(x.dtype)


def _shares(part_xHxN: Array, whole_xHxN: Array) -> Float[Array, "*_ N H 1"]:
    """Share of a part in the softmax of the whole, given their log-sum-exps."""
    return jnp.exp(part_xHxN - whole_xHxN).swapaxes(-2, -1)[..., None]


class _Parts:
    """Splits a prefix into R parts of equal size, which become rows of a larger batch.

    cuDNN's forward kernel runs through all keys for each block of queries. With one window and few latents there are
    fewer blocks than a GPU has processors; parts make more.

    Args:
        rows: B.
        size: P.
    """

    def __init__(self, rows: int, size: int):
        self._rows, self._size = rows, size
        self._count = -(-size // _PART)
        self._part = -(-size // self._count)

    def split(self, x_BxPxGxK: Array) -> Float[Array, "BR C G K"]:
        """Keys or values in parts, the last one padded."""
        padding = self._count * self._part - self._size
        padded = jnp.pad(x_BxPxGxK, ((0, 0), (0, padding), (0, 0), (0, 0)))
        return padded.reshape(-1, self._part, *x_BxPxGxK.shape[2:])

    def join(self, x_BRxCxGxK: Array) -> Float[Array, "B P G K"]:
        """The inverse of `split`."""
        return x_BRxCxGxK.reshape(self._rows, -1, *x_BRxCxGxK.shape[2:])[:, : self._size]

    def repeat(self, x_Bx: Array) -> Array:
        """Each row once for each part."""
        return jnp.repeat(x_Bx, self._count, axis=0)

    def by_row(self, x_BRx: Array) -> Array:
        """Parts on an axis of their own: [B, R, ...]."""
        return x_BRx.reshape(self._rows, self._count, *x_BRx.shape[1:])

    def lengths(self, lengths_B: Array) -> Int[Array, " BR"]:
        """How many keys of each part are seen."""
        starts_R = self._part * jnp.arange(self._count)
        return jnp.clip(lengths_B[:, None] - starts_R[None], 0, self._part).reshape(-1)


def _kernel(attention: str) -> AttentionKernel:
    if attention == "xla":
        return BlockAttention()
    from music_ar.model.cudnn_attention import CudnnAttention

    return CudnnAttention()


class BlockAttention:
    """`AttentionKernel` as plain operations: a loop over blocks of keys, with the softmax accumulated over them."""

    def forward(self, q: Array, k: Array, v: Array, lengths_B: Array | None) -> tuple[Array, Array]:
        """See `AttentionKernel.forward`."""
        q_BxNxGxRxK = _by_key_head(q, k)
        B, N, G, R, K = q_BxNxGxRxK.shape

        def add(sums: tuple[Array, ...], block: tuple[Array, ...]) -> tuple[tuple[Array, ...], None]:
            highest, total, out = sums
            k_BxCxGxK, v_BxCxGxK, start = block
            scores = _scores(q_BxNxGxRxK, k_BxCxGxK, start, lengths_B)
            new = jnp.maximum(highest, scores.max(axis=-1))
            weights, kept = jnp.exp(scores - new[..., None]), jnp.exp(highest - new)
            found = jnp.einsum("bgrnc,bcgk->bgrnk", weights.astype(v.dtype), v_BxCxGxK)
            return (new, total * kept + weights.sum(axis=-1), out * kept[..., None] + found), None

        shape = (B, G, R, N)
        first = (jnp.full(shape, -_NO_KEYS), jnp.zeros(shape), jnp.zeros((*shape, K)))
        (highest, total, out), _ = jax.lax.scan(add, first, _blocks(k, v))
        out_BxNxHxK = (out / total[..., None]).transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
        return out_BxNxHxK, (highest + jnp.log(total)).reshape(B, G * R, N)

    def backward(
        self, q: Array, k: Array, v: Array, lengths_B: Array | None, whole: tuple[Array, Array], gradient: Array
    ) -> Gradients:
        """See `AttentionKernel.backward`."""
        out, lse_BxHxN = whole
        q_BxNxGxRxK, gradient_BxNxGxRxK = _by_key_head(q, k), _by_key_head(gradient, k)
        B, N, G, R, K = q_BxNxGxRxK.shape
        lse_BxGxRxN = lse_BxHxN.reshape(B, G, R, N)
        product_BxNxH = (out.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(axis=-1)
        product_BxGxRxN = product_BxNxH.reshape(B, N, G, R).transpose(0, 2, 3, 1)

        def add(q_gradient: Array, block: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
            k_BxCxGxK, v_BxCxGxK, start = block
            weights = jnp.exp(_scores(q_BxNxGxRxK, k_BxCxGxK, start, lengths_B) - lse_BxGxRxN[..., None])
            by_weight = jnp.einsum(
                "bngrk,bcgk->bgrnc", gradient_BxNxGxRxK, v_BxCxGxK, preferred_element_type=jnp.float32
            )
            by_score = (weights * (by_weight - product_BxGxRxN[..., None]) * K**-0.5).astype(q.dtype)
            v_gradient = jnp.einsum("bgrnc,bngrk->bcgk", weights.astype(q.dtype), gradient_BxNxGxRxK)
            k_gradient = jnp.einsum("bgrnc,bngrk->bcgk", by_score, q_BxNxGxRxK)
            return q_gradient + jnp.einsum("bgrnc,bcgk->bngrk", by_score, k_BxCxGxK), (k_gradient, v_gradient)

        zeros = jnp.zeros(q_BxNxGxRxK.shape)
        q_gradient, by_block = jax.lax.scan(add, zeros, _blocks(k, v))
        k_gradient, v_gradient = (
            each.swapaxes(0, 1).reshape(B, -1, G, K)[:, : k.shape[1]].astype(k.dtype) for each in by_block
        )
        return q_gradient.reshape(q.shape).astype(q.dtype), k_gradient, v_gradient


def _by_key_head(x_BxNxHxK: Array, k_BxTxGxK: Array) -> Float[Array, "B N G R K"]:
    """Queries by the key head that they read, R for each."""
    B, N, _, K = x_BxNxHxK.shape
    return x_BxNxHxK.reshape(B, N, k_BxTxGxK.shape[2], -1, K)


def _blocks(k_BxTxGxK: Array, v_BxTxGxK: Array) -> tuple[Array, Array, Array]:
    """Keys and values in blocks, [T / C, B, C, G, K] each, padded at the end; and the first position of each block."""
    B, T, G, K = k_BxTxGxK.shape
    C = min(_BLOCK, T)
    count = -(-T // C)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, count * C - T), (0, 0), (0, 0)))
        return padded.reshape(B, count, C, G, K).swapaxes(0, 1)

    return split(k_BxTxGxK), split(v_BxTxGxK), C * jnp.arange(count)


def _scores(q_BxNxGxRxK: Array, k_BxCxGxK: Array, start: Array, lengths_B: Array | None) -> Float[Array, "B G R N C"]:
    """float32 scores of a block of keys, very low where a query does not see a key."""
    N, C, K = q_BxNxGxRxK.shape[1], k_BxCxGxK.shape[1], q_BxNxGxRxK.shape[-1]
    scores = jnp.einsum("bngrk,bcgk->bgrnc", q_BxNxGxRxK, k_BxCxGxK, preferred_element_type=jnp.float32) * K**-0.5
    position_C = start + jnp.arange(C)
    if lengths_B is None:
        visible = (position_C[None] <= jnp.arange(N)[:, None])[None, None, None]
    else:
        visible = (position_C[None] < lengths_B[:, None])[:, None, None, None]
    return jnp.where(visible, scores, -_NO_KEYS)
