"""A block's attention in one-token decoding as one kernel, for NVIDIA GPUs (Pallas, Triton backend).

On a GPU a step is many small operations of about 2 µs each, whatever they compute, and six of them a block lie between
the projection of queries, keys and values and what attention found. Here they are one: query-key normalisation,
rotary positions, the new entry of the ring, and attention over the ring with an online softmax (Milakov and Gimelshein,
arXiv 1805.02867). `decoding.PlainAttention` is the same as ordinary operations, which CPUs are faster at;
tests/test_decode_kernel.py compares the two.

A program has one row of the cache: a batch row's, window's and key head's ring, keys and values both [R, K] so that
they are read in order. If there are few rows, a ring is split among several programs. Each leaves what it found, and
the last to finish, which a counter tells, puts it together (as in Flash-Decoding, Dao et al. 2023, but without a second
kernel).

The ring's slot of the new entry is masked; the new entry takes part from registers. So nobody waits for its being
written, and the softmax always has a key.

Dimension key, beside those of `model.py` and `decoding.py`: X rings (batch and window as one axis), E rows of the cache
(X G), T queries a ring and head, P queries of a cache row with padding, C heads of an array, S splits of a ring.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from music_ar.model.attention import Block, rotary_angles
from music_ar.model.config import ModelConfig

_EPSILON = 1e-6  # of nnx.RMSNorm
_LOWEST = -1e30  # below any score, and finite: what is subtracted from it stays a number
_LOG2_E = 1.4426950408889634
_LEAST_BLOCK = 16  # the least that Triton multiplies matrices of, in each of their axes
LEAST_RING = _LEAST_BLOCK
"""Rings have a multiple of this many entries."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work is cut; what is found depends on it by rounding alone.

    Attributes:
        splits: programs that share a row of the cache; with more than one, they need `counters`.
        block: entries of a ring at a time.
        warps: of 32 threads, a program.
        stages: blocks on their way from memory at a time.
    """

    splits: int
    block: int
    warps: int = 4
    stages: int = 3

    @classmethod
    def of(cls, cache_rows: int, ring: int, *, beside: bool = False) -> "Tiling":
        """Enough programs to keep some 132 multiprocessors busy, with 64 entries each at the least.

        Args:
            cache_rows: rows of the cache that the kernel goes through.
            ring: entries of each.
            beside: whether others of its kind run beside the kernel.
        """
        splits = 1
        while (
            2 * splits <= min(_MOST_SPLITS, _PROGRAMS // cache_rows, ring // 64)
            and ring % (2 * splits * LEAST_RING) == 0
        ):
            splits *= 2
        span = ring // splits
        divisor = span & -span  # the power of two in what is a program's
        if splits == 1:  # what was fastest of the cuts that docs/decoding.md lists
            return cls(splits=1, block=min(_BLOCK_OF_MANY, divisor), warps=1 if beside else 2, stages=4)
        return cls(splits=splits, block=min(_LARGEST_BLOCK, divisor))


_LARGEST_BLOCK, _BLOCK_OF_MANY, _PROGRAMS, _MOST_SPLITS = 128, 32, 256, 64


def suits(config: ModelConfig) -> bool:
    """Whether the kernel can be used for a model: Triton's blocks are powers of two, and at least 16."""
    K = config.head_size
    return K >= _LEAST_BLOCK and K & (K - 1) == 0 and config.context % _LEAST_BLOCK == 0


def pays(config: ModelConfig, dtype: jnp.dtype) -> bool:
    """Whether the kernel is known to be faster here than ordinary operations.

    That was measured on an H100 (compute capability 9.0), in bfloat16, with heads of 64 channels, and on nothing else;
    larger ones may need more shared memory than there is.
    """
    hopper = getattr(jax.local_devices()[0], "compute_capability", None) == "9.0"
    return hopper and suits(config) and config.head_size <= 64 and dtype == jnp.bfloat16


class Heads(NamedTuple):
    """Some heads of a projection as it comes, neither normalised nor rotated.

    Attributes:
        array: the projection, [rows, C, K]; one array can hold queries, keys and values, which saves copies.
        first: where in C the heads meant begin.
        scale: rows of scales of query-key normalisation; values have none.
        scale_row: which of them.
    """

    array: Float[Array, "_rows C K"]
    first: int = 0
    scale: Float[Array, "_scales K"] | None = None
    scale_row: int = 0

    @property
    def place(self) -> "_Place":
        """Where in their arrays the kernel finds them."""
        return _Place(self.first, self.scale_row)


