"""`ModelConfig`, the sizes of a model; `Compute`, how it computes; and the presets.

Dimension key of the whole project, used as suffixes of names:
    B batch, M inputs (the context), N latents, S rows of the cross-attention (kept prefix + N),
    D width, H query heads, G key/value heads, K head size, F hidden width, V vocabulary, T any length,
    P the two ways to count a position: in tokens and in steps of time.
"""

import dataclasses
import itertools
from typing import Literal

from music_ar.features import gap, keyboard, notes, retrieval
from music_ar.features.wishes import WishTable
from music_ar.ranges import check_ranges, number, whole
from music_ar.tokens import vocabulary

_TOKENS_PER_NOTE = 4  # of MAESTRO, on average
_OF_MUSIC = ("onsets", "retrieval_notes", "time_heads", "wishes")  # sizes of what is read from event tokens
_MAX_TOKENS = 2**20  # a day of music; far more than fits in the caches of any machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class TapeConfig:
    """Sizes of an adaptive tape; see `tape`.

    Attributes:
        tokens: most tape tokens that an input takes. Positions depend on it, so a trained model keeps it.
        learned: tokens of the learned bank; 0 leaves it out.
        of_inputs: whether the inputs before the latents are a bank, too.
        epsilon: reading halts once the chance that it has halted reaches 1 - epsilon.

    Raises:
        ValueError: a size out of range, or no bank.
    """

    tokens: int = whole(16, 1, 1024)
    learned: int = whole(32, 0, 2**16)
    of_inputs: bool = True
    epsilon: float = number(0.01, above=0, most=0.5)

    def __post_init__(self) -> None:
        check_ranges(self, ValueError)
        if not (self.learned or self.of_inputs):
            raise ValueError("a tape needs a bank: learned tokens, or one of the inputs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a Perceiver AR. Saved as JSON next to the weights.

    Attributes:
        context: M, number of input tokens that attention reads.
        latents: N, largest number of latents in training; N = M makes it a decoder-only Transformer.
        width: D, channels of the residual stream.
        layers: self-attention blocks after the cross-attention.
        heads: H, query heads of every attention.
        kv_heads: G, key/value heads; each serves H / G query heads (grouped-query attention).
        head_size: K, channels of a head.
        hidden: F, channels inside the feed-forward blocks.
        conv_width: taps of the causal depthwise convolution over the embeddings; 1 means none. A note takes about four
            tokens, so a key that includes its neighbors is better than that of a bare token.
        onsets: number of last note-ons given as features at each position, along with the keyboard (see
            `features.keyboard`); 0 turns both off.
        retrieval_notes: number of last notes that n-gram retrieval searches (see `features.retrieval`); 0 turns it off.
            It may far exceed what the context holds.
        time_heads: number of key/value heads (the last of the G) whose rotary positions count time instead of tokens.
        segment: length of the segments of a Transformer-XL (see `transformer_xl`), with N = M; 0 means none.
        label_size: length of the label that describes how a training window was augmented; see `PerceiverAR.at_depths`.
        wishes: the wishes that the model takes (see `features.wishes`); None if it takes none.
        exits: numbers of self-attention blocks, rising and below `layers`, after which the final norm and the head were
            trained to predict too (early exits): decoding may stop there.
        tape: the adaptive tape of tokens that each input takes (see `tape`); None means none. A model with one does not
            generate.
        rotary_fraction: share of each head's channels that is rotated by position.
        rotary_wavelength: longest wavelength of the rotary positions, in tokens.
        vocabulary_size: V, including padding and the two piece boundaries; a model that can fill gaps also has the
            tokens of `music_ar.tokens.gaps`.
        padding: the token that stands where a sequence has none, in a vocabulary of the model's own: a model of other
            sequences than music, such as bytes or pixels. None means event tokens.

    Raises:
        ValueError: a size out of range, or sizes that do not fit together.
    """

    context: int = whole(4096, 1, _MAX_TOKENS)
    latents: int = whole(2048, 1, _MAX_TOKENS)
    width: int = whole(384, 1, 2**16)
    layers: int = whole(12, 1, 1000)
    heads: int = whole(6, 1, 1000)
    kv_heads: int = whole(6, 1, 1000)
    head_size: int = whole(64, 1, 2**12)
    hidden: int = whole(1536, 1, 2**18)
    conv_width: int = whole(1, 1, 1000)
    onsets: int = whole(0, 0, 1000)
    retrieval_notes: int = whole(0, 0, _MAX_TOKENS)
    time_heads: int = whole(0, 0, 1000)
    segment: int = whole(0, 0, _MAX_TOKENS)
    label_size: int = whole(0, 0, 1000)
    wishes: WishTable | None = None
    exits: tuple[int, ...] = whole((), 1, 1000)
    tape: TapeConfig | None = None
    rotary_fraction: float = number(0.5, least=0, most=1)
    rotary_wavelength: float = number(10_000.0, above=0, most=1e9)
    vocabulary_size: int = whole(vocabulary.VOCABULARY_SIZE, 1, 2**16)
    padding: int | None = whole(None, 0, 2**16 - 1)

    def __post_init__(self) -> None:
        check_ranges(self, ValueError)
        if any(after <= before for before, after in itertools.pairwise((0, *self.exits, self.layers))):
            raise ValueError(f"exits must rise and be below layers = {self.layers}, got {list(self.exits)}")
        if self.latents > self.context:
            raise ValueError(f"latents must be at most context = {self.context}, got {self.latents}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
        if self.time_heads > self.kv_heads:
            raise ValueError(f"time_heads must be at most kv_heads = {self.kv_heads}, got {self.time_heads}")
        if self.segment and self.latents != self.context:
            raise ValueError(f"segments need latents = context = {self.context}, got {self.latents} latents")
        if self.segment and self.tape:
            raise ValueError("a model with segments cannot have a tape")
        if self.rotary_size % 2:
            raise ValueError(
                "rotary_fraction * head_size must be even, since channels rotate in pairs; got "
                f"{self.rotary_fraction} * {self.head_size}"
            )
        least = max(retrieval.LEAST_CAPACITY, self.onsets)
        if 0 < self.retrieval_notes < least:
            raise ValueError(f"retrieval_notes must be 0 or at least {least}, got {self.retrieval_notes}")
        self._check_vocabulary()

    def _check_vocabulary(self) -> None:
        if self.padding is None:
            if self.vocabulary_size not in vocabulary.FINGERPRINTS:
                of_music = " or ".join(map(str, vocabulary.FINGERPRINTS))
                raise ValueError(
                    f"vocabulary_size must be {of_music}, those of event tokens, got {self.vocabulary_size}; a "
                    "vocabulary of other tokens needs padding, the token that stands where a sequence has none"
                )
            return
        if self.padding >= self.vocabulary_size:
            raise ValueError(f"padding must be below vocabulary_size = {self.vocabulary_size}, got {self.padding}")
        if of_music := [name for name in _OF_MUSIC if getattr(self, name)]:
            raise ValueError(
                f"{', '.join(of_music)} must be off in a model with a vocabulary of its own, since what they read from "
                "the tokens is music"
            )

    @property
    def rotary_size(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def depths(self) -> tuple[int, ...]:
        """Numbers of self-attention blocks after which the model predicts: its exits, and all blocks."""
        return (*self.exits, self.layers)

    @property
    def is_music(self) -> bool:
        """Whether the tokens are events of music, not a vocabulary of the model's own."""
        return self.padding is None

    @property
    def pad(self) -> int:
        """The token that stands where a sequence has none."""
        return vocabulary.PAD if self.padding is None else self.padding

    @property
    def fingerprint(self) -> str:
        """SHA-256 that says which vocabulary the model has."""
        if self.padding is None:
            return vocabulary.FINGERPRINTS[self.vocabulary_size]
        return vocabulary.own_fingerprint(self.vocabulary_size, self.padding)

    @property
    def fills_gaps(self) -> bool:
        """Whether the model can fill a gap: whether its vocabulary has the tokens for it."""
        return self.is_music and self.vocabulary_size >= vocabulary.INFILL_VOCABULARY_SIZE

    @property
    def reach(self) -> int:
        """Inputs that attention reads when decoding: M, or two segments."""
        return 2 * self.segment or self.context

    @property
    def most_latents(self) -> int:
        """Largest number of latents when decoding."""
        return min(self.latents, self.reach)

    @property
    def window(self) -> int:
        """Inputs of a training or scoring window: what attention reads, or what retrieval searches if that is more."""
        return max(self.context, _TOKENS_PER_NOTE * self.retrieval_notes)

    @property
    def notes_kept(self) -> int:
        """Notes that decoding keeps for the features."""
        return max(self.onsets, self.retrieval_notes)

    def attended(self, inputs: int) -> int:
        """Number of `inputs` that attention reads: the last M with retrieval, all of them without."""
        return min(inputs, self.context) if self.retrieval_notes else inputs

    @property
    def wish_rows(self) -> int:
        """Number of vectors of wishes; 0 if the model takes none."""
        return 0 if self.wishes is None else self.wishes.rows

    @property
    def feature_count(self) -> int:
        """Number of conditioning features at each position."""
        of_keyboard = keyboard.CHANNELS + notes.feature_count(self.onsets) if self.onsets else 0
        of_retrieval = retrieval.feature_count() if self.retrieval_notes else 0
        return of_keyboard + of_retrieval + (gap.CLASSES if self.fills_gaps else 0)

    def flops_per_target(self, kept_prefix: int) -> float:
        """Floating-point operations of one training step per target token (forward and backward).

        Counts two operations per multiply-add, three passes, causal attention at half its square, and only the work
        that the architecture requires: extra work of an implementation is not credited.

        Args:
            kept_prefix: prefix positions kept after the prefix dropout.
        """
        attention_width = self.heads * self.head_size
        kv_width = 2 * self.kv_heads * self.head_size
        feed_forward = 2 * self.width * self.hidden
        self_block = self.width * (2 * attention_width + kv_width) + feed_forward
        cross_block = 2 * self.width * attention_width + feed_forward
        inputs = (kv_width + self.feature_count) * (kept_prefix + self.latents) / self.latents
        head = self.width * self.vocabulary_size * len(self.depths)
        matrices = self.layers * self_block + cross_block + self.width * (inputs + self.width) + head
        tape = 0 if self.tape is None else self._tape_products(kept_prefix, self_block) / self.latents
        seen = 1.5 * self.segment or self.latents / 2
        cross_scores = 2 * attention_width * (kept_prefix + seen)
        self_scores = self.layers * 2 * attention_width * seen
        if self.tape is not None:
            self_scores += self.layers * 2 * attention_width * self.tape.tokens
        return 6 * (matrices + cross_scores + self_scores + tape)

    def _tape_products(self, kept_prefix: int, self_block: int) -> int:
        """Multiply-adds of reading the longest tape and of its way through the blocks, for a window."""
        assert self.tape is not None
        D, tokens = self.width, self.tape.tokens
        bank = self.tape.learned + kept_prefix * self.tape.of_inputs
        reader = D * (7 * D + 2 * bank)  # query, two layers of the state; scores and mixture
        block = self_block + self.heads * self.head_size * tokens
        return D * D * (kept_prefix + bank) + tokens * (reader + self.layers * block)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How a model computes; `music_ar.decoding.backend.select` chooses it for a device.

    Attributes:
        dtype: of matrix products. Parameters and logits are always float32.
        attention: implementation of causal attention; "cudnn" needs an NVIDIA GPU and bfloat16.

    Raises:
        ValueError: cuDNN attention with float32.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["xla", "cudnn"] = "xla"

    def __post_init__(self) -> None:
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError(f"cuDNN attention needs bfloat16, got {self.dtype}")


_SMALL = ModelConfig(
    width=512, layers=8, heads=8, kv_heads=2, hidden=1536, conv_width=8, onsets=8, retrieval_notes=4096, time_heads=1
)
PRESETS: dict[str, ModelConfig] = {
    # About 22 million parameters, in few layers, since each costs time when decoding.
    "small": _SMALL,
    # About 55 million; `small` can be expanded to it (see `expansion`).
    "medium": dataclasses.replace(_SMALL, width=768, layers=10, heads=12, kv_heads=3, hidden=2048),
    # About 400 million, for several accelerators.
    "large": dataclasses.replace(_SMALL, width=1536, layers=20, heads=24, kv_heads=6, hidden=4096, time_heads=2),
    # The control: a decoder-only Transformer of the same size as `small`.
    "small-decoder": dataclasses.replace(_SMALL, context=2048, latents=2048),
    # The same with segment recurrence: Transformer-XL, trained on windows of four segments.
    "small-xl": dataclasses.replace(_SMALL, context=4096, latents=4096, segment=1024, onsets=0, retrieval_notes=0),
    # For tests and first experiments on a CPU.
    "tiny": ModelConfig(
        context=64, latents=32, width=32, layers=2, heads=4, kv_heads=2, head_size=8, hidden=64, conv_width=4
    ),
}
