"""The kernel of `pallas_attention`: attention of one decoding step, for NVIDIA GPUs (Pallas, Triton backend).

On a GPU, a step is many small operations of about 2 µs each, whatever they compute. Six of them per block come between
the projection of queries, keys and values and the attention output. This kernel fuses the six: query-key normalization,
rotary positions, the new entry of the rolling cache, and attention over the cache with an online softmax (Milakov and
Gimelshein, arXiv 1805.02867).

A program handles one cache row: the rolling cache of one batch row, window and key head, with keys and values both [R,
K], so that they are read in order. If there are few rows, a cache is split among several programs. Each stores its
partial result, and the last to finish, according to a counter, combines them (as in Flash-Decoding, Dao et al. 2023,
but without a second kernel). The slot of the new entry is masked; the entry takes part from registers. So no program
waits until it is written, and the softmax always has a key.

Dimension key, in addition to those of `music_ar.model.config` and `state`: X caches (batch and window as one axis), E
cache rows (X G), C heads of an array, Q queries of a cache row with padding, S splits of a cache, L a block of entries.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from music_ar.model.attention import rotary_angles
from music_ar.model.config import ModelConfig

_EPSILON = 1e-6  # of nnx.RMSNorm
_LOWEST = -1e30  # below any score, and finite, so that differences are numbers
_LOG2_E = 1.4426950408889634
LEAST_BLOCK = 16
"""Shortest matrix axis that Triton multiplies; the number of entries of a cache is a multiple of it."""
_LARGEST_BLOCK, _BLOCK_OF_MANY, _PROGRAMS, _MOST_SPLITS = 128, 32, 256, 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work is divided; it affects results by rounding only.

    Attributes:
        splits: programs that share a cache row; with more than one, they need `counters`.
        block: entries of a cache processed at a time.
        warps: of 32 threads, per program.
        stages: blocks in flight from memory.
    """

    splits: int
    block: int
    warps: int = 4
    stages: int = 3

    @classmethod
    def of(cls, cache_rows: int, size: int, *, overlapped: bool = False) -> "Tiling":
        """Enough programs to keep about 132 multiprocessors busy, with at least 64 entries each.

        Args:
            cache_rows: rows that the kernel goes through.
            size: entries of each.
            overlapped: whether another such kernel runs at the same time.
        """
        splits = 1
        most = min(_MOST_SPLITS, _PROGRAMS // cache_rows, size // 64)
        while 2 * splits <= most and size % (2 * splits * LEAST_BLOCK) == 0:
            splits *= 2
        span = size // splits
        divisor = span & -span  # largest power of two that divides a program's share
        if splits == 1:  # the fastest of the tilings in docs/results/decoding.md
            return cls(splits=1, block=min(_BLOCK_OF_MANY, divisor), warps=1 if overlapped else 2, stages=4)
        return cls(splits=splits, block=min(_LARGEST_BLOCK, divisor))


class Heads(NamedTuple):
    """Some heads of a projection, not yet normalized or rotated.

    Attributes:
        array: the projection, [rows, C, K]; one array can hold queries, keys and values, which saves copies.
        first: index in C of the first of them.
        scale: rows of scales of the query-key normalization; None for values.
        scale_row: index of the row in `scale`.
    """

    array: Float[Array, "_rows C K"]
    first: int = 0
    scale: Float[Array, "_scales K"] | None = None
    scale_row: int = 0

    @property
    def place(self) -> "_Place":
        """Where the kernel finds the heads in their arrays."""
        return _Place(self.first, self.scale_row)


class _Place(NamedTuple):
    first: int
    scale_row: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What the kernel is compiled for, in addition to the shapes of its arrays."""

    config: ModelConfig
    tiling: Tiling
    first_row: int
    interpreted: bool
    q: _Place
    k: _Place
    v: _Place

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.config.heads // self.config.kv_heads


def attend(
    q: Heads,
    k: Heads,
    v: Heads,
    k_ExRxK: Float[Array, "E R K"],
    v_ExRxK: Float[Array, "E R K"],
    slots_Xx2: Int[Array, "X 2"],
    rotations_XxPx2xK: Float[Array, "X P 2 K"],
    counters_E: Int[Array, " _E"],
    *,
    config: ModelConfig,
    first_row: int = 0,
    tiling: Tiling | None = None,
    interpreted: bool = False,
) -> tuple[Float[Array, "X H K"], Array, Array, Int[Array, " _E"]]:
    """Write the new entry, and attend to the cache with one query per cache and head.

    Args:
        q: queries, one row of the array per cache.
        k, v: key and value of the new entry, likewise.
        k_ExRxK: cached keys, row `first_row` + x G + g for key head g of cache x; the result takes its buffer.
        v_ExRxK: cached values, likewise.
        slots_Xx2: of each cache, the slot of the new entry and how many entries before it are visible; none if
            negative.
        rotations_XxPx2xK: `rotations` of each cache.
        counters_E: zeros, at least one per cache row; they are zeros again in the result.
        config: of the model.
        first_row: of the caches' rows; there may be others before and after them.
        tiling: how the work is divided; default: `Tiling.of`.
        interpreted: run as ordinary operations, for tests.

    Returns:
        The attention output of each query, the keys, the values, and the counters.
    """
    _, R, K = k_ExRxK.shape
    X, E = slots_Xx2.shape[0], slots_Xx2.shape[0] * config.kv_heads
    tiling = Tiling.of(E, R) if tiling is None else tiling
    places = {"q": q.place, "k": k.place, "v": v.place}
    sizes = _Sizes(config=config, tiling=tiling, first_row=first_row, interpreted=interpreted, **places)
    inputs = [slots_Xx2, rotations_XxPx2xK, q.array, q.scale, k.array, k.scale, v.array]
    aliased = [k_ExRxK, v_ExRxK, counters_E]
    S, F = tiling.splits, sizes.group
    partial = [(E, S, F, K), (E, S, 2, F)] if S > 1 else []
    found, k_ExRxK, v_ExRxK, counters_E, *_ = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes),
        out_shape=[
            jax.ShapeDtypeStruct((X, config.heads, K), v_ExRxK.dtype),
            *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in aliased),
            *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in partial),
        ],
        grid=(E, S),
        input_output_aliases={len(inputs) + index: 1 + index for index in range(3)},
        # Triton's parameters select the Triton backend.
        compiler_params=triton.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpreted,
        name="decode_attention",
    )(*inputs, *aliased)
    return found, k_ExRxK, v_ExRxK, counters_E


def rotations(config: ModelConfig, positions_XxP: Int[Array, "X P"]) -> Float[Array, "X _ 2 K"]:
    """Rotary factors of a head at each position, for each way to count it: a head becomes cos * head + sin * partner.

    A channel's partner is the one it rotates with; where the partner is subtracted, the sine is negative. Channels that
    do not rotate have cosine 1 and sine 0.
    """
    size, K = config.rotary_size, config.head_size
    positions_XxP = positions_XxP if config.time_heads else positions_XxP[:, :1]
    angle_XxPxR = rotary_angles(positions_XxP, size=size, wavelength=config.rotary_wavelength)
    cos, sin = jnp.cos(angle_XxPxR), jnp.sin(angle_XxPxR)
    rest = jnp.ones((*positions_XxP.shape, K - size), jnp.float32)
    return jnp.stack([jnp.concatenate([cos, cos, rest], -1), jnp.concatenate([-sin, sin, 0 * rest], -1)], axis=2)


class _Refs(NamedTuple):
    """The kernel's arrays; keys and values are read from the outputs, whose buffers are the inputs'."""

    slots: Any
    rotations: Any
    q: Any
    q_scale: Any
    k_new: Any
    k_scale: Any
    v_new: Any
    found: Any
    k: Any
    v: Any
    counters: Any
    partial: tuple[Any, ...]


class _Program(NamedTuple):
    """One program: a cache row, and a split of it.

    Attributes:
        row, split: its place in the grid.
        cache, head: the cache, and its key head.
        slot, before: slot of the new entry, and how many entries before it are visible.
        query_Q: number of each query head in its group. The padding that fills up a block repeats the last head: it
            computes the same result and writes it to the same place.
    """

    row: Array
    split: Array
    cache: Array
    head: Array
    slot: Array
    before: Array
    query_Q: Array

    @property
    def queries(self) -> tuple[Array, Array]:
        """Row and number of the query heads in their group, both [Q, 1]."""
        return jnp.full((self.query_Q.shape[0], 1), self.cache), self.query_Q[:, None]


_Softmax = tuple[Array, Array, Array]
"""State of an online softmax: the largest score [Q], the sum of weights [Q], the weighted sum of values [Q, K]."""


def _kernel(*all_refs: Any, sizes: _Sizes) -> None:
    """The work of one program."""
    inputs, outputs = all_refs[:7], all_refs[10:]  # between them are the inputs of aliased outputs
    refs = _Refs(*inputs, *outputs[:4], partial=outputs[4:])
    row, split = pl.program_id(0), pl.program_id(1)
    G = sizes.config.kv_heads
    cache = jax.lax.div(row, G)
    program = _Program(
        row=row,
        split=split,
        cache=cache,
        head=jax.lax.rem(row, G),
        slot=refs.slots[cache, 0],
        before=refs.slots[cache, 1],
        query_Q=jnp.minimum(_numbers(max(LEAST_BLOCK, _power_of_two(sizes.group))), sizes.group - 1),
    )
    rows_Qx1, number_Qx1 = program.queries
    heads_Qx1 = program.head * sizes.group + number_Qx1
    q_QxK = _rotated(refs, sizes, program, refs.q, refs.q_scale, sizes.q, rows_Qx1, heads_Qx1).astype(refs.k.dtype)
    softmax = _new_entry(refs, sizes, program, q_QxK)
    softmax = _cached_entries(refs, sizes, program, q_QxK, softmax)
    channel_1xK = _numbers(sizes.config.head_size)[None]
    if sizes.tiling.splits == 1:
        _, total_Q, sum_QxK = softmax
        refs.found[rows_Qx1, heads_Qx1, channel_1xK] = (sum_QxK / total_Q[:, None]).astype(refs.found.dtype)
    else:
        _combine(refs, sizes, program, softmax)


def _rotated(
    refs: _Refs,
    sizes: _Sizes,
    program: _Program,
    ref: Any,
    scale_ref: Any,
    place: _Place,
    rows_Qx1: Array,
    heads_Qx1: Array,
) -> Array:
    """Normalized and rotated heads, float32 [Q, K]."""
    config, K = sizes.config, sizes.config.head_size
    channel_1xK, half = _numbers(K)[None], config.rotary_size // 2
    partner_1xK = jnp.where(
        channel_1xK < half, channel_1xK + half, jnp.where(channel_1xK < 2 * half, channel_1xK - half, channel_1xK)
    )
    way = jnp.where(program.head >= config.kv_heads - config.time_heads, refs.rotations.shape[1] - 1, 0)
    x_QxK = ref[rows_Qx1, place.first + heads_Qx1, channel_1xK].astype(jnp.float32)
    partner_QxK = ref[rows_Qx1, place.first + heads_Qx1, partner_1xK].astype(jnp.float32)
    norm_Qx1 = jax.lax.rsqrt(jnp.sum(x_QxK * x_QxK, axis=1)[:, None] / K + _EPSILON)
    cos_1xK, sin_1xK = (refs.rotations[program.cache, way, part, channel_1xK] for part in range(2))
    x_QxK *= scale_ref[place.scale_row, channel_1xK]
    partner_QxK *= scale_ref[place.scale_row, partner_1xK]
    return (x_QxK * cos_1xK + partner_QxK * sin_1xK) * norm_Qx1


def _scale(config: ModelConfig) -> float:
    """Scale of the scores, in base 2, since the hardware has exp2."""
    return config.head_size**-0.5 * _LOG2_E


def _new_entry(refs: _Refs, sizes: _Sizes, program: _Program, q_QxK: Array) -> _Softmax:
    """Write the new entry and start the softmax with it; the first split does so, wherever the slot is."""
    channel_1xK = _numbers(sizes.config.head_size)[None]
    cache_1x1, head_1x1 = jnp.full((1, 1), program.cache), jnp.full((1, 1), program.head)
    k_1xK = _rotated(refs, sizes, program, refs.k_new, refs.k_scale, sizes.k, cache_1x1, head_1x1)
    k_1xK = k_1xK.astype(refs.k.dtype)
    v_1xK = refs.v_new[cache_1x1, sizes.v.first + head_1x1, channel_1xK].astype(refs.v.dtype)
    score_Q = jnp.sum(q_QxK.astype(jnp.float32) * k_1xK.astype(jnp.float32), axis=1) * _scale(sizes.config)
    first = program.split == 0

    @pl.when(first)
    def _() -> None:
        cache_row = program.row + sizes.first_row
        place_1xK = (jnp.full((1, 1), cache_row), jnp.full((1, 1), program.slot), channel_1xK)
        refs.k[place_1xK] = k_1xK
        refs.v[place_1xK] = v_1xK

    zero_Q = jnp.zeros(program.query_Q.shape, jnp.float32)
    return (
        jnp.where(first, score_Q, zero_Q + _LOWEST),
        jnp.where(first, 1.0, zero_Q),
        jnp.where(first, v_1xK.astype(jnp.float32), jnp.zeros(q_QxK.shape, jnp.float32)),
    )


def _cached_entries(refs: _Refs, sizes: _Sizes, program: _Program, q_QxK: Array, softmax: _Softmax) -> _Softmax:
    """Add the cached entries of the program's split to the softmax, block by block."""
    R, S, L = refs.k.shape[1], sizes.tiling.splits, sizes.tiling.block
    cache_row = program.row + sizes.first_row

    def add_block(index: Array | int, softmax: _Softmax) -> _Softmax:
        top_Q, total_Q, sum_QxK = softmax
        first = program.split * (R // S) + index * L
        k_LxK, v_LxK = (ref[cache_row, pl.ds(first, L), :] for ref in (refs.k, refs.v))
        score_QxL = _product(q_QxK, k_LxK, contracting=(1, 1)) * _scale(sizes.config)
        behind_L = program.slot - first - _numbers(L)
        behind_L = jnp.where(behind_L < 0, behind_L + R, behind_L)
        visible_L = (behind_L >= 1) & (behind_L <= program.before)
        score_QxL = jnp.where(visible_L[None], score_QxL, -jnp.inf)
        new_top_Q = jnp.maximum(top_Q, jnp.max(score_QxL, axis=1))
        weight_QxL, kept_Q = jnp.exp2(score_QxL - new_top_Q[:, None]), jnp.exp2(top_Q - new_top_Q)
        added_QxK = _product(weight_QxL.astype(v_LxK.dtype), v_LxK, contracting=(1, 0))
        return new_top_Q, total_Q * kept_Q + jnp.sum(weight_QxL, axis=1), sum_QxK * kept_Q[:, None] + added_QxK

    blocks = R // S // L
    return add_block(0, softmax) if blocks == 1 else jax.lax.fori_loop(0, blocks, add_block, softmax)


def _combine(refs: _Refs, sizes: _Sizes, program: _Program, softmax: _Softmax) -> None:
    """Store the split's partial result; the last split of the row to finish combines them all."""
    (top_Q, total_Q, sum_QxK), (sums_ref, scores_ref) = softmax, refs.partial
    row, S, F = program.row, sizes.tiling.splits, sizes.group
    channel_1xK = _numbers(sizes.config.head_size)[None]
    sums_ref[row, program.split, program.query_Q[:, None], channel_1xK] = sum_QxK
    scores_ref[row, program.split, 0, program.query_Q] = top_Q
    scores_ref[row, program.split, 1, program.query_Q] = total_Q
    if not sizes.interpreted:
        triton.debug_barrier()  # all threads write before the one thread counts
    finished = triton.atomic_add(refs.counters, (row,), jnp.int32(1))

    @pl.when(finished == S - 1)
    def _() -> None:
        number_Q = jnp.minimum(_numbers(_power_of_two(F)), F - 1)
        split_Sx1 = _numbers(S)[:, None]

        def of_all(ref: Any, *place: Array) -> Array:
            return triton.load(ref.at[(row, *place)], volatile=True)  # not from the L1 cache

        top_SxQ = of_all(scores_ref, split_Sx1, jnp.zeros_like(split_Sx1), number_Q[None])
        total_SxQ = of_all(scores_ref, split_Sx1, jnp.ones_like(split_Sx1), number_Q[None])
        sum_SxQxK = of_all(sums_ref, split_Sx1[:, :, None], number_Q[None, :, None], channel_1xK[None])
        weight_SxQ = jnp.exp2(top_SxQ - jnp.max(top_SxQ, axis=0)[None])
        sum_QxK = jnp.sum(sum_SxQxK * weight_SxQ[:, :, None], axis=0)
        total_Q = jnp.sum(total_SxQ * weight_SxQ, axis=0)
        heads_Qx1 = program.head * F + number_Q[:, None]
        rows_Qx1 = jnp.full(heads_Qx1.shape, program.cache)
        refs.found[rows_Qx1, heads_Qx1, channel_1xK] = (sum_QxK / total_Q[:, None]).astype(refs.found.dtype)
        refs.counters[row] = 0


def _power_of_two(count: int) -> int:
    """Smallest power of two that is at least `count`."""
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


def _numbers(count: int) -> Array:
    """0, 1, ... `count` - 1, inside a kernel."""
    return jax.lax.iota(jnp.int32, count)