class _Place(NamedTuple):
    first: int
    scale_row: int


def attend(
    q: Heads,
    new: tuple[Heads, Heads] | None,
    k_ExRxK: Float[Array, "E R K"],
    v_ExRxK: Float[Array, "E R K"],
    rings_Xx2: Int[Array, "X 2"],
    turns_XxPx2xK: Float[Array, "X ways 2 K"],
    counters_E: Int[Array, " _E"],
    *,
    config: ModelConfig,
    first_row: int = 0,
    tiling: Tiling | None = None,
    interpret: bool | None = None,
) -> tuple[Float[Array, "XT H K"], Array, Array, Int[Array, " _E"]]:
    """Attention of T queries a ring and head to that ring, once the new entry is written.

    Args:
        q: queries; T rows of the array for each ring in turn.
        new: key and value of the new entry, one row of the array a ring; None if the ring holds it already.
        k_ExRxK: keys of the rings, row `first_row` + x G + g for key head g of ring x; the result takes its buffer.
        v_ExRxK: values, likewise.
        rings_Xx2: of each ring, the slot of the new entry and how many entries before it are seen; none if negative.
        turns_XxPx2xK: `rotary_turns` of each ring.
        counters_E: zeros, at least one a row of the rings; they are zeros again in the result.
        config: of the model.
        first_row: of the cache, where the rings begin; there may be others before and behind them.
        tiling: how the work is cut.
        interpret: whether to run as ordinary operations, for tests. Default: where there is no GPU.

    Returns:
        What each query found, the keys, the values, and the counters.
    """
    _, R, K = k_ExRxK.shape
    X, H = rings_Xx2.shape[0], config.heads
    E = X * config.kv_heads
    tiling = Tiling.of(E, R) if tiling is None else tiling
    interpret = _interpreted() if interpret is None else interpret
    k, v = (None, None) if new is None else new
    sizes = _Sizes(
        config=config, queries=q.array.shape[0] // X, tiling=tiling, first_row=first_row, interpreted=interpret
    )
    inputs = [rings_Xx2, turns_XxPx2xK, q.array, q.scale]
    if k is not None and v is not None:
        inputs += [k.array, k.scale, v.array]
    aliased = [k_ExRxK, v_ExRxK, counters_E]
    F = sizes.queries * sizes.group
    partial = [(E, tiling.splits, F, K), (E, tiling.splits, 2, F)] if tiling.splits > 1 else []
    found, k_ExRxK, v_ExRxK, counters_E, *_ = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, q=q.place, k=k and k.place, v=v and v.place),
        out_shape=[
            jax.ShapeDtypeStruct((X * sizes.queries, H, K), v_ExRxK.dtype),
            *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in aliased),
            *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in partial),
        ],
        grid=(E, tiling.splits),
        input_output_aliases={len(inputs) + index: 1 + index for index in range(3)},
        # These being Triton's chooses that backend.
        compiler_params=triton.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="decode_attention",
    )(*inputs, *aliased)
    return found, k_ExRxK, v_ExRxK, counters_E


