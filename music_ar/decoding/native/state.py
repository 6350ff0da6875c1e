"""`NativeState`: everything that decoding carries from token to token, in arrays that the engine changes.

Dimension key, in addition to that of `music_ar.model.config`: R latents and S inputs in a rolling cache, L conv taps, C
notes kept, W levels of retrieval.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Shaped, UInt8, UInt32

from music_ar.features import retrieval
from music_ar.model.config import ModelConfig
from music_ar.tokens import vocabulary

# As in state.h, model.h and kernels.h:
_MOST_POSITIONS = 64  # tokens that a prefill reads at once
_HEAD_PADDING = 64
_SLOT_PADDING = 32


class NativeState(NamedTuple):
    """The state of a batch; see `decoding.state.DecodeState`. It is changed in place by the calls that take it.

    Attributes:
        age_B: position of the pending token in its piece.
        latents_B: number of latents, n.
        recent_BxL: the last tokens, the pending one last.
        held_Bx128: how many notes of each pitch are held.
        time_B, velocity_B, keys_Bx128: the keyboard.
        note_count_B, note_first_B, note_BxC, note_time_BxC: the last notes.
        match_keys_BxWxC, match_level_B, match_number_B: their n-gram match; without retrieval, it has no keys.
        gap_begin_B, gap_length_B, gap_end_B, gap_over_B: the gap that the piece fills, if there is one.
        pitches_Bx128, velocities_Bx32: histograms of the notes that the piece has had.
        cross_k, cross_v: keys and values of the inputs, by row and key head; time t is in slot t mod S.
        self_k, self_v: of the latents, by row, layer that is run, and key head; time t is in slot t mod R.
        prompt_end_B: time at which the prompt ends, in steps of 10 ms.
        limit_B: a row is done once it has this much music after its prompt, in steps.
        key_Bx2: each row's random key, as in JAX.
        ended_B: whether the piece has ended on its own, or the row is idle.
        tolerance_B: a token leaves at the first exit where that is expected to cost fewer nats.
        layers_run_B: self blocks run so far, over all tokens of the row after its prompt.
        wishes_BxD: the vector of each row's wishes; without channels for a model that takes none.
    """

    age_B: Int32[np.ndarray, " B"]
    latents_B: Int32[np.ndarray, " B"]
    recent_BxL: Int32[np.ndarray, "B L"]
    held_Bx128: Int32[np.ndarray, "B 128"]
    time_B: Int32[np.ndarray, " B"]
    velocity_B: Int32[np.ndarray, " B"]
    keys_Bx128: Int32[np.ndarray, "B 128"]
    note_count_B: Int32[np.ndarray, " B"]
    note_first_B: Int32[np.ndarray, " B"]
    note_BxC: Int32[np.ndarray, "B C"]
    note_time_BxC: Int32[np.ndarray, "B C"]
    match_keys_BxWxC: UInt32[np.ndarray, "B W C2"]
    match_level_B: Int32[np.ndarray, " B"]
    match_number_B: Int32[np.ndarray, " B"]
    gap_begin_B: Int32[np.ndarray, " B"]
    gap_length_B: Int32[np.ndarray, " B"]
    gap_end_B: Int32[np.ndarray, " B"]
    gap_over_B: UInt8[np.ndarray, " B"]
    pitches_Bx128: Int32[np.ndarray, "B 128"]
    velocities_Bx32: Int32[np.ndarray, "B 32"]
    cross_k: Shaped[np.ndarray, "B G SK"]
    cross_v: Shaped[np.ndarray, "B G S K2"]
    self_k: Shaped[np.ndarray, "B layers G RK"]
    self_v: Shaped[np.ndarray, "B layers G R K2"]
    prompt_end_B: Int32[np.ndarray, " B"]
    limit_B: Int32[np.ndarray, " B"]
    key_Bx2: UInt32[np.ndarray, "B 2"]
    ended_B: UInt8[np.ndarray, " B"]
    tolerance_B: Float32[np.ndarray, " B"]
    layers_run_B: Int32[np.ndarray, " B"]
    wishes_BxD: Float32[np.ndarray, "B _"]

    @classmethod
    def before_the_first_token(
        cls,
        config: ModelConfig,
        rows: int,
        *,
        latents: int,
        layers: int,
        tolerance: float,
        limit_steps: int,
        cached: np.dtype,
    ) -> "NativeState":
        """The state before the first token.

        Args:
            config: sizes of the model.
            rows: B.
            latents: n.
            layers: number of self blocks to run.
            tolerance: see `tolerance_B`.
            limit_steps: see `limit_B`.
            cached: type of cached numbers.
        """
        B, G, K, C = rows, config.kv_heads, config.head_size, config.notes_kept
        S, R = cross_slots(config), self_slots(latents)
        padded_K = -(-K // _HEAD_PADDING) * _HEAD_PADDING

        def filled(value: int, *shape: int) -> Int32[np.ndarray, "..."]:
            return np.full((B, *shape), value, np.int32)

        return cls(
            age_B=filled(-1),
            latents_B=filled(latents),
            recent_BxL=filled(vocabulary.PAD, config.conv_width),
            held_Bx128=filled(0, vocabulary.PITCHES),
            time_B=filled(0),
            velocity_B=filled(0),
            keys_Bx128=filled(-1, vocabulary.PITCHES),
            note_count_B=filled(0),
            note_first_B=filled(0),
            note_BxC=filled(0, C),
            note_time_BxC=filled(0, C),
            match_keys_BxWxC=np.zeros((B, len(retrieval.LEVELS), C if config.retrieval_notes else 0), np.uint32),
            match_level_B=filled(-1),
            match_number_B=filled(-1),
            gap_begin_B=filled(0),
            gap_length_B=filled(-1),
            gap_end_B=filled(-1),
            gap_over_B=np.zeros(B, np.uint8),
            pitches_Bx128=filled(0, vocabulary.PITCHES),
            velocities_Bx32=filled(0, vocabulary.VELOCITY_BINS),
            cross_k=np.zeros((B, G, S * K), cached),
            cross_v=np.zeros((B, G, S, padded_K), cached),
            self_k=np.zeros((B, layers, G, R * K), cached),
            self_v=np.zeros((B, layers, G, R, padded_K), cached),
            prompt_end_B=filled(0),
            limit_B=filled(limit_steps),
            key_Bx2=np.zeros((B, 2), np.uint32),
            ended_B=np.zeros(B, np.uint8),
            tolerance_B=np.full(B, tolerance, np.float32),
            layers_run_B=filled(0),
            wishes_BxD=np.zeros((B, config.width if config.wish_rows else 0), np.float32),
        )

    @property
    def layers(self) -> int:
        """Number of self blocks that a token runs through, unless it leaves early."""
        return self.self_v.shape[1]

    @property
    def done_B(self) -> Bool[np.ndarray, " B"]:
        """Rows that have ended or have enough music."""
        return (self.ended_B != 0) | (self.time_B - self.prompt_end_B >= self.limit_B)

    def with_limit(self, limit_steps: int) -> "NativeState":
        """The state with another limit: rows are done after `limit_steps` of music after their prompts."""
        return self._replace(limit_B=np.full_like(self.limit_B, limit_steps))

    def with_seeds(self, seeds: Sequence[int]) -> "NativeState":
        """The state with the random keys of these seeds, one per row."""
        keys = [[seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF] for seed in seeds]
        return self._replace(key_Bx2=np.array(keys, np.uint32).reshape(len(self.age_B), 2))

    def with_ended(self, ended_B: Bool[np.ndarray, " B"]) -> "NativeState":
        """The state with other rows ended."""
        return self._replace(ended_B=np.asarray(ended_B).astype(np.uint8))

    def rows(self, rows: Sequence[int]) -> "NativeState":
        """A copy of the state of some rows, in this order; a row may be taken more than once."""
        index = np.asarray(rows, np.int64)
        return NativeState(*(leaf[index] for leaf in self))

    def replaced(self, row: int, newcomer: "NativeState") -> "NativeState":
        """The state with a new piece from `start` in one row; the other rows continue as before.

        Args:
            row: the row to replace.
            newcomer: a state of one row, with caches of the same size; it can be used again.
        """
        for leaf, new in zip(self, newcomer, strict=True):
            if leaf.shape[1:] != new.shape[1:]:
                raise ValueError(
                    "a new piece needs caches of the batch's size: as many latents, or nearly so, and layers"
                )
            leaf[row] = new[0]
        return self


def self_slots(latents: int) -> int:
    """R for a number of latents: the next power of two, so that many numbers can share a batch."""
    return max(_SLOT_PADDING, 1 << (latents - 1).bit_length())


def cross_slots(config: ModelConfig) -> int:
    """S: the context, and the tokens that a prefill writes before the first of them is used."""
    return -(-(config.reach + _MOST_POSITIONS) // _SLOT_PADDING) * _SLOT_PADDING
