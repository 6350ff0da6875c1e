"""Cut pieces into training windows, augment them and weight their targets.

**Epochs.** A piece of K targets (every token but its START) is cut into ceil(K / N) blocks of N targets, where N is the
number of latents, at a random offset for every piece and epoch. Blocks that stick out at either end are moved inside
the piece, so that no latent is wasted. Where blocks overlap as a result, a target's weight is 1 / the number of blocks
that contain it. So in every epoch, every target has a total weight of exactly 1, including the first event and END.
Random crops would rarely reach the ends of a piece.

**Windows.** A window is a block and the M + 1 - N tokens before it, left-padded where the piece starts later than that.

**Augmentation.** Transposition, time stretch and velocity shift are drawn for every window. A stretched block has a few
more or fewer time shifts, so its N latents reach back a little less or more than the block did. Weights stay with their
events, so a total of 1 per epoch holds on average. The first block of a piece keeps its first N targets rather than its
last, so that beginnings are never lost.

**Gaps.** A share of the windows, by default none, is re-ordered after that, to train a model to fill gaps (see `gaps`).
All their targets weigh 1, except those that only tell where the gap is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

import numpy as np
from jaxtyping import Float, Int32, Int64

from data_pipeline.augmentation.mode_and_rubato import LABEL_SIZE, PieceAugmentation, augmentation_label
from data_pipeline.augmentation.transforms import (
    Augmentation,
    clip_transposition,
    clip_velocity_shift,
    shift_velocity,
    stretch,
    transpose,
)
from data_pipeline.dataset import Pieces
from data_pipeline.gaps import Gaps
from data_pipeline.window_wishes import WindowWishes
from music_ar.tokens.vocabulary import PAD


class Window(TypedDict):
    """One training window: inputs are `tokens[:-1]`, targets are `tokens[-N:]`."""

    tokens: Int32[np.ndarray, " M+1"]
    weights: Float[np.ndarray, " N"]
    labels: Float[np.ndarray, f" {LABEL_SIZE}"]
    wishes: NotRequired[Int32[np.ndarray, "P W"]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """A window before augmentation.

    Attributes:
        tokens: tokens of the piece up to the block's last target, as many as any stretch can need.
        weights: weight of each of these tokens as a target; 0 before the block.
        is_first: whether the block is the first of its piece.
        augmentation: how the piece differs from the recorded performance.
        piece: number of the piece.
    """

    tokens: Int32[np.ndarray, " T"]
    weights: Float[np.ndarray, " T"]
    is_first: bool
    augmentation: PieceAugmentation
    piece: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """All windows of all epochs, by index: `index // len` is the epoch, `index % len` the block.

    Attributes:
        pieces: the pieces to cut.
        context: M, number of inputs of a window.
        latents: N, number of targets of a window.
        seed: random seed of the block offsets.
        augmentation: what to draw for each window; None leaves windows as they are.
        wishes: gives windows their wishes; None for a model that takes none.
        gaps: which windows are re-ordered; None for none.
    """

    pieces: Pieces
    context: int
    latents: int
    seed: int
    augmentation: Augmentation | None
    wishes: WindowWishes | None = None
    gaps: Gaps | None = None
    _first_blocks: Int64[np.ndarray, " pieces+1"] = field(init=False)

    def __post_init__(self) -> None:
        counts = [self._block_count(len(tokens) - 1) for tokens in self.pieces.tokens]
        object.__setattr__(self, "_first_blocks", np.cumsum([0, *counts]))

    def __len__(self) -> int:
        """Number of windows in an epoch."""
        return int(self._first_blocks[-1])

    def cut(self, index: int) -> Cut:
        """The window at `index`, before augmentation."""
        epoch, block = divmod(index, len(self))
        piece = int(np.searchsorted(self._first_blocks, block, side="right")) - 1
        tokens = self.pieces.tokens[piece]
        starts = self._block_starts(epoch, piece)
        start = int(starts[block - self._first_blocks[piece]])
        size = min(self.latents, len(tokens) - 1)
        stop = start + size + 1  # target t is token t + 1
        low = max(0, stop - self._raw_length())
        return Cut(
            tokens=tokens[low:stop].astype(np.int32),
            weights=_target_weights(starts, size, low, stop),
            is_first=start == 0,
            augmentation=self.pieces.augmentations[piece],
            piece=piece,
        )

    def augment(self, cut: Cut, rng: np.random.Generator) -> Window:
        """Draw an augmentation, apply it, and crop or pad to M + 1 tokens and N weights."""
        tokens, weights = cut.tokens, cut.weights
        semitones, factor, bins = 0, 1.0, 0
        if self.augmentation is not None:
            semitones, factor, bins = self.augmentation.draw(rng)
            semitones, bins = clip_transposition(tokens, semitones), clip_velocity_shift(tokens, bins)
            tokens, source = stretch(shift_velocity(transpose(tokens, semitones), bins), factor)
            weights = weights[source]
        if cut.is_first:
            tokens, weights = tokens[: self.latents + 1], weights[: self.latents + 1]
        reordered = None if self.gaps is None else self.gaps.draw(tokens, self.latents, rng)
        if reordered is not None:
            tokens, weights = reordered
        window: Window = {
            "tokens": _last(tokens, self.context + 1, PAD),
            "weights": _last(weights, self.latents, 0),
            "labels": augmentation_label(semitones, factor, bins, cut.augmentation),
        }
        if self.wishes is not None:
            composer, source = self.pieces.records[cut.piece].composer, self.pieces.source
            window["wishes"] = self.wishes.draw(window["tokens"], window["weights"], composer, source, rng)
        return window

    def _block_count(self, targets: int) -> int:
        return -(-targets // self.latents)

    def _block_starts(self, epoch: int, piece: int) -> Int64[np.ndarray, " blocks"]:
        """First target of each block of a piece: N apart from a random offset, the ends moved inside."""
        targets = len(self.pieces.tokens[piece]) - 1
        count = self._block_count(targets)
        slack = count * self.latents - targets
        offset = np.random.default_rng((self.seed, epoch, piece)).integers(0, slack, endpoint=True)
        last = max(0, targets - self.latents)
        return np.clip(np.arange(count) * self.latents - offset, 0, last)

    def _raw_length(self) -> int:
        """M + 1 tokens, plus as many as the strongest time compression can remove."""
        shortest = 1.0 if self.augmentation is None else self.augmentation.min_stretch
        return math.ceil((self.context + 1) / shortest)


def _target_weights(starts: np.ndarray, size: int, low: int, stop: int) -> Float[np.ndarray, " T"]:
    """For tokens low..stop-1: 1 / the number of blocks of `size` targets that contain the token, 0 if none does."""
    changes = np.zeros(stop - low + 1, np.int32)
    np.add.at(changes, np.clip(starts + 1 - low, 0, stop - low), 1)
    np.subtract.at(changes, np.clip(starts + 1 + size - low, 0, stop - low), 1)
    coverage = np.cumsum(changes[:-1])
    return np.where(coverage > 0, 1 / np.maximum(coverage, 1), 0).astype(np.float32)


def _last(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    """The last `length` values, with `fill` before them where there are fewer."""
    kept = values[-length:]
    padded = np.full(length, fill, values.dtype)
    padded[length - len(kept) :] = kept
    return padded