def rotary_turns(config: ModelConfig, places_XxP: Int[Array, "X P"]) -> Float[Array, "X ways 2 K"]:
    """What turns a head at each place, by either way to count it: a head becomes cos * head + sin * partner.

    A channel's partner is the one it turns with; where that has to be subtracted, the sine is negative. Channels that
    do not turn have cosine 1 and sine 0.
    """
    size, K = config.rotary_size, config.head_size
    places_XxP = places_XxP if config.time_heads else places_XxP[:, :1]
    angle_XxPxR = rotary_angles(places_XxP, size=size, wavelength=config.rotary_wavelength)
    cos, sin = jnp.cos(angle_XxPxR), jnp.sin(angle_XxPxR)
    rest = jnp.ones((*places_XxP.shape, K - size), jnp.float32)
    return jnp.stack([jnp.concatenate([cos, cos, rest], -1), jnp.concatenate([-sin, sin, 0 * rest], -1)], axis=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What the kernel is compiled for, beside the shapes of its arrays."""

    config: ModelConfig
    queries: int
    tiling: Tiling
    first_row: int
    interpreted: bool

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return self.config.heads // self.config.kv_heads


def _kernel(*all_refs: Any, sizes: _Sizes, q: _Place, k: _Place | None, v: _Place | None) -> None:
    """The program of one cache row and one split of it.

    Queries beyond the last, which fill up a block, are the last once more: they find the same and are written to the
    same place. Keys and values are read from the outputs, whose buffers are the inputs'.
    """
    rings_ref, turns_ref, q_ref, q_scale_ref, *refs = all_refs
    new_refs, refs = (refs[:3], refs[3:]) if k is not None else ([], refs)
    found_ref, k_ref, v_ref, counters_ref, *partial_refs = refs[3:]  # the first three are inputs
    config, tiling = sizes.config, sizes.tiling
    _, R, K = k_ref.shape
    G, F, S = config.kv_heads, sizes.queries * sizes.group, tiling.splits

    row, split = pl.program_id(0), pl.program_id(1)
    ring, head = jax.lax.div(row, G), jax.lax.rem(row, G)
    cache_row = row + sizes.first_row
    slot, before = rings_ref[ring, 0], rings_ref[ring, 1]
    way = jnp.where(head >= G - config.time_heads, turns_ref.shape[1] - 1, 0)
    channel_1xK, half = _numbers(K)[None], config.rotary_size // 2
    partner_1xK = jnp.where(
        channel_1xK < half, channel_1xK + half, jnp.where(channel_1xK < 2 * half, channel_1xK - half, channel_1xK)
    )

    def turned(ref: Any, scale_ref: Any, place: _Place, row_Px1: Array, head_Px1: Array) -> Array:
        """Normalised and rotated heads, float32 [P, K]."""
        x_PxK = ref[row_Px1, place.first + head_Px1, channel_1xK].astype(jnp.float32)
        partner_PxK = ref[row_Px1, place.first + head_Px1, partner_1xK].astype(jnp.float32)
        size_Px1 = jax.lax.rsqrt(jnp.sum(x_PxK * x_PxK, axis=1)[:, None] / K + _EPSILON)
        cos_1xK, sin_1xK = (turns_ref[ring, way, part, channel_1xK] for part in range(2))
        x_PxK *= scale_ref[place.scale_row, channel_1xK]
        partner_PxK *= scale_ref[place.scale_row, partner_1xK]
        return (x_PxK * cos_1xK + partner_PxK * sin_1xK) * size_Px1

    def at(number_P: Array) -> tuple[Array, Array]:
        """Row and head of the queries of these numbers, both [P, 1]."""
        row_P = ring * sizes.queries + jax.lax.div(number_P, sizes.group)
        return row_P[:, None], (head * sizes.group + jax.lax.rem(number_P, sizes.group))[:, None]

    number_P = jnp.minimum(_numbers(max(_LEAST_BLOCK, _power_of_two(F))), F - 1)
    # Scores are in units of which 2 is the base: exp2 is what the hardware has.
    scale = K**-0.5 * _LOG2_E
    q_PxK = turned(q_ref, q_scale_ref, q, *at(number_P)).astype(k_ref.dtype)
    top_P = jnp.full(number_P.shape, _LOWEST, jnp.float32)
    total_P, sum_PxK = jnp.zeros_like(top_P), jnp.zeros(q_PxK.shape, jnp.float32)

    nearest = 0  # the latest entry that is read from the ring, counted from the slot back
    if k is not None and v is not None:
        nearest = 1
        k_new_ref, k_scale_ref, v_new_ref = new_refs
        ring_1x1, head_1x1 = jnp.full((1, 1), ring), jnp.full((1, 1), head)
        k_1xK = turned(k_new_ref, k_scale_ref, k, ring_1x1, head_1x1).astype(k_ref.dtype)
        v_1xK = v_new_ref[ring_1x1, v.first + head_1x1, channel_1xK].astype(v_ref.dtype)
        score_P = jnp.sum(q_PxK.astype(jnp.float32) * k_1xK.astype(jnp.float32), axis=1) * scale
        mine = split == 0  # the first split has the new entry, wherever its slot is
        top_P = jnp.where(mine, score_P, top_P)
        total_P = jnp.where(mine, 1.0, total_P)
        sum_PxK = jnp.where(mine, v_1xK.astype(jnp.float32), sum_PxK)

        @pl.when(mine)
        def _() -> None:
            place_1xK = (jnp.full((1, 1), cache_row), jnp.full((1, 1), slot), channel_1xK)
            k_ref[place_1xK] = k_1xK
            v_ref[place_1xK] = v_1xK

    def add_block(index: Array | int, found: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top_P, total_P, sum_PxK = found
        first = split * (R // S) + index * tiling.block
        k_LxK, v_LxK = (ref[cache_row, pl.ds(first, tiling.block), :] for ref in (k_ref, v_ref))
        score_PxL = _product(q_PxK, k_LxK, contracting=(1, 1)) * scale
        behind_L = slot - first - _numbers(tiling.block)
        behind_L = jnp.where(behind_L < 0, behind_L + R, behind_L)
        seen_L = (behind_L >= nearest) & (behind_L <= before)
        score_PxL = jnp.where(seen_L[None], score_PxL, -jnp.inf)
        new_top_P = jnp.maximum(top_P, jnp.max(score_PxL, axis=1))
        chance_PxL, kept_P = jnp.exp2(score_PxL - new_top_P[:, None]), jnp.exp2(top_P - new_top_P)
        added_PxK = _product(chance_PxL.astype(v_LxK.dtype), v_LxK, contracting=(1, 0))
        return new_top_P, total_P * kept_P + jnp.sum(chance_PxL, axis=1), sum_PxK * kept_P[:, None] + added_PxK

    blocks = R // S // tiling.block
    found = (top_P, total_P, sum_PxK)
    found = add_block(0, found) if blocks == 1 else jax.lax.fori_loop(0, blocks, add_block, found)
    top_P, total_P, sum_PxK = found

    if S == 1:
        found_ref[(*at(number_P), channel_1xK)] = (sum_PxK / total_P[:, None]).astype(found_ref.dtype)
        return

    sums_ref, scores_ref = partial_refs
    sums_ref[row, split, number_P[:, None], channel_1xK] = sum_PxK
    scores_ref[row, split, 0, number_P] = top_P
    scores_ref[row, split, 1, number_P] = total_P
    if not sizes.interpreted:
        triton.debug_barrier()  # all threads' writes come before the one thread's counting
    finished = triton.atomic_add(counters_ref, (row,), jnp.int32(1))

    @pl.when(finished == S - 1)
    def _() -> None:
        number_P = jnp.minimum(_numbers(_power_of_two(F)), F - 1)
        split_Sx1 = _numbers(S)[:, None]

        def of_all(ref: Any, *place: Array) -> Array:
            return triton.load(ref.at[(row, *place)], volatile=True)  # not from a cache of its own

        top_SxP = of_all(scores_ref, split_Sx1, jnp.zeros_like(split_Sx1), number_P[None])
        total_SxP = of_all(scores_ref, split_Sx1, jnp.ones_like(split_Sx1), number_P[None])
        sum_SxPxK = of_all(sums_ref, split_Sx1[:, :, None], number_P[None, :, None], channel_1xK[None])
        weight_SxP = jnp.exp2(top_SxP - jnp.max(top_SxP, axis=0)[None])
        sum_PxK = jnp.sum(sum_SxPxK * weight_SxP[:, :, None], axis=0)
        total_P = jnp.sum(total_SxP * weight_SxP, axis=0)
        found_ref[(*at(number_P), channel_1xK)] = (sum_PxK / total_P[:, None]).astype(found_ref.dtype)
        counters_ref[row] = 0


def _power_of_two(count: int) -> int:
    """The least that is not below `count`."""
    return 1 << (count - 1).bit_length()


def _product(x: Array, y: Array, *, contracting: tuple[int, int]) -> Array:
    """Product of two matrices over an axis of each, summed in float32; float32 ones are not rounded to fewer bits."""
    return jax.lax.dot_general(
        x,
        y,
        (((contracting[0],), (contracting[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


class FusedAttention:
    """The attention of all blocks in one step of decoding, by the kernel; `decoding.PlainAttention` is its counterpart.

    Keys are laid out like values here.

    Args:
        config: of the model.
        clock_B: the time of the step, by row.
        places_BxP: the position that it has in the piece, by either way to count.
        windows: W.
        first: the batch row of the caches that is the first of these.
        beside: whether the attention of other rows runs beside it.
    """

    def __init__(
        self,
        config: ModelConfig,
        clock_B: Int[Array, " B"],
        places_BxP: Int[Array, "B P"],
        windows: int,
        *,
        first: int = 0,
        beside: bool = False,
    ) -> None:
        self._config, self._clock_B, self._windows, self._first, self._beside = config, clock_B, windows, first, beside
        self._turns_BxPx2xK = rotary_turns(config, places_BxP)
        # One after another the kernels use these and leave them as they were.
        self._counters_E = jnp.zeros(len(clock_B) * windows * config.kv_heads, jnp.int32)

    def cross(
        self,
        block: Block,
        x_BxTxD: Float[Array, "B T D"],
        context_Bx1xD: Float[Array, "B 1 D"] | None,
        cache: tuple[Array, Array],
        since_B: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T H K"], tuple[Array, Array]]:
        """See `decoding.PlainAttention.cross`."""
        new = None
        if context_Bx1xD is not None:
            new = (
                Heads(self._heads(block.key(context_Bx1xD)), scale=_scale(block.key_norm)),
                Heads(self._heads(block.value(context_Bx1xD))),
            )
        q = Heads(self._heads(block.query(block.attention_norm(x_BxTxD))), scale=_scale(block.query_norm))
        found, cache = self._attend(q, new, cache, self._clock_B, since_B, self._turns_BxPx2xK, self._first)
        return found.reshape(*x_BxTxD.shape[:2], *found.shape[1:]), cache

    def within(
        self, block: Block, x_BWx1xD: Float[Array, "BW 1 D"], cache: tuple[Array, Array], since_BW: Int[Array, " BW"]
    ) -> tuple[Float[Array, "BW 1 H K"], tuple[Array, Array]]:
        """See `decoding.PlainAttention.within`."""
        assert block.joined is not None, "blocks are joined when a decoder is made"
        H, G, K = self._config.heads, self._config.kv_heads, self._config.head_size
        qkv = self._heads(block.joined.projection(block.attention_norm(x_BWx1xD)))
        scale = block.joined.scale_1x1xHxK[...].reshape(H + G, K)
        new = (Heads(qkv, first=H, scale=scale, scale_row=H), Heads(qkv, first=H + G))
        clock_BW = jnp.repeat(self._clock_B, self._windows)
        turns = jnp.repeat(self._turns_BxPx2xK, self._windows, axis=0)
        found, cache = self._attend(
            Heads(qkv, scale=scale), new, cache, clock_BW, since_BW, turns, self._first * self._windows
        )
        return found[:, None], cache

    def _attend(
        self,
        q: Heads,
        new: tuple[Heads, Heads] | None,
        cache: tuple[Array, Array],
        clock_X: Array,
        since_X: Array,
        turns_XxPx2xK: Array,
        first_ring: int,
    ) -> tuple[Array, tuple[Array, Array]]:
        config, size = self._config, cache[0].shape[1]
        found, k, v, self._counters_E = attend(
            q,
            new,
            *cache,
            jnp.stack([clock_X % size, clock_X - since_X], axis=1),
            turns_XxPx2xK,
            self._counters_E,
            config=config,
            first_row=first_ring * config.kv_heads,
            tiling=Tiling.of(len(clock_X) * config.kv_heads, size, beside=self._beside),
        )
        return found, (k, v)

    def _heads(self, x_XxTxC: Array) -> Array:
        return x_XxTxC.reshape(-1, x_XxTxC.shape[-1] // self._config.head_size, self._config.head_size)


def _scale(norm: nnx.RMSNorm) -> Float[Array, "1 K"]:
    assert norm.scale is not None
    return norm.scale[...].reshape(1, -1)


def _interpreted() -> bool:
    """Whether kernels run as ordinary operations, for want of a GPU."""
    return jax.default_backend() != "gpu"


def _numbers(count: int) -> Array:
    """0, 1, ... `count` - 1, inside a kernel."""
    return jax.lax.iota(jnp.int32, count)
