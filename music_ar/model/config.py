"""`ModelConfig` and the presets."""

import dataclasses

from music_ar.features import keyboard, retrieval
from music_ar.tokens import vocabulary

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
    vocabulary_size: int = vocabulary.VOCABULARY_SIZE

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
